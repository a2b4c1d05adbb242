"""Metrics to a JSONL file always, and to wandb when a project is set."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import wandb

from finetune.args import TrainArgs

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
    """

    def __init__(self, run_dir: Path, args: TrainArgs) -> None:
        self._file = (run_dir / "metrics.jsonl").open("a", buffering=1)
        self._start = time.monotonic()
        self._wandb: Any = None
        if args.wandb.project is None:
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
                self._wandb = wandb.init(mode=mode, **about)
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
        seconds = round(time.monotonic() - self._start, 3)
        clean = {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        line = {"kind": kind, "step": step, "seconds": seconds} | clean
        self._file.write(json.dumps(line) + "\n")
        self._mirror(lambda run: run.log({f"{kind}/{k}": v for k, v in values.items()}, step=step))

    def image(self, name: str, path: Path, step: int) -> None:
        """Show a picture in wandb too."""
        self._mirror(lambda run: run.log({name: wandb.Image(str(path))}, step=step))

    def close(self, *, failed: bool = False) -> None:
        """Flush and end."""
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
