"""`python -m eval.librilight` killed as it writes, and started again: nothing is different."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eval.arms import BASE, MODES, WIDE, Arm
from eval.librilight import main, parse
from eval.setup import find_models
from moshi_ttt.base import find_base, load_base
from moshi_ttt.checkpoint import save_checkpoint
from moshi_ttt.config import TTTConfig
from moshi_ttt.hybrid import splice
from moshi_ttt.tiny import build_base
from tests.eval.test_panel import speak
from tests.eval.undrawn import leave_undrawn
from tests.small import randomise_memories

ROOT = Path(__file__).parents[2]
KILLED = """
import os, signal
import eval.keep
write, files = eval.keep.save_file, []

def torn(tensors, path, about):
    write(tensors, path, about)
    files.append(path)
    if len(files) == 5:
        path.write_bytes(path.read_bytes()[:100])
        os.kill(os.getpid(), signal.SIGKILL)

eval.keep.save_file = torn
from eval.librilight import main
main()
"""
"""The command, which dies in the middle of writing the fifth recording's scores."""
TIMES = {"ms_per_frame", "facts", "memory_bytes", "checkpoint"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a base, two checkpoints and three speakers."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("work")
    base = find_base(build_base(folder / "base", dim=32, layers=1, context=5))
    for name, seed in (("a", 0), ("b", 1)):
        lm = load_base(base, dtype=torch.float32)
        splice(lm, TTTConfig(layers="all", chunk_size=4))
        randomise_memories(lm, seed=seed)
        save_checkpoint(lm, folder / name, base)
    for i in range(3):
        speak(folder / f"speech/small/{i}/book/part_1.flac", 1.8 + 0.2 * i, seed=i, speaker=str(i))
    return folder


def options(out, checkpoint="a", *more):
    return [
        "--data", "speech", "--codes-cache", "codes", "--encode-workers", "1", "--device", "cpu",
        "--checkpoint", checkpoint, "--out", str(out), "--frames-per-call", "7", *more,
    ]  # fmt: skip


def numbers(value):
    """Results without what another run of the same numbers may have otherwise."""
    if isinstance(value, dict):
        return {key: numbers(part) for key, part in value.items() if key not in TIMES}
    return [numbers(part) for part in value] if isinstance(value, list) else value


def written(out):
    """The numbers of a run."""
    return numbers(json.loads((out / "results.json").read_text()))


@pytest.fixture(scope="module")
def whole(work):
    """Where an uninterrupted run has written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        leave_undrawn(patch)
        main(options("whole"))
    return work / "whole"


@pytest.mark.usefixtures("undrawn")
def test_killed_and_started_again_is_as_undisturbed(work, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(work)
    out, undisturbed = tmp_path / "o", written(whole)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *options(out)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    files = {file: file.stat().st_mtime_ns for file in (out / "nll").glob("*.safetensors")}
    assert len(files) == 4
    assert not (out / "results.json").exists()
    main(options(out))
    assert written(out) == undisturbed
    assert {file: file.stat().st_mtime_ns for file in files} == files
    everything = len(undisturbed["arms"]) * len(undisturbed["items"])
    assert len(list((out / "nll").glob("*.safetensors"))) == everything > 4
    assert len(undisturbed["items"]) == 3
    assert len({json.dumps(arm["recordings"]) for arm in undisturbed["arms"].values()}) == (
        len(undisturbed["arms"])
    )


@pytest.mark.usefixtures("undrawn")
def test_other_weights_in_the_same_folder_have_their_own_numbers(
    work, whole, tmp_path, monkeypatch
):
    """The base's scores are found, those of the first checkpoint are not."""
    monkeypatch.chdir(work)
    shutil.copytree(whole / "nll", tmp_path / "o/nll")
    for name in ("o", "alone"):
        main(options(tmp_path / name, "b", "--arms", "base,kept"))
    there = {file.name for file in (whole / "nll").iterdir()}
    assert len(there & {file.name for file in (tmp_path / "alone/nll").iterdir()}) == 3
    assert len(list((tmp_path / "o/nll").iterdir())) == len(there) + 3
    second = written(tmp_path / "o")
    assert second == written(tmp_path / "alone")
    for name, arm in second["arms"].items():
        same = arm["recordings"] == written(whole)["arms"][name]["recordings"]
        assert same == (name == "base")


def test_every_setting_that_decides_a_number_is_in_its_files_name(work, monkeypatch, tmp_path):
    monkeypatch.chdir(work)
    found = []
    for checkpoint in ("a", "b"):
        models = find_models(parse(options("o", checkpoint)))
        folder = models.main.folder
        arms = [BASE, WIDE, *(Arm(m, m, checkpoint=folder, mode=m) for m in MODES)]
        for arm in arms if checkpoint == "a" else arms[2:]:
            for rows in (1, 2):
                for frames in (7, 100):
                    keep = models.keep(tmp_path, arm, rows=rows, frames_per_call=frames)
                    found.append(keep.file("x"))
    assert len(set(found)) == len(found) == (2 + 4 + 4) * 4
