"""The folder of a run: whose it is, whether it is finished, and how it is begun."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from finetune.args import TrainArgs
from finetune.load_args import load_args
from moshi_ttt.errors import UserError
from moshi_ttt.files import locked, written_whole

CONFIG, SUMMARY, LOCK = "config.yaml", "summary.txt", ".lock"
_ADVICE = "choose another run_dir, or --overwrite_run_dir to move it aside"
_OF_THE_FOLDER = ("run_dir", "overwrite_run_dir")
"""Keys that do not make another run of it: the folder may be spelled or have been moved."""
_OF_THE_WAY = (
    "batch_size", "num_microbatches", "gradient_checkpointing", "log_freq", "do_ckpt", "ckpt_freq",
    "num_ckpt_keep", "save_adapters", "do_eval", "eval_freq", "eval.", "wandb.",
    "max_skipped_steps", "data.train_data", "data.corpus", "data.eval_data", "data.codes_cache",
    "data.encode_workers", "moshi_paths.", "monitor_freq",
)  # fmt: skip
"""Keys that a run may go on with another value of: they do not change what is trained (the number
of lanes is kept, whatever the first two say; data and base are told by their content)."""


def run_dir_of(args: TrainArgs) -> Path:
    """`run_dir` as a path, a leading `~` resolved."""
    return Path(args.run_dir).expanduser()


def finished_summary(run_dir: Path, args: TrainArgs, *, resume: bool = False) -> str | None:
    """The summary of this very run if it is there and finished; None if it may begin or go on.

    Nothing is written.

    Args:
        run_dir: of the run.
        args: of the run.
        resume: it may be there, unfinished, and keys that do not change what is trained may differ.

    Raises:
        UserError: the folder holds something else, or cannot be made.
    """
    _check_can_be_made(run_dir)
    if not _in_use(run_dir):
        return None
    if not (run_dir / CONFIG).is_file():
        raise UserError(
            f"run_dir {run_dir} exists and is not a run of ours (it has no {CONFIG}); "
            "choose another run_dir"
        )
    if args.overwrite_run_dir:
        if resume:
            raise UserError("--resume and --overwrite_run_dir contradict each other")
        return None
    finished = (run_dir / SUMMARY).is_file()
    there = load_args(run_dir / CONFIG).to_dict()
    if difference := _difference(there, args.to_dict(), free=resume and not finished):
        raise UserError(
            f"run_dir {run_dir} holds a run with another config ({difference}); {_ADVICE}"
        )
    if not finished and not resume:
        raise UserError(
            f"run_dir {run_dir} holds this run, unfinished; --resume goes on with it; {_ADVICE}"
        )
    return (run_dir / SUMMARY).read_text() if finished else None


def check_same_run(config: dict[str, Any], args: TrainArgs, where: Path) -> None:
    """See that a saved state may go on under `args`.

    Raises:
        UserError: a key differs that changes what is trained.
    """
    if difference := _difference(config, args.to_dict(), free=True):
        raise UserError(f"{where} was saved by a run with another config ({difference})")


def _difference(there: dict[str, Any], here: dict[str, Any], *, free: bool) -> str | None:
    """The first key that differs, with both values."""
    before, now = _flat(there), _flat(here)
    for key in sorted(now | before):
        if free and key.startswith(_OF_THE_WAY):
            continue
        if now.get(key) != before.get(key):
            return f"{key}: {before.get(key)!r}, now {now.get(key)!r}"
    return None


def begin_run_dir(run_dir: Path, args: TrainArgs, *, resume: bool = False) -> Path | None:
    """Make the folder with its config.yaml, whole or not at all.

    Returns:
        Where an older run was moved to, None if there was none or it goes on (`resume`).
    """
    aside = None
    if _in_use(run_dir):
        if resume:
            _write_config(run_dir, args)
            return None
        run_dir = run_dir.absolute()  # "." has no name to change
        aside = _free_name(run_dir.with_name(f"{run_dir.name}.{time.strftime('%Y%m%d-%H%M%S')}"))
        run_dir.rename(aside)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _write_config(run_dir, args)
    except BaseException:
        shutil.rmtree(run_dir, ignore_errors=True)
        if aside is not None:
            aside.rename(run_dir)
        raise
    return aside


def _write_config(run_dir: Path, args: TrainArgs) -> None:
    values = args.to_dict() | {"overwrite_run_dir": False}
    with written_whole(run_dir / CONFIG) as beside:
        beside.write_text(yaml.safe_dump(values, sort_keys=False))


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Hold a run folder against other processes; a killed one lets go of it.

    Raises:
        UserError: another process trains into it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with locked(run_dir / LOCK, f"run_dir {run_dir}: another process is training into it"):
        yield


def finish_run_dir(run_dir: Path, summary: str) -> None:
    """Write the summary, which is what makes a run finished."""
    with written_whole(run_dir / SUMMARY) as beside:
        beside.write_text(summary)


def _in_use(run_dir: Path) -> bool:
    return run_dir.exists() and any(p.name != LOCK for p in run_dir.iterdir())


def _check_can_be_made(run_dir: Path) -> None:
    there = next(p for p in (run_dir, *run_dir.absolute().parents) if p.exists())
    if not there.is_dir():
        of = "" if there == run_dir else f": {there}"
        raise UserError(f"run_dir {run_dir}{of} is a file")
    if not os.access(there, os.W_OK):
        raise UserError(f"run_dir {run_dir}: {there} is not writable")


def _free_name(wanted: Path) -> Path:
    # two runs moved within one second
    names = [wanted, *(wanted.with_name(f"{wanted.name}-{n}") for n in range(2, 100))]
    return next(name for name in names if not name.exists())


def _flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    out: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        elif prefix + key not in _OF_THE_FOLDER:
            out[prefix + key] = value
    return out
