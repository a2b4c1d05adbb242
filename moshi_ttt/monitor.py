"""A window into the memories of a model: readings of what they are doing, now and then.

A `CallMonitor` looks at one call of a model, in training or in a stream that takes several frames a
call. A `StreamMonitor` looks at a stream that goes frame by frame. Neither changes an output, by a
bit, nor writes a state, and once detached nothing of it is left.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from moshi.models.lm import LMModel
from torch import Tensor, nn

from moshi_ttt.hybrid import HybridStreamingTransformerLayer
from moshi_ttt.lanes import map_tensors
from moshi_ttt.memory.base import MemoryState
from moshi_ttt.observe import StreamWatch, Watch, observe, observe_gate

Values = dict[str, "list[float] | float"]
"""Name -> a number a head, or one of the layer; see `moshi_ttt.observe`."""


class Reading(NamedTuple):
    """What all memories were doing at a moment.

    Attributes:
        at: steps of a training, or frames of a stream.
        layers: layer name, e.g. `transformer.layers.3` -> its values.
    """

    at: int
    layers: dict[str, Values]


def watched_layers(model: nn.Module) -> dict[str, HybridStreamingTransformerLayer]:
    """The layers of a model that have a memory, by name; none in a stock one."""
    found = model.named_modules()
    return {n: m for n, m in found if isinstance(m, HybridStreamingTransformerLayer)}


def keeps_state(model: nn.Module) -> bool:
    """Whether a model has memories that keep a state, so that a stream can be monitored."""
    blocks = [layer.seq_modeling_block for layer in watched_layers(model).values()]
    return bool(blocks) and all(block.config.persistent_states for block in blocks)


@contextmanager
def _watching(
    layers: Mapping[str, HybridStreamingTransformerLayer], watches: Mapping[str, Watch]
) -> Iterator[None]:
    """Inside, each layer's block tells its watch.

    Raises:
        ValueError: another monitor is there already.
    """
    with ExitStack() as stack:
        for name, layer in layers.items():
            block, watch = layer.seq_modeling_block, watches[name]
            if block.watch is not None:
                raise ValueError(f"{name} has a monitor already: detach that one first")
            block.watch = watch
            stack.callback(setattr, block, "watch", None)
            stack.callback(layer.layer_scale_1.register_forward_hook(watch.attention).remove)
        yield


class CallMonitor:
    """Looks at single calls of a model.

    In training, a call's first micro-batch and segment count, and not its recompute. Under FSDP
    each rank looks at its own rows, with the weights that its forward has gathered: nothing is
    communicated, and a rank may look alone.

    Args:
        model: with memories, or nothing will be seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = watched_layers(model)
        self._watches: dict[str, Watch] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the first call is noted, and after every `arm` the next one."""
        blocks = {n: layer.seq_modeling_block for n, layer in self._layers.items()}
        self._watches = {n: Watch(block.memory) for n, block in blocks.items()}
        with _watching(self._layers, self._watches):
            yield

    def arm(self) -> None:
        """Let the next call be noted."""
        for watch in self._watches.values():
            watch.arm()

    def reading(self, at: int) -> Reading:
        """What the last call noted has shown; waits for the device.

        A memory that took no part (`active` False) is left out.
        """
        found = {name: watch.found for name, watch in self._watches.items()}
        return Reading(at, {name: plain(values) for name, values in found.items() if values})


@dataclass
class _Look:
    """One row's reading in the making.

    Attributes:
        before: layer name -> the row's state at the start of the period.
        frames: what the row's memories read in it and what was said, once it is over.
        values: of the layers that have been observed.
    """

    before: dict[str, MemoryState]
    start: int
    at: int = 0
    frames: dict[str, tuple[Tensor, Tensor]] | None = None
    values: dict[str, Values] = field(default_factory=dict)


class StreamMonitor:
    """Looks at a stream frame by frame, at each row every so many frames.

    Attached before the first frame, so that what a frame notes is captured with it in a CUDA graph.
    A row's reading takes one period (its frames from a write to the next): a copy of its states at
    the start, the frames that follow from tensors that each frame writes in place. Then, after each
    frame of the stream, one layer of one row is observed, so that no frame is held up by more,
    however many rows there are.

    Args:
        model: streaming, all its memories with `persistent_states`.
        rows: B, of the stream.
        every: frames between readings of a row, at least.

    Raises:
        ValueError: the model has no memory that keeps a state, or another monitor.
    """

    def __init__(self, model: LMModel, rows: int, every: int) -> None:
        self._layers = watched_layers(model)
        if not keeps_state(model):
            raise ValueError("the model has no memory that keeps a state: nothing to monitor")
        self._watches = {
            name: StreamWatch(layer.seq_modeling_block.memory, rows, model.dtype)
            for name, layer in self._layers.items()
        }
        self._first = next(iter(self._layers))
        self._every, self._due = every, [0] * rows
        self._looks: dict[int, _Look] = {}  # by row, in the order in which they began
        self._attached = ExitStack()
        self._attached.enter_context(_watching(self._layers, self._watches))

    def detach(self) -> None:
        """Look no more."""
        self._attached.close()

    def forget(self, mask: Tensor) -> None:
        """Rows `[B]` whose states have been replaced: their readings begin anew, and at once."""
        for row in mask.nonzero().flatten().tolist():
            self._looks.pop(row, None)
            self._due[row] = 0

    def _state(self, name: str) -> MemoryState:
        streaming = self._layers[name].seq_modeling_block._streaming_state
        assert streaming is not None
        return streaming.memory

    @torch.no_grad()
    def frame(self, at: int) -> list[Reading | None]:
        """After every frame of the stream, the `at`-th, outside of any graph.

        Returns:
            For each row its reading, if one is done. A paused row's waits until it goes on.
        """
        found: list[Reading | None] = [None] * len(self._due)
        for row, look in self._looks.items():
            if look.frames is not None:
                found[row] = self._observe_one(row, look)
                break
        places = self._watches[self._first].x.shape[1]
        for row, pos in enumerate(self._state(self._first).fast.pos.tolist()):
            look = self._looks.get(row)
            if look is None:
                if at >= self._due[row] and pos % places == 0:
                    before = {n: _row(self._state(n), row) for n in self._layers}
                    self._looks[row] = _Look(before, pos)
                    self._due[row] = at + self._every
            elif look.frames is None and pos == look.start + places:
                # a memory that has started over stands elsewhere than the first
                starts = {n: int(state.fast.pos) for n, state in look.before.items()}
                watches = self._watches.items()
                look.frames, look.at = {n: w.period_from(row, starts[n]) for n, w in watches}, at
        if done := [row for row, reading in enumerate(found) if reading is not None]:
            del self._looks[done[0]]
        return found

    def _observe_one(self, row: int, look: _Look) -> Reading | None:
        assert look.frames is not None
        name = next(iter(look.frames))
        (x, sizes), block = look.frames.pop(name), self._layers[name].seq_modeling_block
        found = observe(block.memory, x, look.before.pop(name), self._layers[name].shared(x))
        found |= observe_gate(block.gate)
        for key, size in zip(("attention", "memory"), sizes.unbind(-1), strict=True):
            found[key] = size.mean()
        look.values[name] = plain(found)
        return None if look.frames else Reading(look.at, look.values)


def _row(state: MemoryState, row: int) -> MemoryState:
    return map_tensors(lambda t: t[row : row + 1].clone(), state)


def plain(values: Mapping[str, Tensor]) -> Values:
    """Numbers of Python; waits for the device."""
    return {name: value.tolist() for name, value in values.items()}


def to_json(reading: Reading, unit: str) -> dict[str, Any]:
    """A reading as plain JSON values; `unit` is the key of `at`.

    NaN, which is nothing to look at, becomes null, and infinity the largest float.
    """

    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(part) for part in value]
        return None if math.isnan(value) else min(value, sys.float_info.max)

    layers = {n: {k: clean(v) for k, v in vs.items()} for n, vs in reading.layers.items()}
    return {unit: reading.at, "layers": layers}


def from_json(line: Mapping[str, Any], unit: str) -> Reading:
    """What `to_json` gave, null as NaN."""

    def number(value: Any) -> Any:
        if isinstance(value, list):
            return [number(part) for part in value]
        return math.nan if value is None else value

    layers = {n: {k: number(v) for k, v in vs.items()} for n, vs in line["layers"].items()}
    return Reading(line[unit], layers)
