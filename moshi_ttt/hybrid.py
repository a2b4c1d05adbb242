"""A memory in moshi's temporal transformer: the one place that knows moshi's layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.modules.streaming import StreamingModule
from moshi.modules.transformer import (
    LayerNormF32,
    RMSNorm,
    StreamingTransformer,
    StreamingTransformerLayer,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moshi_ttt import states
from moshi_ttt.block import HybridSeqModelingBlock
from moshi_ttt.carry import Carried, CarryingLayer, kv_bytes
from moshi_ttt.config import TTTConfig
from moshi_ttt.memory.base import MemoryState, Shared

BLOCK = "seq_modeling_block"


class _KeepsStates(nn.Module):
    """The functions of `moshi_ttt.states` as methods."""

    def save_ttt_states(self) -> states.TTTStates:
        """See `moshi_ttt.states.save_ttt_states`."""
        return states.save_ttt_states(self)

    def restore_ttt_states(self, saved: states.TTTStates) -> None:
        """See `moshi_ttt.states.restore_ttt_states`."""
        states.restore_ttt_states(self, saved)

    def preserved_ttt_states(self) -> AbstractContextManager[None]:
        """See `moshi_ttt.states.preserved_ttt_states`."""
        return states.preserved_ttt_states(self)

    def reset_ttt_states(self, mask: Tensor | None = None) -> None:
        """See `moshi_ttt.states.reset_ttt_states`."""
        states.reset_ttt_states(self, mask)


class HybridStreamingTransformerLayer(CarryingLayer, _KeepsStates):
    """A StreamingTransformerLayer that also has a memory.

        h = x + layer_scale_1(attn(norm1(x)))                        the stock layer's, to the bit
        y = h + tanh(gate) * memory(norm1(x))                        placement "parallel"
        y = h + tanh(gate) * memory(norm(h))                         placement "after_attention"

    then the stock feed forward block. Made by `splice` only.
    """

    seq_modeling_block: HybridSeqModelingBlock

    def _enter(self, x: Tensor) -> Carried:
        carried, lanes = super()._enter(x), self.seq_modeling_block._lanes
        if lanes is None:
            return carried
        memory, fresh = lanes.enter(x.shape[0])
        return carried._replace(memory=memory, fresh=fresh)

    def _leave(self, after: Carried) -> None:
        super()._leave(after)
        lanes = self.seq_modeling_block._lanes
        if lanes is not None and self.seq_modeling_block.active:
            lanes.leave(after.memory)

    def _remember(
        self, h: Tensor, normed: Tensor, carried: Carried | None
    ) -> tuple[Tensor, MemoryState | None]:
        block, state = self.seq_modeling_block, None
        if not block.active:
            return h, None
        read = normed if block.norm is None else block.norm(h)
        shared = self.shared(read)
        if carried is None:
            remembered = block.stream(read, shared)
        else:
            remembered, state = block(read, carried.memory, carried.fresh, shared)
        return h + remembered.to(h.dtype), state

    def shared(self, read: Tensor) -> Shared | None:
        """The attention's part for frames `[B, T, width]`, with `projection: shared`, else None."""
        if self.seq_modeling_block.config.projection != "shared":
            return None
        # projected again, not caught on its way into attention: also right after attention
        (into,), (out,) = self.self_attn.in_projs, self.self_attn.out_projs
        return Shared(into(read), out)


