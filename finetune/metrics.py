"""Metrics to a JSONL file always, and to wandb when a project is set."""

from __future__ import annotations

import json
import logging
import math
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TextIO

import wandb

from finetune.args import TrainArgs
from moshi_ttt.files import written_whole

Mode = Literal["online", "offline", "disabled", "shared"]
TIMEOUT = 30.0
"""Seconds that wandb may take to answer; its own 90 are long to wait for nothing."""
logger = logging.getLogger(__name__)


class Metrics:
    """Append-only log of a run.

    wandb is a mirror: whatever is wrong with it (unreachable, not logged in, a bad key) is said
    once, and the run goes on offline or, if that fails too, without it.

    Args:
        run_dir: gets `metrics.jsonl` and, offline, `wandb/`.
        args: the run's configuration; `wandb.project` null means no wandb.
        after_step: of a run that goes on, the step done last: lines of later ones are taken out.
        silent: log nothing: another rank does.
    """

    def __init__(
        self, run_dir: Path, args: TrainArgs, *, after_step: int = 0, silent: bool = False
    ) -> None:
        self._start = time.monotonic()
        self._wandb: Any = None
        self._file = None if silent else open_log(run_dir / "metrics.jsonl", after_step)
        self._last = set() if silent else _kinds_at(run_dir / "metrics.jsonl", after_step)
        if args.wandb.project is None or silent:
            return
        about: dict[str, Any] = {
            "project": args.wandb.project,
            "name": args.wandb.run_name or run_dir.name,
            "dir": str(run_dir),
            "config": args.to_dict(),
            "settings": wandb.Settings(init_timeout=TIMEOUT),
        }
        # None is online, unless the environment has another WANDB_MODE
        modes: list[Mode | None] = ["offline"] if args.wandb.offline else [None, "offline"]
        for mode in modes:
            try:
                # offline nothing can go on; and wandb holds on to the id that failed online
                which: dict[str, Any] = {"id": secrets.token_hex(4)}
                if mode is None:
                    which = {"id": _wandb_id(run_dir), "resume": "allow"}
                self._wandb = wandb.init(mode=mode, **about, **which)
                break
            except Exception as error:  # whatever wandb raises: a mirror never stops a run
                then = "without it" if mode else f"offline, `wandb sync {run_dir}/wandb/*` later"
                logger.warning(
                    "wandb cannot be used (%s: %s): the run is logged %s",
                    type(error).__name__,
                    " ".join(str(error).split())[:200],
                    then,
                )

    def log(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Write one line: `{"kind", "step", "seconds", ...values}`; NaN becomes null in JSON."""
        if self._file is None:
            return
        seconds = round(time.monotonic() - self._start, 3)
        clean = {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        line = {"kind": kind, "step": step, "seconds": seconds} | clean
        self._file.write(json.dumps(line) + "\n")
        self.mirror(kind, step, values)

    def mirror(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Show numbers in wandb that are written down elsewhere."""
        self._mirror(lambda run: run.log({f"{kind}/{k}": v for k, v in values.items()}, step=step))

    def has(self, kind: str, step: int) -> bool:
        """Whether a run that goes on had such a line of the step it goes on after."""
        return (kind, step) in self._last

    def image(self, name: str, path: Path, step: int) -> None:
        """Show a picture in wandb too."""
        self._mirror(lambda run: run.log({name: wandb.Image(str(path))}, step=step))

    def close(self, *, failed: bool = False) -> None:
        """Flush and end."""
        if self._file is not None:
            self._file.close()
        self._mirror(lambda run: run.finish(exit_code=int(failed)))

    def _mirror(self, do: Callable[[Any], object]) -> None:
        if self._wandb is None:
            return
        try:
            do(self._wandb)
        except Exception as error:  # as above; metrics.jsonl has it all
            self._wandb = None
            logger.warning("wandb failed (%s), the run goes on without it", error)


def open_log(path: Path, after_step: int) -> TextIO:
    """A log of lines with a `step`, to be written on, without those of later steps than that."""
    if path.exists():
        kept = []
        for line in path.read_text().splitlines():
            try:
                kept += [line] if json.loads(line)["step"] <= after_step else []
            except json.JSONDecodeError:  # the last one, if the run was killed writing it
                continue
        with written_whole(path) as beside:
            beside.write_text("".join(f"{line}\n" for line in kept))
    return path.open("a", buffering=1)


def _kinds_at(path: Path, step: int) -> set[tuple[str, int]]:
    found = map(json.loads, path.read_text().splitlines())
    return {(line["kind"], step) for line in found if line["step"] == step}


def _wandb_id(run_dir: Path) -> str:
    """What tells wandb that a run goes on: made once, kept in the run's folder."""
    path = run_dir / "wandb_id.txt"
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()
