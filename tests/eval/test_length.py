"""Length generalisation: the numbers, what is skipped, and the command."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import yaml

from eval import length
from eval.arms import BASE, KEPT
from eval.generalisation import (
    factors,
    generalisation_metrics,
    generalisation_notes,
    generalisation_table,
    generalise,
)
from eval.keep import Found
from eval.length_plot import generalisation_figure
from eval.output import save_figure
from eval.scores import Item, Scores
from moshi_ttt.base import find_base, load_base
from moshi_ttt.checkpoint import save_checkpoint
from moshi_ttt.config import TTTConfig
from moshi_ttt.errors import UserError
from moshi_ttt.hybrid import splice
from moshi_ttt.lora import add_lora
from moshi_ttt.tiny import build_base
from tests.eval.test_panel import speak
from tests.small import randomise_memories

SEGMENT = 20


def made_up(frames, slope=0.0):
    """Items of so many frames and scores that are 3 nats plus `slope` a frame."""
    items = [Item(f"r{i}", f"s{i}", torch.zeros(17, n, dtype=torch.int64))
             for i, n in enumerate(frames)]  # fmt: skip
    found = [Found({"codebook0": 3.0 + 0.1 * i + slope * np.arange(n)}, [1.0])
             for i, n in enumerate(frames)]  # fmt: skip
    return items, Scores(found)


def test_twenty_lengths_from_half_to_ten():
    lengths = factors()
    assert len(lengths) == 20
    assert (lengths[0], lengths[-1]) == pytest.approx((0.5, 10))
    ratios = [b / a for a, b in pairwise(lengths)]
    assert ratios == pytest.approx([ratios[0]] * 19)


def test_perplexity_of_everything_up_to_each_length():
    items, scores = made_up([200] * 7, slope=0.01)
    found = generalise({KEPT: scores}, items, SEGMENT)
    assert (len(found["lengths"]), found["skipped"]) == (20, [])
    arm = found["arms"]["kept"]
    for place, point in zip(found["lengths"], arm["perplexity"], strict=True):
        nats = 3.3 + 0.01 * (place["frames"] - 1) / 2  # the mean over recordings is 3 + 0.3
        assert point["mean"] == pytest.approx(math.exp(nats))
        assert point["low"] <= point["mean"] <= point["high"]
    assert arm["named"]["1x"]["mean"] == pytest.approx(math.exp(3.3 + 0.01 * 19 / 2))
    assert arm["named"]["10x"]["mean"] == pytest.approx(math.exp(3.3 + 0.01 * 199 / 2))
    assert arm["best"]["factor"] == pytest.approx(0.5)
    assert arm["degradation"] == pytest.approx(math.exp(0.01 * (199 - 9) / 2))
    assert found["covered"] == pytest.approx([0.5, 10])
    assert generalisation_metrics(found)["kept_ppl_5x"] == arm["named"]["5x"]["mean"]


def test_all_lengths_are_of_the_same_recordings_and_skipped_ones_are_said():
    items, scores = made_up([200] * 3 + [100] * 4 + [30])
    found = generalise({BASE: scores, KEPT: scores}, items, SEGMENT)
    assert found["recordings"] == [f"r{i}" for i in range(7)]  # six speakers reach 100 frames
    assert found["skipped"][0]["frames"] > 100
    assert {p["n"] for p in found["arms"]["kept"]["perplexity"]} == {7}
    reason = found["skipped"][0]["reason"]
    assert "3 speakers have recordings of" in reason
    assert "it takes 6" in reason
    ten = found["arms"]["kept"]["named"]["10x"]
    assert math.isnan(ten["mean"])
    assert "3 speakers have recordings of 200 frames" in ten["reason"]
    assert generalisation_table(found)[1][3] == "-"
    assert any(line.startswith("skipped: ") for line in generalisation_notes(found))


def test_recordings_that_are_all_too_short(tmp_path):
    items, scores = made_up([5, 6])
    found = generalise({KEPT: scores}, items, SEGMENT)
    assert found["lengths"] == []
    assert len(found["skipped"]) == 20
    assert found["skipped"][0]["reason"] == "no recording has 10 frames, the longest has 6"
    assert math.isnan(found["arms"]["kept"]["degradation"])
    files = save_figure(generalisation_figure(found, "x", 8), tmp_path / "x")
    assert [file.suffix for file in files] == [".png", ".svg"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a checkpoint and its config, and seven speakers."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("length")
    base = find_base(build_base(folder / "base", dim=32, layers=1, context=5))
    lm = load_base(base, dtype=torch.float32)
    add_lora(lm, 2, 2.0)
    splice(lm, TTTConfig(layers="all", chunk_size=4))
    randomise_memories(lm)
    place = folder / "runs/mine/checkpoints/checkpoint_000004"
    save_checkpoint(lm, place, base, extra={"segment_frames": 2, "step": 4})
    for i in range(7):
        speak(folder / f"speech/small/{i}/book/part_1.flac", 2.0, seed=i, speaker=str(i))
    config = {
        "run_dir": str(folder / "runs/mine"),
        "moshi_paths": {"hf_repo_id": str(folder / "base")},
        "data": {"train_data": "t.jsonl", "codes_cache": str(folder / "codes"),
                 "mono_side": "user"},
        "lora": {"enable": True, "rank": 2},
        "duration_sec": 0.16,
        "eval": {"librilight_data": str(folder / "speech"), "frames_per_call": 7},
        "wandb": {"project": "p", "offline": True},
    }  # fmt: skip
    (folder / "runs/mine/config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_the_command_uses_the_runs_own_configuration(run, monkeypatch, capsys):
    monkeypatch.chdir(run)
    length.main(["--encode-workers", "1", "--device", "cpu"])
    said = capsys.readouterr().out
    assert f"recordings: eval.librilight_data of the run, {run}/speech" in said
    assert "7 recordings, segments of 2 frames, 3 arms" in said
    assert "skipped" not in said
    out = run / "runs/eval/mine-4-length"
    results = json.loads((out / "results.json").read_text())
    assert list(results["arms"]) == ["base", "kept", "reset"]
    assert results["covered"] == pytest.approx([0.5, 10])
    assert (out / "mine-4_length.png").stat().st_size > 10_000
    assert len(list((run / "codes").glob("*.safetensors"))) == 8  # seven and silence: the run's
    line = json.loads((out / "metrics.jsonl").read_text())
    assert line["kept_ppl_1x"] == results["arms"]["kept"]["named"]["1x"]["mean"]
    assert list(out.glob("wandb/offline-run-*"))
    with pytest.raises(UserError, match="holds results already"):
        length.main(["--out", str(out), "--device", "cpu"])


@pytest.mark.usefixtures("undrawn")
def test_a_speakers_recording_that_is_long_enough_is_taken(run, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(run)
    for i in range(7):
        speak(tmp_path / f"d/small/{i}/a/part_1.flac", 1.8, seed=i, speaker=str(i))
        speak(tmp_path / f"d/small/{i}/b/part_1.flac", 0.6, seed=9 + i, speaker=str(i))
    options = ["--data", str(tmp_path / "d"), "--device", "cpu", "--encode-workers", "1"]
    length.main([*options, "--out", str(tmp_path / "o")])
    results = json.loads((tmp_path / "o/results.json").read_text())
    assert results["recordings"]
    assert all(name.endswith("/a") for name in results["recordings"])
    assert results["covered"] == pytest.approx([0.5, 10])
    assert "7 of 14 recordings are shorter than 1.6 s and left out" in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
def test_a_checkpoint_that_lies_alone_needs_to_be_told(run, monkeypatch, tmp_path):
    monkeypatch.chdir(run)
    base = find_base(run / "base")
    lm = load_base(base, dtype=torch.float32)
    add_lora(lm, 2, 2.0)
    save_checkpoint(lm, tmp_path / "alone", base)
    options = ["--checkpoint", str(tmp_path / "alone"), "--data", "speech", "--device", "cpu"]
    options += ["--encode-workers", "1"]
    with pytest.raises(UserError, match="does not say how long a training segment was"):
        length.main(options)
    with pytest.raises(UserError, match=r"--wandb p: .* is not in a run's folder"):
        length.main([*options, "--segment-seconds", "0.2", "--wandb", "p"])
    assert not (run / "runs/eval/alone-length").exists()  # refused before anything was scored
    length.main([*options, "--segment-seconds", "0.2", "--out", str(tmp_path / "o")])
    results = json.loads((tmp_path / "o/results.json").read_text())
    assert results["segment_frames"] == 2
    assert list(results["arms"]) == ["base", "trained"]


def test_a_model_whose_output_is_no_number_is_said_and_the_others_are_scored(
    run, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(run)
    base = find_base(run / "base")
    lm = load_base(base, dtype=torch.float32)
    add_lora(lm, 2, 2.0)
    for name, weight in lm.named_parameters():
        if "lora" in name:
            weight.data.fill_(float("nan"))
    save_checkpoint(lm, tmp_path / "nan", base)
    options = ["--checkpoint", str(tmp_path / "nan"), "--data", "speech", "--device", "cpu"]
    options += ["--encode-workers", "1"]
    with pytest.raises(SystemExit) as left:
        length.main([*options, "--segment-seconds", "0.2", "--out", str(tmp_path / "o")])
    assert left.value.code == 1
    said = capsys.readouterr().out
    assert "trained model (no memory), 0/book: the NLL of codebook 0 (0 is text), frame 0" in said
    assert "0 recordings could not be read, 7 scores are no number" in said
    results = json.loads((tmp_path / "o/results.json").read_text())
    assert len(results["broken"]) == 7
    assert results["arms"]["trained"]["named"]["1x"]["mean"] is None
    assert results["arms"]["base"]["named"]["1x"]["mean"] > 1
