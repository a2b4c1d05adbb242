"""A memory behind a gate, with the two places its state may live: a stream, or training lanes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from moshi.modules.streaming import State, StreamingModule
from moshi.modules.transformer import create_norm_fn
from torch import Tensor, nn

from moshi_ttt.config import TTTConfig
from moshi_ttt.memory import build_memory
from moshi_ttt.memory.base import MemoryState

STREAMING, LANES = "streaming", "lanes"


def named_tensors(state: tuple[Any, ...], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a (nested) NamedTuple with dotted names."""
    for name, value in zip(state._fields, state, strict=True):  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(value, Tensor):
            yield prefix + name, value
        else:
            yield from named_tensors(value, f"{prefix}{name}.")


def map_tensors(fn: Any, *states: Any) -> Any:
    """Apply `fn` to corresponding tensors of equal NamedTuples and rebuild one."""
    if isinstance(states[0], Tensor):
        return fn(*states)
    parts = [map_tensors(fn, *values) for values in zip(*states, strict=True)]
    return type(states[0])(*parts)


def _rows(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(-1, *([1] * (like.dim() - 1)))


@dataclass
class BlockStreamingState(State):
    """A stream's memory: the tensors are written in place and keep their storage."""

    memory: MemoryState
    module: HybridSeqModelingBlock

    def reset(self, reset_mask: Tensor) -> None:
        """Put the rows of `reset_mask` [B] back to W0, at position 0."""
        super().reset(reset_mask)
        self.module.memory.reset_state(self.memory, reset_mask)


@dataclass(frozen=True)
class Lanes:
    """State between training segments: a value, replaced and never written into.

    Attributes:
        batch_size: rows of the batch, one lane each.
        state: detached state after the last segment; None before the first.
        fresh: [B] rows that start from W0 at the next segment.
    """

    batch_size: int
    state: MemoryState | None
    fresh: Tensor


class HybridSeqModelingBlock(StreamingModule[BlockStreamingState]):
    """`tanh(gate) * memory(x)`: a memory and its gate, per channel, starting at 0.

    The block owns memory and gate only; attention stays the layer's. With
    `placement="after_attention"` it also owns `norm`, started as a copy of the layer's norm1.

    Args:
        width: channels of the host.
        num_heads: heads of the memory unless the configuration says otherwise.
        config: which memory, and how.
        norm: the host's norm, e.g. `"rms_norm_f32"`.
    """

    def __init__(self, width: int, num_heads: int, config: TTTConfig, norm: str) -> None:
        super().__init__()
        self.config = config
        self.memory = build_memory(width, config.num_heads or num_heads, config)
        self.gate = nn.Parameter(torch.zeros(width))
        after = config.placement == "after_attention"
        self.norm: nn.Module | None = create_norm_fn(norm, width) if after else None
        self._lanes: Lanes | None = None

    def _init_streaming_state(self, batch_size: int) -> BlockStreamingState:
        with torch.no_grad():
            state = map_tensors(lambda t: t.clone(), self.memory.init_state(batch_size))
        return BlockStreamingState(batch_size, self.gate.device, state, self)

    def forward(self, x: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        """One segment, as a function of its state.

        Args:
            x: [B, T, width] what the memory reads, already normalised.
            state: the memory's state before the first frame.

        Returns:
            The update `tanh(gate) * memory(x)` [B, T, width] in float32 or wider, and the state
            after the last frame.
        """
        y, state = self.memory(x, state)
        return torch.tanh(self.gate) * y, state

    def stream(self, x: Tensor) -> Tensor:
        """The same update for the next T frames of a stream; moves the streaming state on.

        Rows outside the exec mask keep their state; what they return means nothing.
        """
        streaming = self._streaming_state
        assert streaming is not None
        live, mask = streaming.memory, streaming.exec_mask
        one_frame = x.shape[1] == 1 and not torch.is_grad_enabled()
        if not self.config.persistent_states:
            fresh = self.memory.init_state(x.shape[0])
            # `forward` reads positions on the host, which a graph that is captured forbids
            y = self.memory.step(x, fresh) if one_frame else self.memory(x, fresh)[0]
            update = torch.tanh(self.gate) * y
        elif one_frame:
            update = torch.tanh(self.gate) * self.memory.step(x, live, exec_mask=mask)
        else:
            lengths = torch.where(mask, x.shape[1], 0)
            y, moved = self.memory(x, live, lengths=lengths)
            update = torch.tanh(self.gate) * y
            with torch.no_grad():
                map_tensors(lambda old, new: old.copy_(new), live, moved)
        return update

    # -- lanes: the state between training segments ------------------------------------------

    def attach_lanes(self, batch_size: int) -> None:
        """Carry the state from call to call for `batch_size` rows, from W0 on.

        Raises:
            ValueError: the configuration says `persistent_states: false`.
        """
        if not self.config.persistent_states:
            raise ValueError(
                "persistent_states is false: every call has a fresh state, none to carry"
            )
        fresh = torch.ones(batch_size, dtype=torch.bool, device=self.gate.device)
        self._lanes = Lanes(batch_size, None, fresh)

    def detach_lanes(self) -> None:
        """Let every call start from W0 again."""
        self._lanes = None

    def enter(self, batch_size: int) -> MemoryState:
        """State at the start of a segment: the lanes', or W0 (with its gradient) for fresh rows.

        Raises:
            ValueError: lanes are attached for another batch size.
        """
        start = self.memory.init_state(batch_size)
        lanes = self._lanes
        if lanes is None:
            return start
        if lanes.batch_size != batch_size:
            raise ValueError(
                f"lanes are attached for {lanes.batch_size} rows, the batch has {batch_size}: "
                "detach_ttt_states(model), or attach for this size"
            )
        if lanes.state is None:
            return start
        fresh = lanes.fresh
        return map_tensors(
            lambda w0, old: torch.where(_rows(fresh, old), w0, old), start, lanes.state
        )

    def leave(self, state: MemoryState) -> None:
        """Hang the state after a segment, cut from its graph, on the lanes if there are any."""
        if self._lanes is not None:
            kept = map_tensors(lambda t: t.detach(), state)
            self._lanes = Lanes(self._lanes.batch_size, kept, torch.zeros_like(self._lanes.fresh))

    # -- save, restore, reset ----------------------------------------------------------------

    def save_ttt_states(self) -> dict[str, Any] | None:
        """A copy of this block's state, of the stream and of the lanes.

        Returns:
            `{"config": ..., "streaming": {name: tensor} | None, "lanes": {...} | None}`, or None
            with `persistent_states: false`. Names are those of the state, e.g. `fast.W1`.
        """
        if not self.config.persistent_states:
            return None
        streaming, lanes = self._streaming_state, self._lanes
        saved: dict[str, Any] = {"config": self.config.to_dict(), STREAMING: None, LANES: None}
        if streaming is not None:
            saved[STREAMING] = {n: t.clone() for n, t in named_tensors(streaming.memory)}
        if lanes is not None:
            state = {} if lanes.state is None else dict(named_tensors(lanes.state))
            saved[LANES] = {n: t.clone() for n, t in (state | {"fresh": lanes.fresh}).items()}
        return saved

    def check_ttt_states(self, saved: dict[str, Any] | None, name: str = "block") -> None:
        """Refuse a saved state that does not fit, before anything is touched.

        Raises:
            ValueError: saved under another configuration, missing or extra tensors, other shapes,
                or a streaming state for a model that is not streaming.
        """
        if not self.config.persistent_states or saved is None:
            if saved is None and not self.config.persistent_states:
                return
            raise ValueError(f"{name}: one of model and saved state has persistent_states: false")
        if saved["config"] != self.config.to_dict():
            mine, theirs = self.config.to_dict(), saved["config"]
            keys = [k for k in mine if mine[k] != theirs.get(k)]
            detail = ", ".join(f"{k} {theirs.get(k)!r} (here {mine[k]!r})" for k in keys)
            raise ValueError(f"{name}: the state was saved under another configuration: {detail}")
        if saved[STREAMING] is not None:
            if self._streaming_state is None:
                raise ValueError(
                    f"{name}: a stream's state was saved, but the model is not streaming"
                )
            _check(saved[STREAMING], dict(named_tensors(self._streaming_state.memory)), name)
        elif self._streaming_state is not None:
            raise ValueError(f"{name}: the model is streaming, but no stream's state was saved")
        if saved[LANES] is not None and len(saved[LANES]) > 1:
            rows = len(saved[LANES]["fresh"])
            with torch.no_grad():
                like = dict(named_tensors(self.memory.init_state(rows)))
            _check(saved[LANES], like | {"fresh": saved[LANES]["fresh"]}, name)

    def restore_ttt_states(self, saved: dict[str, Any] | None) -> None:
        """Put a saved state back: a stream's in place, the lanes' as a new value.

        Raises:
            ValueError: it does not fit (see `check_ttt_states`); nothing was touched.
        """
        self.check_ttt_states(saved)
        if saved is None:
            return
        if saved[STREAMING] is not None:
            assert self._streaming_state is not None
            with torch.no_grad():
                for name, tensor in named_tensors(self._streaming_state.memory):
                    tensor.copy_(saved[STREAMING][name])
        lanes = saved[LANES]
        if lanes is None:
            self._lanes = None
            return
        device, fresh = self.gate.device, lanes["fresh"]
        state = None
        if len(lanes) > 1:
            with torch.no_grad():
                like = self.memory.init_state(len(fresh))
            names = iter([n for n, _ in named_tensors(like)])
            state = map_tensors(lambda _: lanes[next(names)].to(device, copy=True), like)
        self._lanes = Lanes(len(fresh), state, fresh.to(device, copy=True))

    def reset_ttt_states(self, mask: Tensor | None = None) -> None:
        """Put rows (`mask` [B], default all) of the stream and of the lanes back to W0."""
        streaming, lanes = self._streaming_state, self._lanes
        if streaming is not None:
            everyone = torch.ones_like(streaming.exec_mask)
            rows = everyone if mask is None else mask.to(everyone.device)
            self.memory.reset_state(streaming.memory, rows)
        if lanes is not None:
            fresh = torch.ones_like(lanes.fresh) if mask is None else mask.to(lanes.fresh.device)
            self._lanes = Lanes(lanes.batch_size, lanes.state, lanes.fresh | fresh)


def _check(saved: dict[str, Tensor], like: dict[str, Tensor], name: str) -> None:
    missing, extra = sorted(set(like) - set(saved)), sorted(set(saved) - set(like))
    if missing or extra:
        raise ValueError(f"{name}: saved state lacks {missing} and has {extra} that is not known")
    for key, tensor in like.items():
        if saved[key].shape != tensor.shape:
            raise ValueError(
                f"{name}: {key} was saved with shape {tuple(saved[key].shape)}, "
                f"here it has {tuple(tensor.shape)}"
            )
