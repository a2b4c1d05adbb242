"""LaCT's chunks in turn, with a backward that keeps O(sqrt(chunks)) states.

Only the writing is serial; the reading of a group of chunks is one batched call. The forward keeps
weights and momentum at the start of each group of about sqrt(n) chunks, and the backward makes the
rest again, group by group, of one group at a time all that autograd would keep. Tensors are
`[n, N, C, *]`, see `grid`; N = B * H; weights and momentum are `[3, N, r, F, D]`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moshi_ttt.ops.grid import Grid
from moshi_ttt.ops.lact_backward import ascend_vjp, chain_vjp, write_vjp
from moshi_ttt.ops.lact_chunks import Slow, Write, chain, recall, write


def scan(
    grid: Grid,
    slow: Slow,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    gates: Tensor,
    W: Tensor,
    D: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the memory over a grid of frames; differentiable once in every tensor.

    Args:
        grid: where the frames lie; at least one chunk.
        slow: as `Slow`.
        q: `[n, N, C, D]`.
        k: likewise, those of the held slots too.
        v: likewise.
        lr: `[n, N, C, 3]`, likewise.
        gates: `[n, 2, N, 1, 1, 1]`, momentum and `eta * w` of each chunk.
        W: weights at the start of the first chunk.
        D: momentum there; its layers' axis is empty without one.

    Returns:
        Outputs `[n, N, C, D]`, and the weights and momentum after the last write.
    """
    tensors = (*slow[:2], q, k, v, lr, gates, W, D)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    out = _Scan.apply(grid, slow[2:], keep, *tensors)
    assert out is not None
    return out


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grid: Grid, options: Any, keep: bool, *tensors: Any) -> Any:
        slow = Slow(*tensors[:2], *options)
        q, k, v, lr, gates, W, D = tensors[2:]
        size = math.isqrt(grid.n - 1) + 1
        o = torch.empty_like(q)
        marks: list[Tensor] = []
        for begin in range(0, grid.n, size):
            end = min(begin + size, grid.n)
            if keep and begin:
                marks += [W, D]
            starts = []
            for i in range(begin, end):
                starts.append(W)
                if i in grid.writes:
                    W, D, _ = write(slow, W, D, (k[i], v[i], lr[i]), gates[i], who(grid, i))
            now, W_now = q[begin:end].flatten(0, 1), torch.stack(starts, 1).flatten(1, 2)
            y, _ = recall(now, W_now, slow.residual)
            o[begin:end] = y.view_as(o[begin:end])
        ctx.grid, ctx.options, ctx.size, ctx.given = grid, options, size, len(tensors)
        ctx.save_for_backward(*tensors, *marks)
        return o, W.clone(), D.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grid, size, saved = ctx.grid, ctx.size, ctx.saved_tensors
        tensors, marks = saved[: ctx.given], saved[ctx.given :]
        marks = (*tensors[-2:], *marks)
        slow = Slow(*tensors[:2], *ctx.options)
        back = _Backward(grid, slow, tensors[2:-2], *grads)
        for begin in reversed(range(0, grid.n, size)):
            at = 2 * (begin // size)
            back.group(marks[at], marks[at + 1], begin, min(begin + size, grid.n))
        norms = (back.gu, back.o)
        return None, None, None, *norms, back.q, back.k, back.v, back.lr, back.gates, back.W, back.D


def who(grid: Grid, i: int) -> Tensor | None:
    """Who writes chunk i, one of `grid.writes`: `[N, 1, 1, 1]` bool, None for everyone."""
    mask = grid.write_mask(i)
    return None if mask is None else mask.unsqueeze(-1)


class _Backward:
    """The cotangents while the groups are walked from last to first."""

    def __init__(
        self, grid: Grid, slow: Slow, frames: tuple[Tensor, ...], y: Tensor, W: Tensor, D: Tensor
    ) -> None:
        self.grid, self.slow, self.frames, self.y, self.W, self.D = grid, slow, frames, y, W, D
        self.q, self.k, self.v, self.lr, self.gates = (torch.zeros_like(x) for x in frames)
        self.gu, self.o = torch.zeros_like(slow.gu), torch.zeros_like(slow.o)

    def group(self, W: Tensor, D: Tensor, begin: int, end: int) -> None:
        """Chunks begin..end-1, whose first starts from `W` and `D`."""
        slow, grid = self.slow, self.grid
        q, k, v, lr, gates = self.frames
        starts: list[Tensor] = []
        writes: dict[int, Write] = {}
        for i in range(begin, end):
            starts.append(W)
            if i in grid.writes:
                frames = (k[i], v[i], lr[i])
                W, D, writes[i] = write(slow, W, D, frames, gates[i], who(grid, i), trace=True)
        stack = torch.stack(starts, 1).flatten(1, 2)
        layers = chain(q[begin:end].flatten(0, 1), stack, slow.residual)
        y = self.y[begin:end].flatten(0, 1)
        x, by_read = chain_vjp(layers, stack, y, slow.residual)
        del layers
        self.q[begin:end] = x.view_as(self.q[begin:end])
        by_read = by_read.unflatten(1, (end - begin, -1))
        for i in reversed(range(begin, end)):
            if i in writes:
                self.unwrite(writes.pop(i), i)
            self.W = self.W + by_read[:, i - begin]

    def unwrite(self, w: Write, i: int) -> None:
        """Backward of the write of chunk i."""
        G, W, self.D, self.gates[i], gu, o = write_vjp(
            self.slow, w, self.frames[4][i], self.W, self.D, who(self.grid, i)
        )
        self.gu += gu
        self.o += o
        self.k[i], self.v[i], self.lr[i], direct = ascend_vjp(
            w, G, self.frames[3][i], self.slow.residual
        )
        self.W = W + direct
