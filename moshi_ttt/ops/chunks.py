"""A group of chunks, forward: what they write, chunk after chunk, and what their queries read.

See `scan` for the letters and the equations; `chunks_backward` goes the other way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moshi_ttt.ops.grid import Grid
from moshi_ttt.ops.norm import Normed, gelu, gelu_pull, inner_gradient, normalise


class Call(NamedTuple):
    """The arguments of one call.

    Attributes:
        grid: where the frames lie.
        q: `[n, N, C, D]`, likewise `k` and `v`.
        k: keys, those of the held slots too.
        v: values.
        eta: `[n, N, C, 1]`, 0 where there is no new frame.
        tau: `[C]`.
        gamma: `[N, 1, D]`.
        beta: `[N, 1, D]`.
        decay: `[N, 1, 1]` or None.
        start: W0, b0 of each layer: `[N, in, out]`, `[N, 1, out]`, ...
        held_g: per layer `[N, C, out]`, the buffers' rows of G, zero where stale.
        held_x: per layer but the first `[N, C, in]`, the buffers' rows of X.
    """

    grid: Grid
    q: Tensor
    k: Tensor
    v: Tensor
    eta: Tensor
    tau: Tensor
    gamma: Tensor
    beta: Tensor
    decay: Tensor | None
    start: list[Tensor]
    held_g: list[Tensor]
    held_x: list[Tensor]


class Written(NamedTuple):
    """A group of m chunks after its serial part; stacks over the chunks.

    Attributes:
        W: per layer `[m + 1, N, in, out]`, chunk-start weights, and those after the group.
        b: per layer `[m + 1, N, 1, out]`.
        X: per layer `[m, N, C, in]`.
        G: per layer `[m, N, C, out]`.
        Z: per layer but the last, outputs before GELU.
        P: per layer but the last, `G W^T` of the layer above.
        n: the layer norm of the last layer's output.
        g: inner gradient there.
        u: see `inner_gradient`.
    """

    W: list[Tensor]
    b: list[Tensor]
    X: list[Tensor]
    G: list[Tensor]
    Z: list[Tensor]
    P: list[Tensor]
    n: Normed
    g: Tensor
    u: Tensor


def learn(c: Call, weights: list[Tensor], begin: int, end: int) -> Written:
    """The serial part of chunks begin..end-1: gradients at each chunk's start, and its write."""
    grid, L = c.grid, len(c.held_g)
    W, b = ([x.new_empty(end - begin + 1, *x.shape) for x in weights[i::2]] for i in (0, 1))
    for stack, x in zip((*W, *b), (*weights[::2], *weights[1::2]), strict=True):
        stack[0] = x
    gamma2, rate = c.gamma * c.gamma, float(c.tau[-1])
    shift = c.gamma * (c.beta - c.v[begin:end] + c.k[begin:end])
    X, G, Z, P = ([[] for _ in range(L)] for _ in range(4))
    top: list[tuple[Tensor, ...]] = []
    for j, i in enumerate(range(begin, end)):
        x = c.k[i]
        for l in range(L):
            if l:
                x = gelu(Z[l - 1][j])
                if i == 0 and grid.held is not None:
                    x = torch.where(grid.held, c.held_x[l - 1], x)
            X[l].append(x)
            Z[l].append(torch.baddbmm(b[l][j], x, W[l][j]))
        n = normalise(Z[-1][j])
        g, u = inner_gradient(n, gamma2, shift[j])
        top.append((*n, g, u))
        G[-1].append(g * c.eta[i])
        for l in reversed(range(L - 1)):
            P[l].append(torch.bmm(G[l + 1][j], W[l + 1][j].mT))
            G[l].append(gelu_pull(P[l][j], Z[l][j]))
        if i == 0 and grid.held is not None:
            for l in range(L):
                G[l][0] = G[l][0] + c.held_g[l]
        if i not in grid.writes:
            for stack in (*W, *b):
                stack[j + 1] = stack[j]
        else:
            mask = grid.write_mask(i)
            for l in range(L):
                nextW, nextb = W[l][j + 1], b[l][j + 1]
                torch.baddbmm(W[l][j], X[l][j].mT, G[l][j], alpha=-rate, out=nextW)
                torch.sub(b[l][j], G[l][j].sum(1, keepdim=True), alpha=rate, out=nextb)
                for new, old, start in (
                    (nextW, W[l][j], c.start[2 * l]),
                    (nextb, b[l][j], c.start[2 * l + 1]),
                ):
                    if c.decay is not None:
                        torch.lerp(new, start, c.decay, out=new)
                    if mask is not None:
                        torch.where(mask, new, old, out=new)
    stacked = [[torch.stack(x) for x in xs] for xs in (X[1:], G, Z[:-1], P[:-1])]
    z, xh, mu, rstd, g, u = (torch.stack(x) for x in zip(*top, strict=True))
    keys = [c.k[begin:end], *stacked[0]]
    G_, Z_, P_ = stacked[1:]
    return Written(W, b, keys, G_, Z_, P_, Normed(z, xh, mu, rstd), g, u)


def read(
    c: Call, w: Written, begin: int, end: int
) -> tuple[Normed, list[tuple[Tensor, Tensor, Tensor]]]:
    """What the queries of chunks begin..end-1 read, all at once.

    Returns:
        The norm of the last layer's Zq, and per layer Xq, `S = Xq X^T + 1` and Zq, flat over
        chunks and rows.
    """
    lower, one = position_lower(c), c.tau.new_ones(1, 1, 1)
    x, kept = c.q[begin:end].flatten(0, 1), []
    m = end - begin
    z = x
    for l, (X, G) in enumerate(zip(w.X, w.G, strict=True)):
        if l:
            x = gelu(z)
        S = torch.baddbmm(one, x, X.flatten(0, 1).mT)
        z = torch.baddbmm(w.b[l][:m].flatten(0, 1), x, w.W[l][:m].flatten(0, 1))
        z.baddbmm_(S * lower, G.flatten(0, 1), alpha=-1)
        kept.append((x, S, z))
    n = normalise(z)
    return Normed(*(x.unflatten(0, (m, -1)) for x in n)), kept


def position_lower(c: Call) -> Tensor:
    """`tau_t` on and below the diagonal, 0 above: `[C, C]`."""
    return c.tau.unsqueeze(1).expand(-1, c.grid.C).tril()


def unfinished(grid: Grid, w: Written, tails: list[Tensor], begin: int, end: int) -> list[Tensor]:
    """The unfinished chunk's rows of G and X, if they lie in this group."""
    for i in range(begin, end):
        if grid.keeps(i):
            now = [x[i - begin] for x in (*w.G, *w.X[1:])]
            valid = grid.valid(i)
            if valid is not None:
                now = [torch.where(valid, x, 0) for x in now]
            if grid.last is not None:
                last = grid.last[i]
                now = [torch.where(last, x, y) for x, y in zip(now, tails, strict=True)]
            tails = now
    return tails
