"""The command from options to files: a tiny random Moshi, its real codec, noise for speech."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from eval.keep import Keep
from eval.librilight import main
from finetune.corpora import librilight
from finetune.encode import main as encode
from moshi_ttt.base import find_base, load_base
from moshi_ttt.checkpoint import load, save_checkpoint
from moshi_ttt.config import TTTConfig
from moshi_ttt.errors import UserError, run_cli
from moshi_ttt.hybrid import splice
from moshi_ttt.lora import add_lora
from moshi_ttt.tiny import build_base
from tests.eval.test_panel import speak
from tests.small import randomise_memories

WINDOW = 5
ROOT = Path(__file__).parents[2]
A, LORA = (f"runs/{name}/checkpoints/checkpoint_000010" for name in ("a", "lora"))


def save(place, base, seed=0, *, memory=True):
    lm = load_base(base, dtype=torch.float32)
    add_lora(lm, 2, 2.0)
    if memory:
        splice(lm, TTTConfig(layers="all", chunk_size=4))
        randomise_memories(lm, seed=seed)
    save_checkpoint(lm, place, base, extra={"segment_frames": 12})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a base, three checkpoints and seven speakers."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("work")
    base = find_base(build_base(folder / "base", dim=32, layers=1, context=WINDOW))
    save(folder / "runs/a/checkpoints/checkpoint_000010", base, 0)
    save(folder / "runs/lora/checkpoints/checkpoint_000010", base, memory=False)
    other = find_base(build_base(folder / "other", seed=1, dim=32, layers=1, context=WINDOW))
    save(folder / "elsewhere", other)
    save(folder / "runs/b/checkpoints/checkpoint_000020", base, 1)  # the newest
    os.utime(folder / "runs/b/checkpoints/checkpoint_000020/consolidated/ttt.json")
    for i in range(7):
        speak(folder / f"speech/small/{i}/book/part_1.flac", 2.0, seed=i, speaker=str(i))
    speak(folder / "speech/small/0/book/part_2.flac", 0.5, seed=8, speaker="0")
    return folder


@pytest.fixture
def work(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


def run(*options):
    main(["--data", "speech", "--encode-workers", "1", "--device", "cpu", *options])


def test_end_to_end(work, capsys):
    run("--baseline", f"{A},{LORA}", "--frames-per-call", "13")
    said = capsys.readouterr().out
    assert "runs/b/checkpoints/checkpoint_000020/consolidated, the newest under runs/" in said
    assert "7 recordings, 182 frames" in said
    assert "kept - reset [95 %]" in said
    out = work / "runs/eval/b-20"
    assert "runs/eval/b-20/results.json" in said
    assert "codes: 0 of 8 audio files are in data/codes already" in said
    assert (out / "nll_by_position.png").stat().st_size > 10_000
    assert "memory reset every window" in (out / "report.md").read_text()
    results = json.loads((out / "results.json").read_text())
    assert list(results["arms"]) == [
        "base", "wide", "a-10", "lora-10", "kept", "reset", "shuffled", "off",
    ]  # fmt: skip
    letters = [arm["letter"] for arm in results["arms"].values()]
    assert letters == ["a", "g", "", "b", "c", "e", "f", "h"]
    wide = results["arms"]["wide"]["recordings"]["0/book"]["codebook0"]
    base = results["arms"]["base"]["recordings"]["0/book"]["codebook0"]
    assert wide["0-1x"] == pytest.approx(base["0-1x"], abs=1e-5)
    assert abs(wide["1x-4x"] - base["1x-4x"]) > 1e-4
    assert results["trainings"]["kept"]["step"] is None
    assert results["trainings"]["base"] is None
    assert results["facts"]["the recordings are"] == "Moshi's side"
    assert [s["frames"] for s in results["length"]["lengths"]][-1] == 25
    assert results["length"]["skipped"][0]["reason"].endswith("it takes 6")
    assert (results["window_frames"], results["training_frames"]) == (WINDOW, 12)
    assert sorted(item["frames"] for item in results["items"]) == [25] * 6 + [32]
    assert results["arms"]["kept"]["ranges"]["codebook0"]["1x-4x"]["n"] == 7
    assert results["arms"]["kept"]["ranges"]["text"]["1x-4x"] == {
        "mean": None, "low": None, "high": None, "n": 0, "reason": "no transcript",
    }  # fmt: skip
    difference = {d["minus"]: d for d in results["differences"]}["reset"]
    assert math.isfinite(difference["ranges"]["codebook0"]["1x-4x"]["low"])
    assert results["side"] == "moshi"
    before = json.dumps(results["arms"]["kept"]["recordings"])

    few = ["--max-items", "2", "--max-minutes", str(1.7 / 60), "--rows", "2"]
    run(*few, "--arms", "kept,shuffled")
    fewer = json.loads((work / "runs/eval/b-20-2/results.json").read_text())
    assert [i["frames"] for i in fewer["items"]] == [22, 22]
    for name, found in fewer["arms"]["kept"]["recordings"].items():
        wanted = json.loads(before)[name]["codebook0"]["1x-4x"]
        assert found["codebook0"]["1x-4x"] == pytest.approx(wanted, abs=1e-5)
    said = capsys.readouterr().out
    assert "2 of 7 speakers taken (--max-items)." in said
    assert re.search(r"codes: (\d) of \1 audio files are in data/codes already", said)


@pytest.mark.usefixtures("undrawn")
def test_a_checkpoint_without_memory_against_its_base(work, capsys, tmp_path):
    run("--checkpoint", "runs/lora/checkpoints/checkpoint_000010", "--out", str(tmp_path / "o"))
    results = json.loads((tmp_path / "o/results.json").read_text())
    assert list(results["arms"]) == ["base", "wide", "trained"]
    assert results["differences"][0]["ranges"]["codebook0"]["1x-4x"]["mean"] == 0.0  # lora_B is 0
    assert "no difference is shown between trained model (no memory) and stock base" in (
        capsys.readouterr().out
    )


@pytest.mark.usefixtures("undrawn")
def test_a_fully_finetuned_model_is_compared_with_others_of_its_base(work, tmp_path):
    base = find_base(work / "base")
    lm = load_base(base, dtype=torch.float32)
    with torch.no_grad():
        lm.out_norm.alpha.mul_(1.5)
    save_checkpoint(lm, tmp_path / "full", base, full=True)
    full = str(tmp_path / "full")
    for ours, theirs, arms in (
        (A, full, "base,full"),
        (full, LORA, "base,lora-10,trained"),  # lora_B is 0: it is the base
    ):
        out = tmp_path / arms
        run("--checkpoint", ours, "--baseline", theirs, "--out", str(out), "--arms", arms)
        found = json.loads((out / "results.json").read_text())["arms"]
        assert list(found) == arms.split(",")
        scalars = [arm["ranges"]["codebook0"]["1x-4x"]["mean"] for arm in found.values()]
        assert len({round(scalar, 4) for scalar in scalars}) == 2
    about = tmp_path / "full/consolidated/ttt.json"
    said = json.loads(about.read_text())
    del said["base"]["stock"]
    about.write_text(json.dumps(said))
    with pytest.raises(UserError, match="does not say of which base it is"):
        run("--checkpoint", A, "--baseline", full, "--out", str(tmp_path / "q"))


@pytest.mark.usefixtures("undrawn")
def test_a_manifest_and_the_users_side(work, tmp_path):
    speak(tmp_path / "a.wav", 1.8, channels=2)
    (tmp_path / "m.jsonl").write_text(json.dumps({"path": "a.wav", "duration": 1.8}))
    options = ["--data", str(tmp_path / "m.jsonl"), "--side", "user", "--out", str(tmp_path / "o")]
    main(["--encode-workers", "1", *options])
    results = json.loads((tmp_path / "o/results.json").read_text())
    assert results["side"] == "user"
    found = results["arms"]["kept"]["ranges"]["codebook0"]["1x-4x"]
    assert found["reason"] == "one speaker only: no interval"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--data", "nowhere"], "nowhere: no such folder or manifest"),
        (["--data", "base"], r"base: no \.flac file under it"),
        (["--checkpoint", "nowhere"], "nowhere is not a checkpoint: it has no ttt.json"),
        (["--checkpoint", "elsewhere", "--base", "base"], "not the one this checkpoint was"),
        (["--baseline", "elsewhere"], "--baseline elsewhere belongs to another base"),
        (["--baseline", "speech"], "--baseline speech is not a checkpoint"),
        (["--baseline", f"{A},{A}"], "names must differ"),
        (["--min-minutes", "1"], "no recording is as long as 60 s; the longest of 7 is 0/book"),
        (["--max-items", "0"], "argument --max-items: must be at least 1, got 0"),
        (["--max-minutes", "nan"], "argument --max-minutes: must be positive, got nan"),
        (
            ["--arms", "kept,lora"],
            r"--arms kept,lora: no arm \['lora'\]; there are base, wide, kept",
        ),
        (["--side", "left"], "argument --side: invalid choice: 'left'"),
        (["--wrong"], "unrecognized arguments: --wrong"),
        (["--device", "tpu"], "device"),
        (["--out", "speech/small/0/book/part_1.flac"], "is not a folder that can be written"),
    ],
)
def test_bad_input_is_one_line_and_status_2(work, capsys, options, line):
    before = sorted(p for p in work.rglob("*") if "codes" not in p.parts)
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: run(*options))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(line, error), error
    assert sorted(p for p in work.rglob("*") if "codes" not in p.parts) == before


def copy_speech(work, folder):
    shutil.copytree(work / "speech", folder / "speech")
    return folder / "speech/small"


@pytest.mark.usefixtures("undrawn")
def test_what_cannot_be_read_is_named_counted_and_left_out(work, capsys, tmp_path):
    small = copy_speech(work, tmp_path)
    header, samples, beside = (small / f"{i}/book/part_1.flac" for i in (1, 3, 5))
    header.write_bytes(b"no flac at all")
    samples.write_bytes(samples.read_bytes()[:5000])  # the header is whole
    beside.with_suffix(".json").write_text("{")
    options = ["--data", str(tmp_path / "speech"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: run(*options, "--arms", "base,kept"))
    assert stopped.value.code == 1
    said = capsys.readouterr().out
    assert "3 recordings could not be read" in said
    for name in ("1/book", "3/book", "5/book"):
        assert re.search(f"{name} cannot be read: .*part_1", said), name
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert sorted(i["name"] for i in results["items"]) == ["0/book", "2/book", "4/book", "6/book"]
    assert sorted(f["name"] for f in results["failed"]) == ["1/book", "3/book", "5/book"]
    assert "3/book was left out: " in (tmp_path / "out/report.md").read_text()


def test_nothing_that_can_be_read_writes_nothing(work, capsys, tmp_path):
    small = copy_speech(work, tmp_path)
    for flac in small.rglob("*.flac"):
        flac.write_bytes(flac.read_bytes()[:4000])
    options = ["--data", str(tmp_path / "speech"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: run(*options))
    assert stopped.value.code == 2
    assert "none of 7 recordings can be read; the first: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("undrawn")
def test_stored_codes_are_scored_and_a_broken_one_is_left_out(work, capsys, tmp_path):
    manifest = tmp_path / "ll.jsonl"
    librilight.prepare("speech", manifest)
    encode([str(manifest), str(tmp_path / "codes"), "--base", "base", "--workers", "1"])
    shard = next((tmp_path / "codes").glob("*.safetensors"))
    run("--out", str(tmp_path / "audio"), "--arms", "kept")
    data = ["--data", str(tmp_path / "codes/codes.jsonl"), "--arms", "kept"]
    main([*data, "--out", str(tmp_path / "stored"), "--device", "cpu"])
    assert "codes: 7 of 7 recordings were encoded earlier" in capsys.readouterr().out
    audio, stored = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("audio", "stored")
    )
    wanted = sorted(r["codebook0"]["1x-4x"] for r in audio["arms"]["kept"]["recordings"].values())
    found = sorted(r["codebook0"]["1x-4x"] for r in stored["arms"]["kept"]["recordings"].values())
    assert found == pytest.approx(wanted, abs=1e-6)
    with safe_open(shard, "pt") as file:
        tensors, about = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()
    key = next(k for k in tensors if k != "silence")
    tensors[key][0, 0, 3] ^= 1
    save_file(tensors, shard, about)
    with pytest.raises(SystemExit) as stopped:
        main([*data, "--out", str(tmp_path / "broken"), "--device", "cpu"])
    assert stopped.value.code == 1
    results = json.loads((tmp_path / "broken/results.json").read_text())
    assert len(results["items"]) == 6
    assert "is not what was written" in results["failed"][0]["reason"]


@pytest.mark.usefixtures("undrawn")
def test_it_goes_on_where_it_was(work, capsys, tmp_path, monkeypatch):
    out, few = tmp_path / "out", ["--arms", "base,kept,shuffled"]
    put, calls = Keep.put, []

    def dies(self, name, found):
        put(self, name, found)
        calls.append(name)
        if len(calls) == 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Keep, "put", dies)
        with pytest.raises(KeyboardInterrupt):
            run(*few, "--out", str(out))
    assert not (out / "results.json").exists()
    capsys.readouterr()
    run(*few, "--out", str(out))
    assert f"10 of 21 scores were in {out}/nll already" in capsys.readouterr().out
    run(*few, "--out", str(tmp_path / "whole"))
    one, other = (
        json.loads((folder / "results.json").read_text()) for folder in (out, tmp_path / "whole")
    )
    for name, arm in one["arms"].items():
        assert arm["recordings"] == other["arms"][name]["recordings"]
        assert arm["curve"] == other["arms"][name]["curve"]
    assert one["differences"] == other["differences"]


def test_no_checkpoint_at_all(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run_cli(lambda: main([]))
    assert "no checkpoint under runs/" in capsys.readouterr().err


def test_a_model_that_is_broken(work, capsys, tmp_path):
    loaded = load("runs/a/checkpoints/checkpoint_000010")
    with torch.no_grad():
        for layer in loaded.lm.transformer.layers:
            layer.seq_modeling_block.gate.fill_(float("nan"))
    save_checkpoint(loaded.lm, tmp_path / "broken", loaded.base)
    options = ["--checkpoint", str(tmp_path / "broken"), "--arms", "base,kept,reset"]
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: run(*options, "--out", str(tmp_path / "o")))
    assert stopped.value.code == 1
    said = capsys.readouterr().out
    assert "14 scores are no number" in said
    assert "memory kept, 3/book: the NLL of codebook" in said
    assert "No verdict: from 1x to 4x of the window" in said
    results = json.loads((tmp_path / "o/results.json").read_text())
    assert results["arms"]["kept"]["ranges"]["codebook0"]["1x-4x"]["mean"] is None
    assert results["arms"]["base"]["ranges"]["codebook0"]["1x-4x"]["n"] == 7


@pytest.mark.slow
def test_the_command_on_real_speech(work, tmp_path):
    speech = ROOT / "../shared/speech/librilight"
    if not speech.is_dir():
        pytest.skip("no real speech: ../shared/speech is absent")
    command = [
        sys.executable,
        "-m",
        "eval.librilight",
        "--data",
        str(speech),
        "--min-minutes",
        "0.1",
    ]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "o")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "2 recordings" in done.stdout
    assert (tmp_path / "o/nll_by_position.png").is_file()
