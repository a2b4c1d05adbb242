"""Attention that goes on from one training segment to the next: an explicit prefix of keys.

moshi's ring is written in place, which a backward over two segments forbids; here the keys and
values of a lane enter and leave a layer as values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from moshi.modules.transformer import (
    KVCacheResult,
    StreamingMultiheadAttention,
    StreamingTransformerLayer,
)
from moshi.utils.compile import no_compile
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moshi_ttt.lanes import HasLanes
from moshi_ttt.memory.base import MemoryState


class KV(NamedTuple):
    """What a layer's attention has seen of a lane.

    Attributes:
        k: [B, H, context - 1, D] the last keys, rotated; zeros before a row's start.
        v: values, likewise.
        pos: [B] int64, frames since the row's start.
    """

    k: Tensor
    v: Tensor
    pos: Tensor


class Carried(NamedTuple):
    """What enters a layer with a segment, or leaves it; None is what the layer does not carry.

    Attributes:
        kv: keys and values of the segments before.
        memory: the memory's state.
        fresh: [B] bool, rows whose memory starts from W0.
    """

    kv: KV | None
    memory: MemoryState | None
    fresh: Tensor | None


class CarryingLayer(StreamingTransformerLayer, HasLanes):
    """A StreamingTransformerLayer whose attention can go on from segment to segment.

    With lanes (`carry_kv`, `attach_lanes`) the last `context - 1` keys and values of a lane stand
    in front of a segment's own, positions going on: training then sees what a stream sees. Without,
    attention starts empty at every call, as in moshi.
    """

    carries_kv = False

    @property
    def carries(self) -> bool:
        """Whether `carry_kv` asked for it."""
        return self.carries_kv

    def lane_value(self) -> KV:
        """Keys and values of one row, all zero."""
        return self._no_kv(1, next(self.parameters()))

    def _no_kv(self, rows: int, like: Tensor) -> KV:
        attention = self.self_attn
        assert attention.context is not None
        heads = attention.num_heads // attention.kv_repeat
        shape = rows, heads, attention.context - 1, attention.embed_dim // attention.num_heads
        zeros = torch.zeros(shape, dtype=like.dtype, device=like.device)
        return KV(zeros, zeros, torch.zeros(rows, dtype=torch.int64, device=like.device))

    def forward(
        self, x: Tensor, cross_attention_src: Tensor | None = None, *, recompute: bool = False
    ) -> Tensor:
        """[B, T, width] -> [B, T, width]; moves the stream's or the lanes' state on.

        With `recompute` only inputs are kept for the backward. What is carried enters the
        recomputed function as an argument: read from an attribute, a recompute would see the state
        of a later call, and the gradient would be silently wrong.
        """
        if self.is_streaming:
            x, _ = self._body(x, cross_attention_src, None)
            streaming = self._streaming_state
            assert streaming is not None
            streaming.offset_cpu += x.shape[1]
            return x
        carried = self._enter(x)
        if recompute:
            out = checkpoint(
                self._body, x, cross_attention_src, carried,
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
            assert out is not None
            x, after = out
        else:
            x, after = self._body(x, cross_attention_src, carried)
        self._leave(after)
        return x

    def _enter(self, x: Tensor) -> Carried:
        if self._lanes is None:
            return Carried(None, None, None)
        kv, fresh = self._lanes.enter(x.shape[0])
        if kv is None:
            kv = self._no_kv(x.shape[0], x)
        if bool(fresh.any()):  # asked on the host: a copy of all keys at every segment costs more
            rows = fresh.view(-1, 1, 1, 1)  # zeros: a masked number that is none would still be one
            k, v = torch.where(rows, 0, kv.k), torch.where(rows, 0, kv.v)
            kv = KV(k, v, torch.where(fresh, 0, kv.pos))
        return Carried(kv, None, None)

    def _leave(self, after: Carried) -> None:
        if self._lanes is not None:
            self._lanes.leave(after.kv)

    def _body(
        self, x: Tensor, cross_attention_src: Tensor | None, carried: Carried | None
    ) -> tuple[Tensor, Carried]:
        """The layer as a function; without `carried` it is a stream's."""
        kv = None
        with ExitStack() as stack:
            if x.device.type != "cuda":
                stack.enter_context(no_compile())
            normed = self.norm1(x)
            if carried is None or carried.kv is None:
                update = self.self_attn(normed, normed, normed)
            else:
                with _prefixed(self.self_attn, carried.kv) as prefix:
                    update = self.self_attn(normed, normed, normed)
                kv = prefix.after
            h = x.to(update) + self.layer_scale_1(update)
            y, memory = self._remember(h, normed, carried)
            if self.cross_attention is not None:
                assert cross_attention_src is not None
                y = self._cross_attention_block(y, cross_attention_src)
            return self._ff_block(y), Carried(kv, memory, None)

    def _remember(
        self, h: Tensor, normed: Tensor, carried: Carried | None
    ) -> tuple[Tensor, MemoryState | None]:
        return h, None


class _Prefix:
    """Stands in for moshi's streaming state while an attention reads one segment.

    Attention asks it for keys, values and positions, and moves `offset` in place; one is made for
    every call, so that a recompute starts where its forward did.
    """

    def __init__(self, kv: KV) -> None:
        self.kv = self.after = kv
        self.offset, self.offset_cpu = kv.pos.clone(), 0
        self.exec_mask = torch.ones_like(kv.pos, dtype=torch.bool)

    @property
    def kv_cache(self) -> _Prefix:
        """Itself; as an attribute it would be a cycle, and keep its keys until a collection."""
        return self

    def complete(self, k: Tensor, v: Tensor, exec_mask: Tensor) -> KVCacheResult:
        """The prefix in front of a segment's own; a position below 0 is masked by attention."""
        frames, pos = k.shape[2], self.kv.pos
        keys, values = torch.cat([self.kv.k.to(k), k], 2), torch.cat([self.kv.v.to(v), v], 2)
        steps = torch.arange(-self.kv.k.shape[2], frames, device=pos.device)
        self.after = KV(
            keys[:, :, frames:].contiguous(), values[:, :, frames:].contiguous(), pos + frames
        )
        return KVCacheResult(keys, values, pos.view(-1, 1) + steps)


@contextmanager
def _prefixed(attention: StreamingMultiheadAttention, kv: KV) -> Iterator[_Prefix]:
    prefix = _Prefix(kv)
    attention._streaming_state = prefix  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield prefix
    finally:
        attention._streaming_state = None


def kv_bytes(layer: CarryingLayer) -> int:
    """Bytes of the keys and values that a layer carries for one lane."""
    kv = layer.lane_value()
    return kv.k.nbytes + kv.v.nbytes
