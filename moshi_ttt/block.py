"""A memory behind a gate, with the two places its state may live: a stream, or training lanes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from moshi.modules.streaming import State, StreamingModule
from moshi.modules.transformer import create_norm_fn
from torch import Tensor, nn

from moshi_ttt.config import TTTConfig
from moshi_ttt.lanes import FRESH, HasLanes, Lanes, map_tensors, named_tensors
from moshi_ttt.memory import build_memory
from moshi_ttt.memory.base import MemoryState, Shared
from moshi_ttt.observe import Watch

STREAMING, LANES = "streaming", "lanes"


def _rows(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(-1, *([1] * (like.dim() - 1)))


@dataclass
class BlockStreamingState(State):
    """A stream's memory: the tensors are written in place and keep their storage.

    Attributes:
        diverged: `[B]` bool, or None. If there, an update that is not finite is left out, and its
            row marked here, for whoever runs the stream to deal with it. Evaluation has none: what
            is not finite shall be seen there.
    """

    memory: MemoryState
    module: HybridSeqModelingBlock
    diverged: Tensor | None = None

    def reset(self, reset_mask: Tensor) -> None:
        """Put the rows of `reset_mask` [B] back to W0, at position 0."""
        super().reset(reset_mask)
        self.module.memory.reset_state(self.memory, reset_mask)


class HybridSeqModelingBlock(StreamingModule[BlockStreamingState], HasLanes):
    """`tanh(gate) * memory(x)`: a memory and its gate, per channel, starting at 0.

    The block owns memory and gate only; attention stays the layer's. With
    `placement="after_attention"` it also owns `norm`, started as a copy of the layer's norm1.

    Args:
        width: channels of the host.
        num_heads: heads of the memory unless the configuration says otherwise.
        config: which memory, and how.
        norm: the host's norm, e.g. `"rms_norm_f32"`.

    Attributes:
        active: False takes the memory out of every call: it neither reads nor writes.
        watch: a monitor's, told of what is read and said; None is nobody.
    """

    watch: Watch | None = None

    def __init__(self, width: int, num_heads: int, config: TTTConfig, norm: str) -> None:
        super().__init__()
        self.config = config
        self.memory = build_memory(width, config.num_heads or num_heads, config)
        self.gate = nn.Parameter(torch.zeros(width))
        after = config.placement == "after_attention"
        self.norm: nn.Module | None = create_norm_fn(norm, width) if after else None
        self.active = True

    def _init_streaming_state(self, batch_size: int) -> BlockStreamingState:
        with torch.no_grad():
            state = map_tensors(lambda t: t.clone(), self.memory.init_state(batch_size))
        return BlockStreamingState(batch_size, self.gate.device, state, self)

    def forward(
        self,
        x: Tensor,
        state: MemoryState | None = None,
        fresh: Tensor | None = None,
        shared: Shared | None = None,
    ) -> tuple[Tensor, MemoryState]:
        """One segment, as a function of its state.

        With `detach_memory_output` no gradient of the loss reaches the memory, only the gate: it
        breaks the learning of q, k, v, the learning rates and W0, and exists to show that.

        Args:
            x: [B, T, width] what the memory reads, already normalised.
            state: the memory's state before the first frame; None is W0.
            fresh: [B] bool, rows that start from W0 (with its gradient) in place of `state`.
            shared: the attention's part, with `projection: shared`.

        Returns:
            The update `tanh(gate) * memory(x)` [B, T, width] in float32 or wider, and the state
            after the last frame.
        """
        start = self.memory.init_state(x.shape[0])
        if state is None:
            state = start
        elif fresh is not None:
            state = map_tensors(
                lambda w0, old: torch.where(_rows(fresh, old), w0, old), start, state
            )
        assert state is not None
        if not self.config.writing:
            # W0 as it is now: what a lane carries is the W0 of the step in which it began
            state = state._replace(fast=start.fast)
        if self.watch is not None:
            self.watch.before(x, state, None, shared)
        y, after = self.memory(x, state, shared=shared)
        if self.config.detach_memory_output:
            y = y.detach()
        return self._said(y), after

    def _said(self, y: Tensor) -> Tensor:
        update = torch.tanh(self.gate) * y
        if self.watch is not None:
            self.watch.after(update, self.gate)
        return update

    def stream(self, x: Tensor, shared: Shared | None = None) -> Tensor:
        """The same update for the next T frames of a stream; moves the streaming state on.

        Rows outside the exec mask keep their state; what they return means nothing.
        """
        streaming = self._streaming_state
        assert streaming is not None
        live, mask = streaming.memory, streaming.exec_mask
        one_frame = x.shape[1] == 1 and not torch.is_grad_enabled()
        persistent = self.config.persistent_states
        start = live if persistent else self.memory.init_state(x.shape[0])
        if self.watch is not None:
            self.watch.before(x, start, mask, shared)
        if not persistent:
            # `forward` reads positions on the host, which a graph that is captured forbids
            if one_frame:
                y = self.memory.step(x, start, shared=shared)
            else:
                y, _ = self.memory(x, start, shared=shared)
        elif one_frame:
            y = self.memory.step(x, live, mask, shared)
        else:
            lengths = torch.where(mask, x.shape[1], 0)
            y, moved = self.memory(x, live, lengths, shared)
            with torch.no_grad():
                map_tensors(lambda old, new: old.copy_(new), live, moved)
        # on a CPU one number tells nearly always that there is nothing to leave out
        if streaming.diverged is not None and not (y.is_cpu and math.isfinite(y.sum())):
            ok = y.isfinite().all(-1, keepdim=True)
            streaming.diverged |= mask & ~ok.all(1).view(-1)
            y = torch.where(ok, y, 0)
        return self._said(y)

    @property
    def carries(self) -> bool:
        """Whether there is a state to carry from segment to segment."""
        return self.config.persistent_states

    def lane_value(self) -> MemoryState:
        """A state of one row."""
        with torch.no_grad():
            return self.memory.init_state(1)

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
            saved[LANES] = lanes.tensors()
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
        mine, theirs = self.config.to_dict(), TTTConfig.from_dict(saved["config"]).to_dict()
        if mine != theirs:
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
        if saved[LANES] is not None:
            check_lanes(self, saved[LANES], name)

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
        restore_lanes(self, saved[LANES])

    def reset_ttt_states(self, mask: Tensor | None = None) -> None:
        """Put rows (`mask` [B], default all) of the stream and of the lanes back to W0."""
        streaming = self._streaming_state
        if streaming is not None:
            everyone = torch.ones_like(streaming.exec_mask)
            rows = everyone if mask is None else mask.to(everyone.device)
            self.memory.reset_state(streaming.memory, rows)
        if self._lanes is not None:
            self._lanes.reset(mask)


def check_lanes(module: HasLanes, saved: dict[str, Tensor], name: str) -> None:
    """Refuse saved lanes that do not fit a module.

    Raises:
        ValueError: missing or extra tensors, or other shapes.
    """
    if len(saved) > 1:
        rows = saved[FRESH].numel()
        like = {n: t.expand(rows, *t.shape[1:]) for n, t in named_tensors(module.lane_value())}
        _check(saved, like | {FRESH: saved[FRESH]}, name)


def restore_lanes(module: HasLanes, saved: dict[str, Tensor] | None) -> None:
    """Hang saved lanes on a module again, as new values; None takes those it has away."""
    if saved is None:
        module._lanes = None
        return
    lanes = Lanes.load(saved, module.lane_value(), next(module.parameters()).device)
    if module._lanes is not None:
        lanes.slot, lanes.linked = module._lanes.slot, module._lanes.linked
    module._lanes = lanes


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
