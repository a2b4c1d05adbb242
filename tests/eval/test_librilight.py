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

from eval.librilight import main
from moshi_ttt.base import find_base, load_base
from moshi_ttt.checkpoint import load, save_checkpoint
from moshi_ttt.config import TTTConfig
from moshi_ttt.errors import run_cli
from moshi_ttt.hybrid import splice
from moshi_ttt.lora import add_lora
from moshi_ttt.tiny import build_base
from tests.eval.test_panel import speak
from tests.small import randomise_memories

WINDOW = 5
ROOT = Path(__file__).parents[2]


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
    run("--baseline", "runs/a/checkpoints/checkpoint_000010", "--frames-per-call", "7")
    said = capsys.readouterr().out
    assert "runs/b/checkpoints/checkpoint_000020/consolidated, the newest under runs/" in said
    assert "7 recordings, 182 frames" in said
    assert "kept - reset [95 %]" in said
    out = work / "runs/eval/b-checkpoint_000020"
    assert "runs/eval/b-checkpoint_000020/results.json" in said
    assert (out / "nll_by_position.png").stat().st_size > 10_000
    assert "memory reset every window" in (out / "table.md").read_text()
    results = json.loads((out / "results.json").read_text())
    assert list(results["arms"]) == ["base", "kept", "reset", "off", "a-checkpoint_000010"]
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

    run("--max-items", "2", "--max-seconds", "1.7")
    fewer = json.loads((work / "runs/eval/b-checkpoint_000020-2/results.json").read_text())
    assert [i["frames"] for i in fewer["items"]] == [22, 22]
    for name, found in fewer["arms"]["kept"]["recordings"].items():
        wanted = json.loads(before)[name]["codebook0"]["1x-4x"]
        assert found["codebook0"]["1x-4x"] == pytest.approx(wanted, abs=1e-5)
    assert "2 of 7 speakers taken (--max-items)." in capsys.readouterr().out


def test_a_checkpoint_without_memory_against_its_base(work, capsys, tmp_path):
    run("--checkpoint", "runs/lora/checkpoints/checkpoint_000010", "--out", str(tmp_path / "o"))
    results = json.loads((tmp_path / "o/results.json").read_text())
    assert list(results["arms"]) == ["base", "trained"]
    assert results["differences"][0]["ranges"]["codebook0"]["1x-4x"]["mean"] == 0.0  # lora_B is 0
    assert "no difference is shown between the trained model and the stock base" in (
        capsys.readouterr().out
    )


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
        (["--baseline", "runs/a,runs/a"], "names must differ"),
        (["--min-seconds", "60"], "no recording is as long as 60 s; the longest of 7 is 0/book"),
        (["--max-items", "0"], "argument --max-items: must be at least 1, got 0"),
        (["--max-seconds", "nan"], "argument --max-seconds: must be positive, got nan"),
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


def test_broken_audio_writes_nothing(work, capsys, tmp_path):
    shutil.copytree(work / "speech", tmp_path / "speech")
    broken = tmp_path / "speech/small/3/book/part_1.flac"
    broken.write_bytes(broken.read_bytes()[:5000])
    options = ["--data", str(tmp_path / "speech"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: run(*options))
    assert stopped.value.code == 2
    assert "part_1.flac" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


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
    with pytest.raises(SystemExit):
        run_cli(lambda: run("--checkpoint", str(tmp_path / "broken"), "--out", str(tmp_path / "o")))
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: the model's output is broken: ")
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_the_command_on_real_speech(work, tmp_path):
    speech = ROOT / "../shared/speech/librilight"
    if not speech.is_dir():
        pytest.skip("no real speech: ../shared/speech is absent")
    command = [sys.executable, "-m", "eval.librilight", "--data", str(speech), "--min-seconds", "5"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "o")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "2 recordings" in done.stdout
    assert (tmp_path / "o/nll_by_position.png").is_file()
