"""Bytes that a memory keeps for its backward, and that its backward needs: counted, not estimated.

A memory's forward and backward run once where nothing is stored: on the meta device every tensor
has its shape and no numbers, so the bytes are those of any device, and it takes no time to speak
of. Nothing here knows a family; one that cannot run there raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from moshi.utils.compile import no_compile
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from finetune.live_bytes import LiveBytes, tensors_in
from moshi_ttt.carry import Carried
from moshi_ttt.hybrid import HybridStreamingTransformerLayer

META, _FLOAT = torch.device("meta"), torch.float32
_traced: dict[Any, Traced] = {}
"""What was counted in this process: all layers of a model ask the same."""


@dataclass(frozen=True)
class Traced:
    """Bytes of a memory on a segment.

    Attributes:
        kept: when its forward is done.
        extra: that its backward needs at most, besides.
    """

    kept: int
    extra: int


def trace(
    layer: HybridStreamingTransformerLayer,
    rows: int,
    frames: int,
    dtype: torch.dtype,
    *,
    moving: bool,
    attended: bool,
    holds: bool,
) -> Traced:
    """What a layer's memory takes in the middle of a run.

    Rows stand at different places of a chunk, if segments of this length bring them there. More
    than two are counted as so many times two, as all that grows grows with them. Gradients of
    parameters are there already and are not counted, nor is the state, before it and after it.

    Args:
        layer: its parameters may be anywhere; of them only those that are trained have gradients.
        rows: of a micro-batch.
        frames: of a segment.
        dtype: that the layer computes in.
        moving: whether a gradient goes to the layer's first norm.
        attended: whether one goes to attention's output.
        holds: whether attention keeps its input, so that it is not the memory's to count.
    """
    block, few = layer.seq_modeling_block, 1 if rows < 2 else 2
    parts = (*block.named_parameters(), *layer.self_attn.named_parameters())
    about = tuple((n, p.shape, p.dtype, p.requires_grad) for n, p in parts)
    run = few, frames, dtype, moving, attended, holds
    key = (block.config, type(block.norm), about, run)
    if key not in _traced:
        _traced[key] = _trace(_on_meta(layer), *run)
    found = _traced[key]
    return Traced(found.kept * rows // few, found.extra * rows // few)


def _trace(
    layer: HybridStreamingTransformerLayer,
    rows: int,
    frames: int,
    dtype: torch.dtype,
    moving: bool,
    attended: bool,
    holds: bool,
) -> Traced:
    shape = rows, frames, layer.self_attn.embed_dim
    normed, h = (
        torch.empty(shape, dtype=dtype, device=META, requires_grad=x) for x in (moving, attended)
    )
    carried = carried_by(layer, rows, frames)
    with _Shapes() as live, no_compile(), torch.enable_grad():
        y = layer._remember(h.clone(), normed if holds else normed.clone(), carried)[0]
        out = y.nbytes  # in hand here, but not the memory's
        kept = live.peak = live.now
        y.backward(torch.empty_like(y))
    return Traced(kept - out, live.peak - kept)


def _on_meta(layer: HybridStreamingTransformerLayer) -> HybridStreamingTransformerLayer:
    """A copy whose parameters hold nothing, with their gradients."""
    memo: dict[int, Any] = {}
    for p in layer.parameters():
        memo[id(p)] = new = nn.Parameter(torch.empty_like(p, device=META), p.requires_grad)
        new.grad = torch.empty_like(new) if p.requires_grad else None
    return deepcopy(layer, memo)


def carried_by(layer: HybridStreamingTransformerLayer, rows: int, frames: int) -> Carried:
    """What enters a layer's memory in the middle of a run: one row began with this segment.

    The place in a chunk where the others stand is the last one that segments of so many frames
    lead to: from there a segment touches the most chunks.
    """
    block = layer.seq_modeling_block
    if not block.carries:
        return Carried(None, None, None)
    with torch.no_grad():
        state = block.memory.init_state(rows)
    C, pos = block.config.chunk_size, torch.zeros(rows, dtype=torch.int64, device="cpu")
    if block.config.state_passing:
        pos[: max(1, rows - 1)] = C - math.gcd(frames, C)
    state = state._replace(fast=state.fast._replace(pos=pos))
    return Carried(None, state, torch.zeros(rows, dtype=torch.bool, device="cpu"))


class _Shapes(LiveBytes):
    """Numbers are on the meta device; whole numbers are not, as positions are read on the host.

    What comes out of an operation is worked out once for arguments of a shape: most of these
    operations are Python, and a segment has thousands of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[Any, list[Any] | None] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = list(tensors_in((*args, *kwargs.values())))
        if func is torch.ops.aten._local_scalar_dense.default and given[0].is_meta:
            return 1.0
        if any(x.is_meta for x in given):
            if not all(x.is_meta or x.dim() == 0 for x in given):
                args, kwargs = tree_map(_to_meta, (args, kwargs))
            func = partial(self._shaped, func)
        elif kwargs.get("device") == META and not kwargs.get("dtype", _FLOAT).is_floating_point:
            kwargs = {**kwargs, "device": "cpu"}
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _shaped(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = list(tensors_in((*args, *kwargs.values())))
        key = (func, _described(args), _described(tuple(kwargs.items())))
        if key not in self._known:
            out = func(*args, **kwargs)
            self._known[key] = _made(out if isinstance(out, tuple | list) else [out], given)
        made = self._known[key]
        if made is None:  # a view
            return func(*args, **kwargs)
        out = [given[x] if isinstance(x, int) else x and x() for x in made]
        return out[0] if len(out) == 1 else tuple(out)


def _made(out: Sequence[Any], given: list[Tensor]) -> list[Any] | None:
    """How to make an operation's results again: which argument it is, or a new tensor, or None.

    None in place of the list: one of them shares the storage of an argument.
    """
    made: list[Any] = []
    there = {x.untyped_storage()._cdata for x in given}
    for x in out:
        same = [i for i, y in enumerate(given) if y is x]
        if same or x is None:
            made.append(same[0] if same else None)
        elif x.untyped_storage()._cdata in there:
            return None
        else:
            made.append(
                partial(torch.empty_strided, x.shape, x.stride(), dtype=x.dtype, device=META)
            )
    return made


def _described(x: Any) -> Any:
    """All that an operation's results may depend on, where numbers are not there."""
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype
    return tuple(map(_described, x)) if isinstance(x, tuple | list) else (type(x), x)


def _to_meta(x: Any) -> Any:
    return torch.empty_like(x, device=META) if isinstance(x, Tensor) and x.dim() else x
