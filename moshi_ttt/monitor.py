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


class StreamMonitor:
    """Looks at a stream frame by frame, every so many frames.

    Attached before the first frame, so that what a frame notes is captured with it in a CUDA graph.
    A reading takes one period (the frames to the next write): a copy of the states at its start,
    the frames that follow from tensors that each frame writes in place. Then one layer is observed
    after each frame, so that no frame is held up by all of them.

    Args:
        model: streaming, all its memories with `persistent_states`.
        rows: B, of the stream.
        every: frames between readings, at least.

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
        self._every, self._due = every, 0
        self._left: int | None = None
        self._before: dict[str, MemoryState] = {}
        self._taken: dict[str, tuple[Tensor, Tensor]] = {}
        self._values: dict[str, Values] = {}
        self._after, self._at = torch.zeros(0), 0
        self._attached = ExitStack()
        self._attached.enter_context(_watching(self._layers, self._watches))

    def detach(self) -> None:
        """Look no more."""
        self._attached.close()

    def _state(self, name: str) -> MemoryState:
        streaming = self._layers[name].seq_modeling_block._streaming_state
        assert streaming is not None
        return streaming.memory

    @torch.no_grad()
    def frame(self, at: int) -> Reading | None:
        """After every frame of the stream, the `at`-th, outside of any graph: a reading, if done.

        Rows that did not take every frame of the period (paused, reset, loaded) are left out; a
        reading without any row is NaN.
        """
        first = next(iter(self._layers))
        if self._taken:
            return self._observe_one()
        if self._left is None:
            places = self._watches[first].x.shape[1]
            if at >= self._due and int(self._state(first).fast.pos[0]) % places == 0:
                self._before = {
                    n: map_tensors(lambda t: t.clone(), self._state(n)) for n in self._layers
                }
                self._left, self._due = places, at + self._every
            return None
        self._left -= 1
        if self._left == 0:
            self._taken = {n: w.since(self._before[n].fast.pos) for n, w in self._watches.items()}
            self._after = self._state(first).fast.pos.clone()
            self._left, self._at, self._values = None, at, {}
        return None

    def _observe_one(self) -> Reading | None:
        name = next(iter(self._taken))
        (x, sizes), layer = self._taken.pop(name), self._layers[name]
        before, block = self._before.pop(name), layer.seq_modeling_block
        all_of_it = self._after == before.fast.pos + x.shape[1]
        lengths = torch.where(all_of_it, x.shape[1], 0)
        found = observe(block.memory, x, before, layer.shared(x), lengths)
        found |= observe_gate(block.gate)
        for key, size in zip(("attention", "memory"), sizes.unbind(-1), strict=True):
            found[key] = torch.where(all_of_it, size.mean(1), torch.nan).nanmean()
        self._values[name] = plain(found)
        return None if self._taken else Reading(self._at, self._values)


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
