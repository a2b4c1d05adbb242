"""What a soak looks at while it runs: memory in use, time of a step, numbers that are none.

A machine with other work on it is slower at one time than at another, in CPU time too: caches and
memory are shared. So now and then a step of the model that grows old is followed by one of a twin
that starts anew in every window, and what is watched is how many steps of the twin one step takes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moshi_ttt.hybrid import HybridLMModel
from moshi_ttt.lanes import named_tensors
from moshi_ttt.states import ttt_blocks

FLAT, STEADY = 0.01, 0.05
"""By so much bytes and time of a step may grow, in parts of what they were in the second window."""
R = TypeVar("R")


def clocks() -> tuple[float, float]:
    """Seconds: CPU time of this thread, and on the wall."""
    return time.thread_time(), time.perf_counter()


def resident_bytes() -> int:
    """Bytes of this process that are in memory now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def _median(values: NDArray[np.float64]) -> float:
    return float(np.median(values)) if len(values) else float("nan")


@dataclass
class Twin:
    """The same model in another stream, which stays young.

    Attributes:
        step: one step, like those that are watched.
        renew: starts it anew.
    """

    step: Callable[[], object]
    renew: Callable[[], object]


@dataclass
class Window:
    """One stretch of a soak; times are medians over its steps.

    Attributes:
        frames: heard since the beginning, at its end.
        age: a step in steps of the twin right after it, by CPU time; wall time on a GPU.
        ms: of a step, CPU time of its thread.
        wall_ms: of a step.
        resident: bytes of the process.
        cuda: bytes of tensors on the GPU; 0 without one.
    """

    frames: int
    age: float
    ms: float
    wall_ms: float
    resident: int
    cuda: int


@dataclass
class Watch:
    """Gathers the steps of a soak into windows.

    Attributes:
        device: of the model.
        twin: of the model.
        twin_every: steps from one of the twin's to its next.
        windows: so far.
        frames: heard so far.
        bad: what was no finite number, and when; empty if all were.
    """

    device: torch.device
    twin: Twin
    twin_every: int = 10
    windows: list[Window] = field(default_factory=list)
    frames: int = 0
    bad: list[str] = field(default_factory=list)
    _steps: list[tuple[float, ...]] = field(default_factory=list)
    _old: bool = False

    def add(self, began: tuple[float, float], rows: int = 1) -> None:
        """Count a step of `rows` rows, which began at those `clocks()` and ends now."""
        cpu, wall = self._since(began)
        age = float("nan")
        if len(self._steps) % self.twin_every == self.twin_every - 1:
            if self._old:
                self.twin.renew()
                self._old = False
            began = clocks()
            self.twin.step()
            young_cpu, young_wall = self._since(began)
            age = wall / young_wall if self.device.type == "cuda" else cpu / young_cpu
        self._steps.append((cpu, wall, rows, age))

    def _since(self, began: tuple[float, float]) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = clocks()
        return 1e3 * (now[0] - began[0]), 1e3 * (now[1] - began[1])

    def timed(self, step: Callable[..., R]) -> Callable[..., R]:
        """`Engine.step`, whose calls are counted."""

        def call(pcm: Any, mask: NDArray[np.bool_] | None = None) -> R:
            began = clocks()
            out = step(pcm, mask)
            self.add(began, 1 if mask is None else int(mask.sum()))
            return out

        return call

    def finite(self, what: str, *tensors: torch.Tensor) -> None:
        """Note it if one of the tensors is not finite."""
        if not all(bool(x.isfinite().all()) for x in tensors if x.is_floating_point()):
            self.bad.append(f"{what}, frame {self.frames}")

    def close_window(self) -> None:
        """End a window; only its steps of the most usual number of rows count."""
        steps, self._steps, self._old = np.array(self._steps), [], True
        usual = Counter(steps[:, 2]).most_common(1)[0][0]
        cpu, wall, _, age = steps[steps[:, 2] == usual].T
        cuda = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        age, cpu, wall = (_median(x) for x in (age[~np.isnan(age)], cpu, wall))
        self.windows.append(Window(self.frames, age, cpu, wall, resident_bytes(), cuda))

    def result(self) -> dict[str, Any]:
        """What was found, and which of the three promises it holds: flat, steady, finite.

        Raises:
            ValueError: fewer than three windows.
        """
        if len(self.windows) < 3:
            raise ValueError(f"{len(self.windows)} windows are too few to compare: 3 are needed")
        later, second, last = self.windows[1:], self.windows[1], self.windows[-1]
        grown = max(w.resident for w in later) / second.resident
        on_gpu = max(w.cuda for w in later) / max(second.cuda, 1)
        return {
            "frames": self.frames,
            "windows": [vars(w) for w in self.windows],
            "grown": max(grown, on_gpu),
            "slower": last.age / second.age,
            "bad": self.bad,
            "flat": max(grown, on_gpu) <= 1 + FLAT,
            "steady": last.age / second.age <= 1 + STEADY,
            "finite": not self.bad,
        }


def streamed_memories(lm: nn.Module) -> list[torch.Tensor]:
    """Every tensor of the memories of a stream; none without a memory."""
    if not isinstance(lm, HybridLMModel):
        return []
    live = [block._streaming_state for block in ttt_blocks(lm).values()]
    return [x for state in live if state is not None for _, x in named_tensors(state.memory)]
