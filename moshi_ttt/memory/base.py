"""Slow weights around one op: projections, short convolution, inner learning rates, output norm.

A memory reads frames `x [B, T, width]` and returns as many, and carries a `MemoryState` that the
caller keeps: `forward` takes it and returns the next (training, several frames at once), `step`
writes it in place (one frame of a stream). Both compute the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from moshi_ttt.config import TTTConfig
from moshi_ttt.memory.recompute import recomputed, recomputed_linear
from moshi_ttt.ops.norm import EPS, raised
from moshi_ttt.ops.stream import cast, unless_all


class MemoryState(NamedTuple):
    """What one memory carries from call to call; batch first, float32 (float64 in a double module).

    Attributes:
        fast: the op's own state: fast weights, unfinished chunk, position.
        conv: `[B, conv_width - 1, 2 * inner]`, the last projected frames of q and k, before the
            convolution.
    """

    fast: Any
    conv: Tensor


class Shared(NamedTuple):
    """What a memory with `projection: shared` takes from the attention of its layer.

    Attributes:
        qkv: `[B, T, 3 * width]`, the attention's projection of the memory's input, before RoPE.
        out: the attention's projection of its output, `[B, T, width]` to `[B, T, width]`.
    """

    qkv: Tensor
    out: Callable[[Tensor], Tensor]


class Memory(nn.Module):
    """One memory layer, `y = Wo RMSNorm(o)` with `o` the op's output (arXiv:2407.04620).

    q and k are projected, pass a causal depthwise convolution each (with bias; of width 1 it is a
    scale and an offset per channel) and are L2-normalised per head; v is projected. With `silu`
    they pass a SiLU, q and k before their norm. A family adds the start of its fast weights, the
    learned rates that its op asks for (`gates`), and what it multiplies its output with.

    The projections compute in the dtype of `x`, everything else in float32 (float64 once the
    module is `.double()`). Parameters below float32, as after `.to(torch.bfloat16)`, are raised
    before use, and the state never is below float32; `cast_projections` makes only the projections
    small, which loses nothing of the rest.

    Args:
        width: channels of a frame.
        num_heads: heads, H.
        config: chunk size, learning rate, convolution, width of a head, ...

    Attributes:
        op: equations of the family.
        silu: see above.
        rates: numbers that a head learns to make of a frame: learning rates, gates.
        reads_late: a frame is not read before its chunk is done; until then attention must see it.
        lr_scale: factor on the inner learning rate, for its warm-up; 0 writes nothing. Not saved.
        inner: channels of q, of k and of v, `H * D`.

    Raises:
        ValueError: `width` is not a multiple of `num_heads`, and no `head_dim` is given.
    """

    op: ClassVar[ModuleType]
    silu: ClassVar[bool] = False
    rates: ClassVar[int] = 1
    reads_late: ClassVar[bool] = False
    lr_scale: float

    def __init__(self, width: int, num_heads: int, config: TTTConfig) -> None:
        super().__init__()
        if num_heads < 1 or (config.head_dim is None and width % num_heads):
            raise ValueError(f"width {width} is not divisible by num_heads {num_heads}")
        self.width, self.num_heads = width, num_heads
        self.head_dim = config.head_dim or width // num_heads
        self.inner = inner = num_heads * self.head_dim
        conv_width = config.options["conv_width"]
        self.config = config
        self.lr_scale = 1.0
        self.qkv_proj = self.o_proj = None
        if config.projection == "own":
            self.qkv_proj = nn.Linear(width, 3 * inner, bias=False)
            self.o_proj = nn.Linear(inner, width, bias=False)
            for proj in (self.qkv_proj, self.o_proj):
                nn.init.normal_(proj.weight, std=proj.in_features**-0.5)
        taps, bias = _start_of_taps(2 * inner, conv_width)
        if self.qkv_proj is None or conv_width == 1:
            # scale 1, offset 0, and a key is the one of the frame before where a tap reaches it
            taps.zero_()
            bias.zero_()
            taps[:inner, -1] = taps[inner:, -2 if conv_width > 1 else -1] = 1.0
        else:
            # A key starts as the query of the frame before it, so that from the first step on
            # "what I hear now" finds what followed when it was heard last (one run: eval/LOG.md).
            with torch.no_grad():
                self.qkv_proj.weight[inner : 2 * inner] = self.qkv_proj.weight[:inner]
            bias[inner:] = bias[:inner]
            taps[inner:, :-1] = taps[:inner, 1:]
            taps[inner:, -1] = 0.0
        self.conv_weight, self.conv_bias = nn.Parameter(taps), nn.Parameter(bias)
        self.lr_weight = nn.Parameter(torch.randn(self.rates * num_heads, width) * 0.02)
        self.lr_bias = nn.Parameter(torch.zeros(self.rates * num_heads))
        self.out_scale = nn.Parameter(torch.ones(num_heads, self.head_dim))

    def params(self) -> Any:
        """The op's `Params`, in float32 or better."""
        raise NotImplementedError

    def gates(self, rates: Tensor) -> dict[str, Tensor]:
        """What the op asks of each frame beside q, k and v.

        Args:
            rates: `[rates, B, H, T]`, linear maps of the frames, float32 or wider.
        """
        raise NotImplementedError

    def output_gate(self, rates: Tensor) -> Tensor | None:
        """A factor `[B, H, T]` on each head's normalised output, or None."""
        return None

    def cast_projections(self, dtype: torch.dtype) -> Memory:
        """Store the projections of q, k, v and the output in `dtype`, and nothing else."""
        for proj in (self.qkv_proj, self.o_proj):
            if proj is not None:
                proj.to(dtype)
        return self

    def init_state(self, batch_size: int) -> MemoryState:
        """The state before the first frame; differentiable in `W0`."""
        fast = self.op.init_state(self.params(), batch_size)
        rows = self.conv_weight.shape[1] - 1
        return MemoryState(fast, full(self.out_scale).new_zeros(batch_size, rows, 2 * self.inner))

    def fast_weights(self, fast: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each fast weight what a state holds `[B, H, ...]`, and where it started `[H, ...]`."""
        start = self.params()
        for name in self.op.WEIGHTS:
            if getattr(start, name) is not None:
                yield getattr(fast, name), getattr(start, name)

    def forward(
        self,
        x: Tensor,
        state: MemoryState,
        lengths: Tensor | None = None,
        shared: Shared | None = None,
    ) -> tuple[Tensor, MemoryState]:
        """Pass T frames and return their outputs and the next state; `state` is not written.

        Args:
            x: `[B, T, width]`, any T.
            state: the state before the first of them; rows may be at different positions.
            lengths: `[B]` int64, frames that exist in each row (the first ones); None is all.
                Outputs of the others are 0.
            shared: the attention's part, with `projection: shared` only.

        Returns:
            `[B, T, width]` in the dtype of `x`, and the new state.

        Raises:
            ValueError: a length outside 0..T.
        """
        q, k, v, conv = self.project(x, state.conv, lengths, shared)
        rates = self._rates(x, state.conv.dtype)
        gates = self.gates(rates)
        o, fast = self.op.chunk(self.params(), state.fast, q, k, v, lengths=lengths, **gates)
        factor = self.output_gate(rates)
        normed = (o, self.out_scale) if factor is None else (o, self.out_scale, factor)
        if self.o_proj is None:
            assert shared is not None
            y = shared.out(recomputed(partial(self._normed, x.dtype), *normed))
            if lengths is not None:
                y = y * (torch.arange(x.shape[1], device=x.device) < lengths.view(-1, 1))[..., None]
        else:
            weight = self.o_proj.weight.to(x.dtype)
            y = recomputed_linear(partial(self._normed, x.dtype), weight, *normed)
        return y, MemoryState(fast, conv)

    def project(
        self, x: Tensor, tail: Tensor, lengths: Tensor | None, shared: Shared | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v `[B, H, T, D]` of the frames `x`, and the convolution's state after them."""
        dtype, rows = tail.dtype, 2 * self.inner
        slow = (tail, self.conv_weight, self.conv_bias)
        if self.qkv_proj is None:
            assert shared is not None, "projection: shared needs the attention's q, k, v"
            v = shared.qkv[..., rows:]
            raw = (shared.qkv[..., :rows],)
        else:
            weight = self.qkv_proj.weight.to(x.dtype)
            v, raw = F.linear(x, weight[rows:]), (x, weight[:rows])
        v = self._heads(v.to(dtype))
        q, k, conv = recomputed(partial(self._queries, lengths), *slow, *raw)
        return q, k, F.silu(v) if self.silu else v, conv

    @torch.no_grad()
    def step(
        self,
        x: Tensor,
        state: MemoryState,
        exec_mask: Tensor | None = None,
        shared: Shared | None = None,
    ) -> Tensor:
        """Pass one frame of a stream; the state is written in place. No gradients.

        Capturable in a CUDA graph: no position is read on the host.

        Args:
            x: `[B, 1, width]`.
            state: keeps its storage.
            exec_mask: `[B]` bool, rows that have a frame; the others keep their state exactly and
                their output means nothing. None is all.
            shared: the attention's part, with `projection: shared` only.

        Returns:
            `[B, 1, width]` in the dtype of `x`.
        """
        with torch.inference_mode():  # each op is cheaper in it; what is returned leaves it
            o = self._frame(x, state, unless_all(exec_mask), shared)
        if self.o_proj is None:
            assert shared is not None
            return shared.out(o.clone())  # a module may keep what it is given
        return F.linear(o, cast(self.o_proj.weight, x.dtype))

    def _frame(
        self, x: Tensor, state: MemoryState, exec_mask: Tensor | None, shared: Shared | None
    ) -> Tensor:
        """`step` without the output's projection."""
        dtype, B, H, rows = state.conv.dtype, x.shape[0], self.num_heads, 2 * self.inner
        if self.qkv_proj is None:
            assert shared is not None, "projection: shared needs the attention's q, k, v"
            qkv = cast(shared.qkv, dtype)
        else:
            qkv = cast(F.linear(x, cast(self.qkv_proj.weight, x.dtype)), dtype)
        frames = torch.cat([state.conv, qkv[..., :rows]], 1)
        y = (frames * cast(self.conv_weight, dtype).mT).sum(1).add_(cast(self.conv_bias, dtype))
        y = y.view(B, 2, H, 1, self.head_dim)
        v = qkv[..., rows:].view(B, H, 1, self.head_dim)
        if self.silu:
            y, v = F.silu(y, inplace=True), F.silu(v)
        y.div_(torch.linalg.vector_norm(y, dim=-1, keepdim=True).clamp_min_(EPS))
        q, k = y.unbind(1)
        rates = self._rates(x, dtype)
        gates = self.gates(rates)
        o = self.op.step(self.params(), state.fast, q, k, v, exec_mask=exec_mask, **gates)
        conv = frames[:, 1:]
        if exec_mask is not None:
            conv = torch.where(exec_mask.view(-1, 1, 1), conv, state.conv)
        state.conv.copy_(conv)
        o = o.squeeze(2)
        norm = torch.linalg.vector_norm(o, dim=-1, keepdim=True)
        rms = norm.square_().mul_(1 / self.head_dim).add_(EPS).rsqrt_()
        o = (o * rms).mul_(cast(self.out_scale, dtype))
        factor = self.output_gate(rates)
        if factor is not None:
            o.mul_(factor)
        return cast(o.view(B, 1, self.inner), x.dtype)

    @torch.no_grad()
    def reset_state(self, state: MemoryState, mask: Tensor) -> None:
        """Put the rows of `mask` (`[B]` bool) back to `W0` at position 0, in place."""
        fresh = self.init_state(state.conv.shape[0])
        for old, new in zip((*state.fast, state.conv), (*fresh.fast, fresh.conv), strict=True):
            old.copy_(torch.where(mask.view(-1, *[1] * (old.dim() - 1)), new.to(old), old))

    def _rates(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`[B, T, width]` -> `[rates, B, H, T]`."""
        y = F.linear(cast(x, dtype), cast(self.lr_weight, dtype), cast(self.lr_bias, dtype))
        return y.unflatten(-1, (self.rates, -1)).permute(2, 0, 3, 1)

    def _heads(self, x: Tensor) -> Tensor:
        """`[B, T, width]` -> `[B, H, T, D]`."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _queries(
        self,
        lengths: Tensor | None,
        tail: Tensor,
        taps: Tensor,
        bias: Tensor,
        x: Tensor,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised q and k of frames, and the state of the convolution after them.

        Of `x` projected by `weight`, or of what is projected already.
        """
        raw = x if weight is None else F.linear(x, weight)
        frames = torch.cat([tail, raw.to(tail.dtype)], 1)
        keep = taps.shape[1] - 1
        if lengths is None:
            after = frames[:, x.shape[1] :].clone()
        else:
            rows = lengths.view(-1, 1) + torch.arange(keep, device=x.device)
            after = frames.gather(1, rows.unsqueeze(-1).expand(-1, -1, frames.shape[-1]))
        return *self._convolve(frames, taps, bias), after

    def _convolve(self, frames: Tensor, taps: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, conv_width - 1 + T, 2 * inner]` -> normalised q and k, `[B, H, T, D]` each."""
        T = frames.shape[1] - taps.shape[1] + 1
        y, taps = bias.to(frames.dtype), taps.to(frames.dtype)
        for j in range(taps.shape[1]):
            y = torch.addcmul(y, frames[:, j : j + T], taps[:, j])
        if self.silu:
            y = F.silu(y)
        y = F.normalize(y.unflatten(-1, (2, self.num_heads, -1)), dim=-1, eps=EPS)
        q, k = y.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k

    def _normed(
        self, dtype: torch.dtype, o: Tensor, scale: Tensor, factor: Tensor | None = None
    ) -> Tensor:
        """`scale * o / sqrt(mean(o^2) + eps)` per head: `[B, H, T, D]` -> `[B, T, inner]`."""
        rms = torch.rsqrt(o.square().mean(-1, keepdim=True) + EPS)
        o = o * rms * scale.to(o.dtype).unsqueeze(1)
        if factor is not None:
            o = o * factor.unsqueeze(-1)
        return o.transpose(1, 2).flatten(2).to(dtype)

    def writes(self) -> bool:
        """Whether the fast weights move at all."""
        return self.config.writing and self.lr_scale > 0


def _start_of_taps(channels: int, conv_width: int) -> tuple[Tensor, Tensor]:
    """Weights and bias of a depthwise convolution, as torch starts them."""
    bound = conv_width**-0.5
    taps = torch.empty(channels, conv_width).uniform_(-bound, bound)
    return taps, torch.empty(channels).uniform_(-bound, bound)


def full(x: Tensor) -> Tensor:
    """`x` in float32, or as it is if that is float64; whole, if it is spread over ranks.

    Outside a forward FSDP has every rank hold a part, and all ranks must ask together.
    """
    return raised(x.full_tensor() if isinstance(x, DTensor) else x)
