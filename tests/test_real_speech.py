"""The three jobs on real speech, where it is at hand: `../shared/speech` beside the repository."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from moshi_ttt.tiny.model import BASE_WEIGHTS, build_base

ROOT = Path(__file__).parents[1]
SPEECH = ROOT.parent / "shared" / "speech"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SPEECH.is_dir(), reason="no real speech at ../shared/speech"),
]


def run(*command, cwd):
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=900,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sys.stdout.write(done.stdout)
    return done.stdout


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    """Twenty steps of LoRA + memory on the telephone dialogue."""
    folder = tmp_path_factory.mktemp("real")
    build_base(folder / "base", weights=BASE_WEIGHTS)
    out = run(
        "finetune.train", ROOT / "configs/tiny.yaml", "--moshi_paths.hf_repo_id", folder / "base",
        "--data.corpus", "null", "--data.train_data", SPEECH / "dialogue/dialogue.jsonl",
        "--data.eval_data", SPEECH / "dialogue/dialogue.jsonl", "--eval.librilight_data", "null",
        "--eval_freq", "10", "--max_steps", "20", "--batch_size", "2", "--run_dir", "runs/real",
        cwd=folder,
    )  # fmt: skip
    return folder, out


def test_finetuning_on_a_telephone_dialogue(finetuned):
    folder, out = finetuned
    lines = (folder / "runs/real/metrics.jsonl").read_text().splitlines()
    held = [r["nll_codebook0"] for r in map(json.loads, lines) if r["kind"] == "held_out"]
    assert len(held) == 2
    assert held[1] < held[0]  # it is the recording it trains on: it has to get better
    assert "checkpoint" in out


def test_evaluating_on_librilight(finetuned):
    folder, _ = finetuned
    out = run(
        "eval.librilight", "--data", SPEECH / "librilight", "--checkpoint",
        folder / "runs/real/checkpoints/checkpoint_000020", "--min-seconds", "10", "--out", "ev",
        cwd=folder,
    )  # fmt: skip
    results = json.loads((folder / "ev/results.json").read_text())
    assert {item["speaker"] for item in results["items"]} == {"101", "102"}
    assert np.isfinite(results["arms"]["kept"]["ranges"]["codebook0"]["1x-4x"]["mean"])
    assert (folder / "ev/nll_by_position.png").stat().st_size > 10_000
    assert "memory kept" in out


def test_streaming_the_callers_side(finetuned):
    folder, _ = finetuned
    wav = SPEECH / "dialogue/auto_repairs_40.flac"
    run(
        "moshi_ttt.stream", "--file", wav, "--out", folder / "out.wav", "--seed", "1", "--stats",
        "--checkpoint", folder / "runs/real/checkpoints/checkpoint_000020", cwd=folder,
    )  # fmt: skip
    said, rate = soundfile.read(folder / "out.wav", dtype="float32")
    info = soundfile.info(wav)
    assert rate == 24_000
    assert abs(len(said) / rate - info.frames / info.samplerate) < 0.01
    level = torch.from_numpy(said).square().mean().sqrt()
    assert 1e-4 < float(level) < 0.5
