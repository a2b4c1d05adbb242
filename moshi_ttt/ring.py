"""moshi's key-value rings: several frames per call, exactly, and rows that start anew."""

from __future__ import annotations

from moshi.modules.streaming import StreamingModule
from moshi.modules.transformer import RingKVCache, StreamingMultiheadAttention
from torch import Tensor, nn


def widen_kv_rings(module: nn.Module, steps_per_call: int) -> None:
    """Give every causal attention under `module` a key-value ring wide enough for longer calls.

    moshi's ring holds `context` steps. A call with T > 1 steps writes T keys before its first
    query has read, so once the ring has wrapped the early queries miss keys they still need.
    `context + T - 1` places make the call equal to T calls of one step.

    Args:
        module: a module inside `streaming(...)`, before its first step.
        steps_per_call: most steps of a call, counted in the attention's own steps
            (the LM has one a frame, Mimi's transformers two).

    Raises:
        RuntimeError: the module is not streaming, or has already taken a step.
    """
    for name, attention in module.named_modules():
        if not isinstance(attention, StreamingMultiheadAttention) or attention.weights_per_step:
            continue
        state = attention._streaming_state
        if not isinstance(module, StreamingModule) or state is None:
            raise RuntimeError(f"{name} is not streaming: widen its ring inside streaming()")
        old = state.kv_cache
        if old is None or attention.context is None:
            continue
        if bool(old.end_offset.any()):
            raise RuntimeError(f"{name} has taken a step: widen its ring right after streaming()")
        _, rows, heads, _, width = old.cache.shape
        state.kv_cache = RingKVCache(
            rows,
            heads,
            width,
            attention.context + steps_per_call - 1,
            respect_exec_mask=old.respect_exec_mask,
            device=old.cache.device,
            dtype=old.cache.dtype,
        )


def clear_kv_rows(module: nn.Module, mask: Tensor) -> None:
    """Zero the keys and values of the rows of `mask` [B] under `module`, which is streaming.

    moshi's reset leaves them, masked; but a masked value that is no number still spoils a sum.
    """
    for attention in module.modules():
        if isinstance(attention, StreamingMultiheadAttention):
            state = attention._streaming_state
            if state is not None and state.kv_cache is not None:
                state.kv_cache.cache.masked_fill_(mask.view(1, -1, 1, 1, 1), 0)
