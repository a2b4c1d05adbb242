"""What a run's memories are doing: a file of readings, wandb, and a warning when one goes wrong."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

from moshi.models.lm import LMModel

from finetune.metrics import Metrics, open_log
from moshi_ttt.findings import History, find
from moshi_ttt.monitor import CallMonitor, Reading, from_json, to_json

FILE = "memory.jsonl"
logger = logging.getLogger(__name__)


class MemoryLog:
    """Looks at the first call of a step, every so many steps, on this rank alone.

    Args:
        lm: with memories.
        run_dir: gets `memory.jsonl`, a line a reading.
        metrics: for wandb: means over the heads, and the gate, of each layer.
        every: steps between readings.
        last: step of the run, which is looked at too.
        after_step: of a run that goes on, the step done last: lines of later ones are taken out,
            and what was found before is not said again.
    """

    def __init__(
        self,
        lm: LMModel,
        run_dir: Path,
        metrics: Metrics,
        *,
        every: int,
        last: int,
        after_step: int = 0,
    ) -> None:
        self._monitor, self._metrics = CallMonitor(lm), metrics
        self._every, self._last = every, last
        self._file = run_dir / FILE
        open_log(self._file, after_step).close()
        before = map(json.loads, self._file.read_text().splitlines())
        self._history, self._said = History(), set[str]()
        for line in before:
            self._add(from_json(line, "step"))

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around a training step: looks if one is due, and writes down what was seen.

        A step in which no memory takes part leaves no line.
        """
        if step % self._every and step != self._last:
            yield
            return
        with self._monitor.watching():
            yield
        reading = self._monitor.reading(step)
        if not reading.layers:
            return
        with self._file.open("a") as file:
            file.write(json.dumps(to_json(reading, "step")) + "\n")
        self._metrics.mirror("memory", step, summary(reading))
        for line in self._add(reading):
            logger.warning("step %d: %s", step, line)

    def _add(self, reading: Reading) -> list[str]:
        """What is found with one more reading, and was not before."""
        self._history.add(reading)
        found = find(self._history.readings, training=True)
        new = [one.text for one in found if one.key not in self._said]
        self._said |= {one.key for one in found}
        return new


def summary(reading: Reading) -> dict[str, float]:
    """`3/update`: of each layer each value, the mean over its heads; NaN is left out."""
    out: dict[str, float] = {}
    for name, values in reading.layers.items():
        for key, value in values.items():
            numbers = value if isinstance(value, list) else [value]
            known = [x for x in numbers if not math.isnan(x)]
            if known:
                out[f"{name.rpartition('.')[2]}/{key}"] = fmean(known)
    return out
