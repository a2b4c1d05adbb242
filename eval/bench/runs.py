"""Runs that a benchmark trains: made, gone on with where they stopped, and read."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from eval.arms import KEPT, TRAINED
from moshi_ttt.errors import UserError

Run = TypeVar("Run", bound=Hashable)


def train(folder: Path, *typed: object) -> None:
    """Train one run in a process of its own, or finish it.

    Args:
        folder: of the run.
        typed: after `python -m finetune.train`: a config and its overrides.

    Raises:
        UserError: it failed; what it said is on stderr.
    """
    words = [*typed, "--run_dir", folder, "--resume"]
    done = subprocess.run([sys.executable, "-m", "finetune.train", *map(str, words)], check=False)
    if done.returncode:
        raise UserError(f"{folder}: training ended with status {done.returncode}")


def newest(folder: Path) -> Path:
    """The last checkpoint of a run."""
    return max((folder / "checkpoints").glob("checkpoint_*"))


def recordings(folder: Path, kind: str = "codebook0") -> dict[str, dict[str, float]]:
    """Of a run's own evaluation, its memory kept if it has one: recording -> range -> mean NLL."""
    arms = json.loads((folder / "eval" / "results.json").read_text())["arms"]
    arm = arms.get(KEPT.name) or arms[TRAINED.name]
    return {name: kinds[kind] for name, kinds in arm["recordings"].items()}


def timed(
    runs: Sequence[Run], trained: Callable[[Run, int], Path], rounds: int
) -> dict[Run, float]:
    """Median seconds of a training step of each run, in turn, so that other work hits all alike.

    Args:
        runs: what is compared.
        trained: of a run and a round, trains a few steps, each logged, and returns the folder.
        rounds: of all runs.
    """
    seconds: dict[Run, list[float]] = {run: [] for run in runs}
    for turn in range(rounds):
        for run in runs:
            log = (trained(run, turn) / "metrics.jsonl").read_text().splitlines()
            lines = [json.loads(line) for line in log]
            stamps = [line["seconds"] for line in lines if line["kind"] == "train"]
            seconds[run] += np.diff(stamps[2:]).tolist()
    return {run: statistics.median(found) for run, found in seconds.items()}
