"""A frame in its parts, of models in turn: what `eval.bench.frame` measures."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor
from torch import nn

from eval.bench.gpu_model import clean, synchronise
from eval.bench.gpu_train import out_of_memory
from moshi_ttt.engine import Engine
from moshi_ttt.frame_times import FRAME_MS

PARTS = ("frame", "encode", "LM", "temporal", "depformer", "decode")
"""A whole frame, and what it is made of; temporal transformer and depformer are parts of the LM's
step, the rest of which is drawing tokens and keeping them."""
TURN = 16
"""Frames until it is the next model's turn: a chunk, so that each has one write in it."""
FITS = 95
"""The percentile of a frame's time that has to be within 80 ms."""

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Models:
    """What is compared.

    Attributes:
        lms: by name; they share what they have in common.
        mimis: a codec for each, with the same weights.
        tokenizer: of the text.
        name: of what was loaded, for people.
    """

    lms: Mapping[str, LMModel]
    mimis: Mapping[str, MimiModel]
    tokenizer: SentencePieceProcessor
    name: str

    def engine(self, name: str, rows: int) -> Engine:
        """One of them, streaming."""
        return Engine(self.lms[name], self.mimis[name], self.tokenizer, rows=rows, seed=0)


def sharing(module: Module) -> Module:
    """A second module with the same parameters and buffers: another stream at the same time."""
    shared = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})


@dataclass
class Clock:
    """Times of the parts of every frame: CPU time of this thread and wall time, or a GPU's.

    Attributes:
        device: of the model.
        cpu: part -> ms of each call; empty on a GPU, whose CPU only waits.
        wall: likewise; on a GPU between events in its stream, so that nothing waits for the clock.
    """

    device: torch.device
    cpu: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PARTS})
    wall: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PARTS})
    _events: list[tuple[str, Any, Any]] = field(default_factory=list)

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, whose calls are times of a part; those of a whole frame end on the host."""

        def on_host(*args: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            out = call(*args)
            cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
            self.wall[part].append(1e3 * wall)
            if self.device.type != "cuda":
                self.cpu[part].append(1e3 * cpu)
            return out

        def on_gpu(*args: Any) -> Any:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            out = call(*args)
            end.record()
            self._events.append((part, begin, end))
            return out

        return on_gpu if self.device.type == "cuda" and part != "frame" else on_host

    def drop_last(self) -> None:
        """Forget the last frame."""
        self.read()
        for times in (*self.cpu.values(), *self.wall.values()):
            del times[-1:]

    def read(self) -> None:
        """Look the GPU's events up; they are over."""
        synchronise(self.device)
        for part, begin, end in self._events:
            self.wall[part].append(begin.elapsed_time(end))
        self._events.clear()


@contextmanager
def clocked(engine: Engine) -> Iterator[tuple[Clock, Callable[..., Any]]]:
    """An engine's clock, and its `step`, which it times; the engine's models are as they were."""
    clock, state = Clock(engine.device), engine.gen._streaming_state
    assert state is not None
    state.graphed_main = clock.timed("temporal", state.graphed_main)  # pyright: ignore
    state.graphed_depth = clock.timed("depformer", state.graphed_depth)  # pyright: ignore
    engine.gen.step = clock.timed("LM", engine.gen.step)
    mimi = engine.mimi
    mimi.encode, mimi.decode = (
        clock.timed(name, getattr(mimi, name)) for name in ("encode", "decode")
    )
    try:
        yield clock, clock.timed("frame", engine.step)
    finally:
        del mimi.encode, mimi.decode
        clock.read()


def in_turn(models: Models, rows: int, frames: int) -> dict[str, Clock]:
    """Times of at least `frames` frames of every model, `TURN` by turn.

    On a GPU all frames of one, then of the next: it has no other work, and room for one engine.
    Of a turn the first frame is not counted: it finds the other model's weights in the caches.

    Returns:
        Model -> its clock, `TURN - 1` times a turn.
    """
    device = next(iter(models.lms.values())).device
    noise = torch.randn(TURN, rows, 1, 1920, generator=torch.Generator().manual_seed(0))
    groups = [[name] for name in models.lms] if device.type == "cuda" else [list(models.lms)]
    clocks: dict[str, Clock] = {}
    for group in groups:
        clean(device)
        with ExitStack() as stack:
            steps: dict[str, Callable[..., Any]] = {}
            for name in group:
                engine = stack.enter_context(models.engine(name, rows))
                clocks[name], steps[name] = stack.enter_context(clocked(engine))
            for turn in range(1 + -(-frames // (TURN - 1))):
                for name, step in steps.items():
                    for i, pcm in enumerate(0.1 * noise):
                        step(pcm)
                        if turn == 0 or i == 0:
                            clocks[name].drop_last()
    return clocks


def fits(models: Models, name: str, rows: int, frames: int, kind: str) -> bool:
    """Whether so many sessions get their frames in time, `FITS` of a hundred, by that clock."""
    alone = replace(models, lms={name: models.lms[name]})
    try:
        (clock,) = in_turn(alone, rows, frames).values()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return False
    return float(np.percentile(getattr(clock, kind)["frame"], FITS)) <= FRAME_MS


def ratios(clocks: Mapping[str, Clock], part: str, of: str, to: str) -> NDArray[np.float64]:
    """Of each turn, a part's mean time in one model over that in the other."""
    means = []
    for name in (of, to):
        cpu = clocks[name].cpu[part]
        times = np.array(cpu or clocks[name].wall[part])
        means.append(times.reshape(-1, TURN - 1).mean(1))
    return means[0] / means[1]
