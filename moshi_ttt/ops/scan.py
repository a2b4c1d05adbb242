"""The chunks of a memory in turn, with a backward that keeps O(sqrt(chunks)) states.

It serves every memory whose function is a chain of affine layers with GELU between them (one layer:
TTT-Linear, two: TTT-MLP). Layer l reads inputs X (from keys) and Xq (from queries), both `[C, in]`,
and its rows G are eta times the inner gradient at its output, so that

    Zq = Xq W + b - (tau tril(Xq X^T + 1)) G        what the queries read
    W <- W - tau_{C-1} X^T G                        what the chunk writes, if it does

Only the writing is serial; the reading of a group of chunks is one batched call. The forward keeps
the weights at the start of each group of about sqrt(n) chunks, and the backward makes the rest
again, group by group. Every piece of it is ordinary but the VJP of the inner gradient, in `norm`.
Tensors are `[n, N, C, *]`, see `grid`; N = B * H.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moshi_ttt.ops.chunks import Call, learn, read, unfinished
from moshi_ttt.ops.chunks_backward import Backward
from moshi_ttt.ops.grid import Grid


def scan(
    grid: Grid,
    frames: tuple[Tensor, Tensor, Tensor, Tensor],
    slow: tuple[Tensor, Tensor, Tensor, Tensor | None],
    start: list[Tensor],
    weights: list[Tensor],
    held_g: list[Tensor],
    held_x: list[Tensor],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Run a memory over a grid of frames; differentiable once in every tensor.

    Args:
        grid: where the frames lie; at least one chunk.
        frames: q, k, v, eta as in `Call`.
        slow: tau, gamma, beta, decay as in `Call`.
        start: W0 and b0 of each layer, flat.
        weights: W and b of each layer at the start of the first chunk, flat.
        held_g: as in `Call`.
        held_x: as in `Call`.

    Returns:
        Outputs `[n, N, C, D]`, the weights after the last write, and the rows of G (all layers)
        and X (all but the first) of each row's unfinished chunk, zero elsewhere.
    """
    tensors = (*frames, *slow, *start, *weights, *held_g, *held_x)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    out = _Scan.apply(grid, len(held_g), keep, *tensors)
    assert out is not None
    layers = len(held_g)
    o, out = out[0], list(out[1:])
    return o, out[: 2 * layers], out[2 * layers : 3 * layers], out[3 * layers :]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grid: Grid, layers: int, keep: bool, *tensors: Any) -> Any:
        call, weights = _unpack(grid, layers, tensors)
        size = math.isqrt(grid.n - 1) + 1
        o = torch.empty_like(call.q)
        tails = [torch.zeros_like(x) for x in (*call.held_g, *call.held_x)]
        marks: list[Tensor] = []
        for begin in range(0, grid.n, size):
            end = min(begin + size, grid.n)
            if keep and begin:
                marks += [x.clone() for x in weights]
            w = learn(call, weights, begin, end)
            weights = [x[-1] for pair in zip(w.W, w.b, strict=True) for x in pair]
            n, _ = read(call, w, begin, end)
            torch.addcmul(call.q[begin:end] + call.beta, call.gamma, n.xh, out=o[begin:end])
            tails = unfinished(grid, w, tails, begin, end)
        ctx.grid, ctx.layers, ctx.size, ctx.given = grid, layers, size, len(tensors)
        ctx.save_for_backward(*tensors, *marks)
        return o, *(x.clone() for x in weights), *tails

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grid, L, size = ctx.grid, ctx.layers, ctx.size
        saved = ctx.saved_tensors
        call, weights = _unpack(grid, L, saved[: ctx.given])
        marks = [weights, *(saved[i : i + 2 * L] for i in range(ctx.given, len(saved), 2 * L))]
        back = Backward(call, grads)
        for begin in reversed(range(0, grid.n, size)):
            back.group(list(marks[begin // size]), begin, min(begin + size, grid.n))
        return None, None, None, *back.gradients()


def _unpack(grid: Grid, L: int, tensors: Any) -> tuple[Call, list[Tensor]]:
    """The call, and the weights it starts from."""
    rest = list(tensors[8:])
    start, weights, held = rest[: 2 * L], rest[2 * L : 4 * L], rest[4 * L :]
    return Call._make([grid, *tensors[:8], start, held[:L], held[L:]]), weights
