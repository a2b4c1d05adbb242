"""Bytes that a forward keeps for its backward, and that the backward needs besides.

Of the base they are formulas: what moshi's code saves, tensor by tensor, at `N = rows * T` frames
and `w` bytes of a number; attention is the fused one, whose mask is a matrix in the compute dtype.
A memory's are counted by `finetune.traced`, whatever the family.
`tests/finetune/test_measured.py` holds all of it against measured bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from moshi.models.lm import LMModel
from moshi.modules.lora import LoRALinear
from moshi.modules.transformer import (
    LayerScale,
    RMSNorm,
    StreamingMultiheadAttention,
    StreamingTransformerLayer,
)
from torch import nn

from finetune.traced import Traced, trace
from moshi_ttt.hybrid import HybridStreamingTransformerLayer


@dataclass(frozen=True)
class Pass:
    """One forward and backward.

    Attributes:
        rows: of a micro-batch, B.
        frames: of a segment, T.
        dtype: that layers compute in.
        rank: of LoRA; 0 is none.
        full: whether the base is trained.
        embeddings: whether embeddings are trained.
        checkpointing: whether layers keep their inputs only.
        carry_kv: whether keys and values of the segments before stand in front.
    """

    rows: int
    frames: int
    dtype: torch.dtype
    rank: int
    full: bool
    embeddings: bool
    checkpointing: bool
    carry_kv: bool

    @property
    def width(self) -> int:
        """Bytes of a number in the compute dtype, w."""
        return self.dtype.itemsize

    @property
    def adapts(self) -> bool:
        """Whether every Linear learns, so that its input is kept."""
        return self.full or self.rank > 0


@dataclass(frozen=True)
class Activations:
    """Bytes of one segment of one micro-batch.

    Attributes:
        temporal: kept by the temporal transformer and its embeddings.
        depth: kept by the depformer.
        logits: kept by the loss, float32 log-probabilities of all cards.
        loss: needed besides all three when the loss is made and its backward begins.
        depth_layer: needed besides `temporal` and `depth` in one layer's backward, of the depformer
        temporal_layer: and, besides `temporal`, of the temporal transformer.
    """

    temporal: int
    depth: int
    logits: int
    loss: int
    depth_layer: int
    temporal_layer: int

    @property
    def kept(self) -> int:
        """Bytes kept when the forward is done."""
        return self.temporal + self.depth + self.logits

    @property
    def working(self) -> int:
        """Most bytes that the backward needs beyond what is kept."""
        later = self.temporal + max(self.temporal_layer, self.depth + self.depth_layer)
        return max(self.loss, later - self.kept)


def activations(lm: LMModel, run: Pass) -> Activations:
    """What a model, all that is trained put in, needs for one segment of one micro-batch."""
    layers = [_temporal(x) for x in lm.transformer.layers]
    memories = [isinstance(x, HybridStreamingTransformerLayer) for x in layers]
    N, w, d = run.rows * run.frames, run.width, lm.dim
    learns = run.adapts or run.embeddings
    first = 0 if learns else memories.index(True)
    shape = run.rows, run.frames
    bodies = [
        _layer(x, run, *shape, moving=run.embeddings or i > first)
        for i, x in list(enumerate(layers))[first:]
    ]
    inputs = w * d * N * len(bodies)
    temporal = inputs if run.checkpointing else sum(body.kept for body in bodies)
    temporal += _norm(lm.out_norm, N, d, run) + run.rank * w * N * (1 + lm.dep_q)
    if run.embeddings:
        temporal += 9 * N * (lm.num_codebooks + lm.dep_q)  # indices, and which are none
    temporal_layer = max(body.peak(run.checkpointing) for body in bodies)

    depth = depth_layer = 0
    text, audio = lm.text_linear.out_features, lm.dep_q * lm.card
    if lm.depformer is not None:
        steps = [_temporal(x) for x in lm.depformer.layers]
        head, flat = lm.linears[0], (N, lm.dep_q)
        assert isinstance(head, nn.Linear | LoRALinear)
        dd = head.in_features
        bodies = [_layer(x, run, *flat, moving=True) for x in steps]
        inputs = w * dd * N * lm.dep_q * len(steps)
        depth = inputs if run.checkpointing else sum(body.kept for body in bodies)
        if run.adapts:  # the heads' inputs
            depth += w * N * lm.dep_q * (dd + run.rank)
        depth_layer = max(body.peak(run.checkpointing) for body in bodies) + w * text * N
    logits = N * (4 * (text + audio) + 13 * (1 + lm.dep_q))
    wide = 4 if w < 4 else 0
    loss = N * max(w * (text + audio) + (w + wide) * audio, 8 * audio, w * audio + 8 * text)
    return Activations(temporal, depth, logits, loss, depth_layer, temporal_layer)


def _temporal(layer: nn.Module) -> StreamingTransformerLayer:
    assert isinstance(layer, StreamingTransformerLayer)
    return layer


def _norm(norm: nn.Module, n: int, d: int, run: Pass) -> int:
    """A norm and its output: RMSNorm keeps its input and the factor on it, both in its dtype."""
    own = run.width if not isinstance(norm, RMSNorm) or norm.dtype is None else 4
    kept = 2 * own if isinstance(norm, RMSNorm) else max(own, 4)
    return n * d * (kept + (run.width if run.adapts else 0))


def _hidden(layer: StreamingTransformerLayer) -> tuple[int, bool]:
    """Hidden width of the feed forward block, and whether it is gated."""
    gate = layer.gating
    if gate is None:
        return layer.linear1.out_features, False  # pyright: ignore[reportOptionalMemberAccess, reportReturnType]
    gate = gate[0] if isinstance(gate, nn.ModuleList) else gate
    return gate.linear_out.in_features, True  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]


def _keys(attention: StreamingMultiheadAttention, T: int, run: Pass) -> int:
    prefix = run.carry_kv and attention.context is not None
    return T + (attention.context or 1) - 1 if prefix else T


@dataclass(frozen=True)
class _Body:
    """One layer without checkpointing: what its parts keep, and what their backwards need."""

    attention: int
    memory: int
    feed: int
    attention_extra: int
    memory_extra: int
    feed_extra: int

    @property
    def kept(self) -> int:
        return self.attention + self.memory + self.feed

    def peak(self, again: bool) -> int:
        """Most bytes of its backward, which drops a part when it is through with it.

        Args:
            again: whether all of the layer is made first; else it is there already.
        """
        need = (
            self.kept + self.feed_extra,
            self.attention + self.memory + self.memory_extra,
            self.attention + self.attention_extra,
        )
        return max(need) if again else max(max(need) - self.kept, 0)


def _layer(
    layer: StreamingTransformerLayer, run: Pass, rows: int, T: int, *, moving: bool
) -> _Body:
    """A layer on `rows` of T frames; `moving` is whether its input has a gradient."""
    attention, w, n = layer.self_attn, run.width, rows * T
    d, heads, keys = attention.embed_dim, attention.num_heads, _keys(attention, T, run)
    kv = d // attention.kv_repeat
    attends = w * d * n  # its output
    if keys > T:
        attends += w * (d * n + 2 * kv * rows * keys)
    else:  # v is a part of the joint projection, q and k too if they are not rotated
        attends += w * n * (d + 2 * kv + (d + kv if attention.rope else 0))
    if attention.rope is not None:
        attends += 4 * (d // heads) * n
    mask = rows * T * _up(keys, 16)
    attends += 4 * heads * rows * _up(T, 32) + w * mask
    attends += _norm(layer.norm1, n, d, run) if moving else w * d * n
    attends += 2 * run.rank * w * n
    if not (moving or run.adapts):
        attends = 0  # nothing that learns is in it or before it
    hidden, gated = _hidden(layer)
    feeds = w * n * hidden * ((3 if gated else 1) + (1 if run.adapts else 0))
    feeds += _norm(layer.norm2, n, d, run) + 2 * run.rank * w * n
    if run.full:
        scales = (layer.layer_scale_1, layer.layer_scale_2)
        feeds += w * n * d * sum(isinstance(x, LayerScale) for x in scales)
    steps, memory = max(1, layer.weights_per_step), Traced(0, 0)
    if isinstance(layer, HybridStreamingTransformerLayer):
        attended = moving or run.adapts
        memory = trace(
            layer, rows, T, run.dtype, moving=moving, attended=attended, holds=run.adapts
        )
    return _Body(
        attends,
        memory.kept,
        feeds,
        max(6 * w * n * d, 10 * mask),  # int64 distances of positions, and booleans
        memory.extra,
        4 * w * n * hidden // steps + 2 * w * n * d,
    )


def _up(n: int, to: int) -> int:
    return -(-n // to) * to
