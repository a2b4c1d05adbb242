"""A memory in moshi's temporal transformer: the one place that knows moshi's layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
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
from moshi.utils.compile import no_compile
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from moshi_ttt import states
from moshi_ttt.block import HybridSeqModelingBlock
from moshi_ttt.config import TTTConfig
from moshi_ttt.memory.base import MemoryState

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


class HybridStreamingTransformerLayer(StreamingTransformerLayer, _KeepsStates):
    """A StreamingTransformerLayer that also has a memory.

        h = x + layer_scale_1(attn(norm1(x)))                        the stock layer's, to the bit
        y = h + tanh(gate) * memory(norm1(x))                        placement "parallel"
        y = h + tanh(gate) * memory(norm(h))                         placement "after_attention"

    then the stock feed forward block. Made by `splice` only.
    """

    seq_modeling_block: HybridSeqModelingBlock

    def forward(self, x: Tensor, cross_attention_src: Tensor | None = None) -> Tensor:
        """[B, T, width] -> [B, T, width]; moves the stream's or the lanes' state on."""
        block = self.seq_modeling_block
        if self.is_streaming:
            x, _ = self._body(x, cross_attention_src, None)
            streaming = self._streaming_state
            assert streaming is not None
            streaming.offset_cpu += x.shape[1]
            return x
        x, state = self._body(x, cross_attention_src, block.enter(x.shape[0]))
        assert state is not None
        block.leave(state)
        return x

    def forward_checkpointed(self, x: Tensor, cross_attention_src: Tensor | None = None) -> Tensor:
        """`forward`, keeping only inputs for the backward.

        The memory's state enters the recomputed function as an argument: read from an attribute,
        a recompute would see the state of a later call and the gradient would be silently wrong.
        """
        block = self.seq_modeling_block
        flat, spec = tree_flatten(block.enter(x.shape[0]))

        def body(x: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
            y, state = self._body(x, cross_attention_src, tree_unflatten(flat, spec))
            return y, *tree_flatten(state)[0]

        out = checkpoint(body, x, *flat, use_reentrant=False, preserve_rng_state=False)
        assert out is not None
        y, *after = out
        block.leave(tree_unflatten(after, spec))
        return y

    def _body(
        self, x: Tensor, cross_attention_src: Tensor | None, state: MemoryState | None
    ) -> tuple[Tensor, MemoryState | None]:
        block = self.seq_modeling_block
        with ExitStack() as stack:
            if x.device.type != "cuda":
                stack.enter_context(no_compile())
            normed = self.norm1(x)
            update = self.self_attn(normed, normed, normed)
            h = x.to(update) + self.layer_scale_1(update)
            read = normed if block.norm is None else block.norm(h)
            if state is None:
                remembered = block.stream(read)
            else:
                remembered, state = block(read, state)
            y = h + remembered.to(h.dtype)
            if self.cross_attention is not None:
                assert cross_attention_src is not None
                y = self._cross_attention_block(y, cross_attention_src)
            return self._ff_block(y), state


class HybridStreamingTransformer(StreamingTransformer, _KeepsStates):
    """moshi's temporal transformer whose gradient checkpointing passes states as values."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        if not self.checkpointing or self.is_streaming or not torch.is_grad_enabled():
            return self._forward_stock(x, *args, **kwargs)
        dtype = x.dtype
        for layer in self.layers:
            if isinstance(layer, HybridStreamingTransformerLayer):
                x = layer.forward_checkpointed(x, *args, **kwargs)
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
            moshi's own, or heads that do not divide the width. `lm` is as it was.
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
    for layer in hybrid_layers(lm):
        delattr(layer, BLOCK)
        layer.__class__ = StreamingTransformerLayer  # pyright: ignore[reportAttributeAccessIssue]
    lm.transformer.__class__ = StreamingTransformer
    lm.__class__ = LMModel  # pyright: ignore[reportAttributeAccessIssue]
    del lm.ttt_config
    _forget_streaming_children(lm)


def hybrid_layers(lm: nn.Module) -> Iterator[HybridStreamingTransformerLayer]:
    """The layers of a model that have a memory, in order."""
    for module in list(lm.modules()):
        if isinstance(module, HybridStreamingTransformerLayer):
            yield module


def _build_block(
    layer: StreamingTransformerLayer, config: TTTConfig, index: int
) -> HybridSeqModelingBlock:
    attention = layer.self_attn
    norm, device = layer.norm1, next(layer.parameters()).device
    try:
        block = HybridSeqModelingBlock(
            attention.embed_dim, attention.num_heads, config, _norm_name(norm)
        )
    except ValueError as error:
        raise ValueError(f"layer {index}: {error}") from error
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
