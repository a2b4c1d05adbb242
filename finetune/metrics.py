"""Metrics to a JSONL file always, and to wandb when a project is set."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import wandb

from finetune.args import TrainArgs

logger = logging.getLogger(__name__)


class Metrics:
    """Append-only log of a run.

    wandb is a mirror: unreachable or not logged in, it is said once and the run goes on offline.

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
        }
        try:
            self._wandb = wandb.init(mode="offline" if args.wandb.offline else "online", **about)
        except (wandb.Error, OSError) as error:
            logger.warning(
                "wandb cannot be reached (%s): the run is logged offline, `wandb sync %s` later",
                " ".join(str(error).split())[:200],
                run_dir / "wandb",
            )
            self._wandb = wandb.init(mode="offline", **about)

    def log(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Write one line: `{"kind", "step", "seconds", ...values}`; NaN becomes null in JSON."""
        seconds = round(time.monotonic() - self._start, 3)
        clean = {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        line = {"kind": kind, "step": step, "seconds": seconds} | clean
        self._file.write(json.dumps(line) + "\n")
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{k}": v for k, v in values.items()}, step=step)

    def image(self, name: str, path: Path, step: int) -> None:
        """Show a picture in wandb too."""
        if self._wandb is not None:
            self._wandb.log({name: wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        """Flush and end."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()