class HybridStreamingTransformer(StreamingTransformer, _KeepsStates):
    """moshi's temporal transformer whose gradient checkpointing passes states as values."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        if not self.checkpointing or self.is_streaming or not torch.is_grad_enabled():
            return self._forward_stock(x, *args, **kwargs)
        dtype = x.dtype
        for layer in self.layers:
            if isinstance(layer, CarryingLayer):
                x = layer(x, *args, recompute=True, **kwargs)
            else:
                y = checkpoint(layer, x, *args, use_reentrant=False, **kwargs)
                assert isinstance(y, Tensor)
                x = y
        return x.to(dtype)

    def _forward_stock(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Without gradients there is nothing to recompute, but moshi would checkpoint all the same.
        wanted, self.checkpointing = self.checkpointing, False
        try:
            return super().forward(x, *args, **kwargs)
        finally:
            self.checkpointing = wanted


class HybridLMModel(LMModel, _KeepsStates):
    """An LMModel some of whose temporal layers have a memory. Made by `splice` only."""

    ttt_config: TTTConfig


@dataclass(frozen=True)
class Spliced:
    """What `splice` did.

    Attributes:
        layers: indices of the layers that now have a memory.
        parameters: number of slow-weight parameters added.
        config: the configuration used.
    """

    layers: list[int]
    parameters: int
    config: TTTConfig


_OURS = (CarryingLayer, HybridStreamingTransformerLayer)


def splice(lm: LMModel, config: TTTConfig) -> Spliced:
    """Put a memory into the layers of `lm` that `config` names; gates start at 0.

    The base model is not altered: its modules and keys stay where they are, the only new keys are
    under `transformer.layers.{i}.seq_modeling_block`, and with the gates at 0 its outputs are
    those of stock Moshi to the bit. Splice after LoRA, so that LoRA does not wrap the memory.

    Args:
        lm: a loaded moshi LMModel, not streaming.
        config: what goes where.

    Returns:
        What was done.

    Raises:
        ValueError: already spliced, quantised, streaming, no layer matched, a layer that is not
            moshi's own, heads that do not divide the width, or a LaCT's chunk longer than
            attention sees. `lm` is as it was.
    """
    if isinstance(lm, HybridLMModel):
        raise ValueError("the model already has a memory: unsplice it first")
    for name, module in lm.named_modules():
        if isinstance(module, StreamingModule) and module.is_streaming:
            raise ValueError(f"{name or 'the model'} is streaming: splice before streaming starts")
    transformer = lm.transformer
    if transformer.positional_embedding not in {"rope", "rope_concat", "none"}:
        raise ValueError(
            f"positional embedding {transformer.positional_embedding!r} is not supported"
        )
    indices = config.layer_indices(len(transformer.layers))
    blocks: dict[int, HybridSeqModelingBlock] = {}
    for i in indices:
        layer = transformer.layers[i]
        if type(layer) is not StreamingTransformerLayer or layer.skip_self_attn:
            raise ValueError(f"layer {i} is a {type(layer).__name__} without the stock attention")
        blocks[i] = _build_block(layer, config, i)
    for i, block in blocks.items():
        layer = transformer.layers[i]
        layer.__class__ = HybridStreamingTransformerLayer
        layer.add_module(BLOCK, block)
        block.train(layer.training)
    transformer.__class__ = HybridStreamingTransformer
    lm.__class__ = HybridLMModel
    object.__setattr__(lm, "ttt_config", config)
    _forget_streaming_children(lm)
    added = sum(p.numel() for block in blocks.values() for p in block.parameters())
    return Spliced(indices, added, config)


def unsplice(lm: LMModel) -> None:
    """Take the memories out again; what is left is stock Moshi, modules and classes alike.

    Raises:
        ValueError: `lm` has no memory, or is streaming.
    """
    if not isinstance(lm, HybridLMModel):
        raise ValueError("the model has no memory to take out")
    if lm.is_streaming or lm.transformer.is_streaming:
        raise ValueError("the model is streaming: unsplice after streaming ended")
    stop_carrying_kv(lm)
    for layer in hybrid_layers(lm):
        delattr(layer, BLOCK)
        layer.__class__ = StreamingTransformerLayer  # pyright: ignore[reportAttributeAccessIssue]
    lm.transformer.__class__ = StreamingTransformer
    lm.__class__ = LMModel  # pyright: ignore[reportAttributeAccessIssue]
    del lm.ttt_config
    _forget_streaming_children(lm)


def carry_kv(lm: LMModel) -> int:
    """Let the attention of every temporal layer go on from one training segment to the next.

    Lanes attached afterwards (`attach_lanes`) hold each layer's last `context - 1` keys and values.
    Streaming and calls without lanes stay stock to the bit; `stop_carrying_kv` takes it back.

    Returns:
        Bytes that one lane's keys and values take, of all layers.

    Raises:
        ValueError: an attention without a window, or a layer that is not moshi's or ours. `lm` is
            as it was.
    """
    layers = list(lm.transformer.layers)
    for i, layer in enumerate(layers):
        if type(layer) not in (StreamingTransformerLayer, *_OURS) or layer.skip_self_attn:
            raise ValueError(f"layer {i} is a {type(layer).__name__} without the stock attention")
        if layer.self_attn.context is None:  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError(f"layer {i}: its attention has no window (context is null)")
    total = 0
    for layer in layers:
        if type(layer) is StreamingTransformerLayer:
            layer.__class__ = CarryingLayer
        assert isinstance(layer, CarryingLayer)
        layer.carries_kv = True
        total += kv_bytes(layer)
    lm.transformer.__class__ = HybridStreamingTransformer
    return total


def stop_carrying_kv(lm: LMModel) -> None:
    """Undo `carry_kv`; lanes of keys and values are dropped."""
    for layer in lm.transformer.layers:
        if isinstance(layer, CarryingLayer):
            layer._lanes, layer.carries_kv = None, False
            if type(layer) is CarryingLayer:
                layer.__class__ = StreamingTransformerLayer  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(lm, HybridLMModel):
        lm.transformer.__class__ = StreamingTransformer


def hybrid_layers(lm: nn.Module) -> Iterator[HybridStreamingTransformerLayer]:
    """The layers of a model that have a memory, in order."""
    for module in list(lm.modules()):
        if isinstance(module, HybridStreamingTransformerLayer):
            yield module


def _build_block(
    layer: StreamingTransformerLayer, config: TTTConfig, index: int
) -> HybridSeqModelingBlock:
    attention = layer.self_attn
    if config.projection == "shared" and (attention.kv_repeat, len(attention.in_projs)) != (1, 1):
        raise ValueError(f"layer {index}: its attention has no q, k, v of one width to share")
    norm, device = layer.norm1, next(layer.parameters()).device
    try:
        block = HybridSeqModelingBlock(
            attention.embed_dim, attention.num_heads, config, _norm_name(norm)
        )
    except ValueError as error:
        raise ValueError(f"layer {index}: {error}") from error
    window, chunk = attention.context, config.chunk_size
    if block.memory.reads_late and window is not None and chunk > window:
        raise ValueError(
            f"chunk_size {chunk} is above layer {index}'s attention window of {window} frames: "
            f"{config.memory} reads a frame once its chunk is done, and some would be read by none"
        )
    if block.norm is not None:
        block.norm.load_state_dict(norm.state_dict())
    return block.to(device)


def _norm_name(norm: nn.Module) -> str:
    if isinstance(norm, RMSNorm):
        return "rms_norm" if norm.dtype is None else "rms_norm_f32"
    if isinstance(norm, nn.LayerNorm):
        return "layer_norm_f32" if isinstance(norm, LayerNormF32) else "layer_norm"
    raise ValueError(f"norm {type(norm).__name__} is not one of moshi's")


def _forget_streaming_children(lm: LMModel) -> None:
    # moshi remembers a module's streaming children at first use; the block would never start.
    for module in lm.modules():
        if isinstance(module, StreamingModule):
            module._cached_children = None
