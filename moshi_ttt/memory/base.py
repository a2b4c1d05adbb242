"""Slow weights around one op: projections, short convolution, inner learning rates, output norm.

A memory reads frames `x [B, T, width]` and returns as many, and carries a `MemoryState` that the
caller keeps: `forward` takes it and returns the next (training, several frames at once), `step`
writes it in place (one frame of a stream). Both compute the same function.
"""

from __future__ import annotations

import math
from functools import partial
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moshi_ttt.config import TTTConfig
from moshi_ttt.memory.recompute import recomputed, recomputed_linear
from moshi_ttt.ops.norm import EPS
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


class Memory(nn.Module):
    """One memory layer, `y = Wo RMSNorm(o)` with `o` the op's output (arXiv:2407.04620).

    q and k are projected, pass a causal depthwise convolution each (with bias, no activation) and
    are L2-normalised per head; v is projected. The inner learning rate of a frame and head is
    `eta = base_lr * lr_scale * sigmoid(x . w + b) / D`, 0 with `writing: false`.

    The four projections compute in the dtype of `x`, everything else in float32 (float64 once the
    module is `.double()`). Parameters below float32, as after `.to(torch.bfloat16)`, are raised
    before use, and the state never is below float32; `cast_projections` makes only the projections
    small, which loses nothing of the rest.

    Args:
        width: channels of a frame; `D = width // num_heads` is the width of a head.
        num_heads: heads, H.
        config: chunk size, how often to write, learning rate, decay, convolution.

    Attributes:
        lr_scale: factor on the inner learning rate, for its warm-up; not saved.

    Raises:
        ValueError: `width` is not a multiple of `num_heads`.
    """

    op: ClassVar[ModuleType]
    lr_scale: float

    def __init__(self, width: int, num_heads: int, config: TTTConfig) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"width {width} is not divisible by num_heads {num_heads}")
        assert config.base_lr is not None
        self.width, self.num_heads, self.head_dim = width, num_heads, width // num_heads
        self.config = config
        self.base_lr, self.lr_scale = config.base_lr, 1.0
        H, D = num_heads, self.head_dim
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        for proj in (self.qkv_proj, self.o_proj):
            nn.init.normal_(proj.weight, std=width**-0.5)
        bound = config.conv_width**-0.5
        self.conv_weight = nn.Parameter(
            torch.empty(2 * width, config.conv_width).uniform_(-bound, bound)
        )
        self.conv_bias = nn.Parameter(torch.empty(2 * width).uniform_(-bound, bound))
        with torch.no_grad():
            # A key starts as the query of the frame before it, so that from the first step on
            # "what I hear now" finds what followed when it was heard last (one run: eval/LOG.md).
            self.qkv_proj.weight[width : 2 * width] = self.qkv_proj.weight[:width]
            self.conv_bias[width:] = self.conv_bias[:width]
            if config.conv_width > 1:
                self.conv_weight[width:, :-1] = self.conv_weight[:width, 1:]
                self.conv_weight[width:, -1] = 0.0
        self.lr_weight = nn.Parameter(torch.randn(H, width) * 0.02)
        self.lr_bias = nn.Parameter(torch.zeros(H))
        self.gamma = nn.Parameter(torch.ones(H, D))
        self.beta = nn.Parameter(torch.zeros(H, D))
        self.delta = nn.Parameter(torch.zeros(config.chunk_size))
        self.out_scale = nn.Parameter(torch.ones(H, D))
        self.decay_logit = None
        if config.decay > 0:
            logit = math.log(config.decay) - math.log1p(-config.decay)
            self.decay_logit = nn.Parameter(torch.full((H,), logit))

    def params(self) -> Any:
        """The op's `Params`, in float32 or better."""
        raise NotImplementedError

    def cast_projections(self, dtype: torch.dtype) -> Memory:
        """Store the projections of q, k, v and the output in `dtype`, and nothing else."""
        for proj in (self.qkv_proj, self.o_proj):
            proj.to(dtype)
        return self

    def init_state(self, batch_size: int) -> MemoryState:
        """The state before the first frame; differentiable in `W0`."""
        fast = self.op.init_state(self.params(), batch_size)
        rows = self.config.conv_width - 1
        return MemoryState(fast, fast.k.new_zeros(batch_size, rows, 2 * self.width))

    def forward(
        self, x: Tensor, state: MemoryState, lengths: Tensor | None = None
    ) -> tuple[Tensor, MemoryState]:
        """Pass T frames and return their outputs and the next state; `state` is not written.

        Args:
            x: `[B, T, width]`, any T.
            state: the state before the first of them; rows may be at different positions.
            lengths: `[B]` int64, frames that exist in each row (the first ones); None is all.
                Outputs of the others are 0.

        Returns:
            `[B, T, width]` in the dtype of `x`, and the new state.

        Raises:
            ValueError: a length outside 0..T.
        """
        dtype, rows = state.conv.dtype, 2 * self.width
        weight = self.qkv_proj.weight.to(x.dtype)
        v = self._heads(F.linear(x, weight[rows:]).to(dtype))
        q, k, conv = recomputed(
            partial(self._queries, lengths),
            x,
            state.conv,
            weight[:rows],
            self.conv_weight,
            self.conv_bias,
        )
        eta, every = self._eta(x, dtype), self.config.write_every
        o, fast = self.op.chunk(self.params(), state.fast, q, k, v, eta, lengths, every)
        weight = self.o_proj.weight.to(x.dtype)
        y = recomputed_linear(partial(self._normed, x.dtype), weight, o, self.out_scale)
        return y, MemoryState(fast, conv)

    @torch.no_grad()
    def step(self, x: Tensor, state: MemoryState, exec_mask: Tensor | None = None) -> Tensor:
        """Pass one frame of a stream; the state is written in place. No gradients.

        Capturable in a CUDA graph: no position is read on the host.

        Args:
            x: `[B, 1, width]`.
            state: keeps its storage.
            exec_mask: `[B]` bool, rows that have a frame; the others keep their state exactly and
                their output means nothing. None is all.

        Returns:
            `[B, 1, width]` in the dtype of `x`.
        """
        with torch.inference_mode():  # each op is cheaper in it; what is returned leaves it
            o = self._frame(x[:, 0], state, unless_all(exec_mask))
        return F.linear(o, cast(self.o_proj.weight, x.dtype)).unsqueeze(1)

    def _frame(self, x: Tensor, state: MemoryState, exec_mask: Tensor | None) -> Tensor:
        """`step` without the output's projection, on `[B, width]`."""
        dtype, (B, width), H = state.conv.dtype, x.shape, self.num_heads
        qkv = cast(F.linear(x, cast(self.qkv_proj.weight, x.dtype)), dtype).view(B, 1, 3 * width)
        frames = torch.cat([state.conv, qkv[..., : 2 * width]], 1)
        y = (frames * cast(self.conv_weight, dtype).mT).sum(1).add_(cast(self.conv_bias, dtype))
        y = y.view(B, 2, H, 1, -1)
        y.div_(torch.linalg.vector_norm(y, dim=-1, keepdim=True).clamp_min_(EPS))
        q, k = y.unbind(1)
        v = qkv[..., 2 * width :].view(B, H, 1, -1)
        gate = F.linear(cast(x, dtype), cast(self.lr_weight, dtype), cast(self.lr_bias, dtype))
        eta = gate.sigmoid_().mul_(self._rate()).unsqueeze(-1)
        every = self.config.write_every
        o = self.op.step(self.params(), state.fast, q, k, v, eta, exec_mask, every).squeeze(2)
        conv = frames[:, 1:]
        if exec_mask is not None:
            conv = torch.where(exec_mask.view(-1, 1, 1), conv, state.conv)
        state.conv.copy_(conv)
        rms = (o * o).mean(-1, keepdim=True).add_(EPS).rsqrt_()
        o = (o * rms).mul_(cast(self.out_scale, dtype))
        return cast(o.view(B, width), x.dtype)

    @torch.no_grad()
    def reset_state(self, state: MemoryState, mask: Tensor) -> None:
        """Put the rows of `mask` (`[B]` bool) back to `W0` at position 0, in place."""
        fresh = self.init_state(state.conv.shape[0])
        for old, new in zip((*state.fast, state.conv), (*fresh.fast, fresh.conv), strict=True):
            old.copy_(torch.where(mask.view(-1, *[1] * (old.dim() - 1)), new.to(old), old))

    def _heads(self, x: Tensor) -> Tensor:
        """`[B, T, width]` -> `[B, H, T, D]`."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _queries(
        self,
        lengths: Tensor | None,
        x: Tensor,
        tail: Tensor,
        weight: Tensor,
        taps: Tensor,
        bias: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised q and k of the frames `x`, and the state of the convolution after them."""
        frames = torch.cat([tail, F.linear(x, weight).to(tail.dtype)], 1)
        keep = taps.shape[1] - 1
        if lengths is None:
            after = frames[:, x.shape[1] :].clone()
        else:
            rows = lengths.view(-1, 1) + torch.arange(keep, device=x.device)
            after = frames.gather(1, rows.unsqueeze(-1).expand(-1, -1, frames.shape[-1]))
        return *self._convolve(frames, taps, bias), after

    def _convolve(self, frames: Tensor, taps: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, conv_width - 1 + T, 2 * width]` -> normalised q and k, `[B, H, T, D]` each."""
        T = frames.shape[1] - taps.shape[1] + 1
        y, taps = bias.to(frames.dtype), taps.to(frames.dtype)
        for j in range(taps.shape[1]):
            y = torch.addcmul(y, frames[:, j : j + T], taps[:, j])
        y = F.normalize(y.unflatten(-1, (2, self.num_heads, -1)), dim=-1, eps=EPS)
        q, k = y.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k

    def _eta(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Inner learning rates `[B, H, T]`."""
        gate = F.linear(x.to(dtype), self.lr_weight.to(dtype), self.lr_bias.to(dtype))
        return torch.sigmoid(gate).mT * self._rate()

    def _rate(self) -> float:
        """What the inner learning rate is without its gate; 0 where nothing shall be written."""
        return self.base_lr * self.lr_scale / self.head_dim if self.config.writing else 0.0

    def _normed(self, dtype: torch.dtype, o: Tensor, scale: Tensor) -> Tensor:
        """`scale * o / sqrt(mean(o^2) + eps)` per head: `[B, H, T, D]` -> `[B, T, width]`."""
        rms = torch.rsqrt(o.square().mean(-1, keepdim=True) + EPS)
        o = o * rms * scale.to(o.dtype).unsqueeze(1)
        return o.transpose(1, 2).flatten(2).to(dtype)

    def _decay(self) -> Tensor | None:
        """Decay per head, `[H]`, or None for plain TTT."""
        return None if self.decay_logit is None else torch.sigmoid(full(self.decay_logit))


def full(x: Tensor) -> Tensor:
    """`x` in float32, or as it is if that is float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
