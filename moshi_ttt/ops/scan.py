"""The chunks of a memory in turn, with a backward that keeps O(sqrt(chunks)) states.

It serves every memory whose function is a chain of affine layers with GELU between them (one layer:
TTT-Linear, two: TTT-MLP). Layer l reads inputs X (from keys) and Xq (from queries), both `[C, in]`,
and its rows G are eta times the inner gradient at its output, so that

    Zq = Xq W + b - (tau tril(Xq X^T + 1)) G        what the queries read
    W <- W - tau_{C-1} X^T G                        what the chunk writes

Only the writing is serial; the reading of a group of chunks is one batched call. The forward keeps
the weights at the start of each group of about sqrt(n) chunks, and the backward makes the rest
again, group by group. Every piece of it is ordinary but the VJP of the inner gradient, in `norm`.
Tensors are `[n, N, C, *]`, see `grid`; N = B * H.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moshi_ttt.ops.grid import Grid
from moshi_ttt.ops.norm import (
    Normed,
    gelu,
    gelu_pull,
    gelu_second,
    inner_gradient,
    inner_gradient_vjp,
    normalise,
    pull,
)


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
        W: per layer `[m + 1, N, in, out]`, chunk-start weights; the last may be unset.
        b: per layer `[m + 1, N, 1, out]`.
        X: per layer `[m, N, C, in]`.
        G: per layer `[m, N, C, out]`.
        Z: per layer but the last, outputs before GELU.
        P: per layer but the last, `G W^T` of the layer above.
        n: the layer norm of the last layer's output.
        g: inner gradient there.
        u: see `inner_gradient`.
        writes: of the m chunks, how many were written.
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
    writes: int


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
            w = _learn(call, weights, begin, end)
            weights = [x[w.writes] for pair in zip(w.W, w.b, strict=True) for x in pair]
            n, _ = _read(call, w, begin, end)
            torch.addcmul(call.q[begin:end] + call.beta, call.gamma, n.xh, out=o[begin:end])
            tails = _tails(grid, w, tails, begin, end)
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
        back = _Backward(call, grads)
        for begin in reversed(range(0, grid.n, size)):
            back.group(list(marks[begin // size]), begin, min(begin + size, grid.n))
        return None, None, None, *back.gradients()


def _unpack(grid: Grid, L: int, tensors: Any) -> tuple[Call, list[Tensor]]:
    """The call, and the weights it starts from."""
    rest = list(tensors[8:])
    start, weights, held = rest[: 2 * L], rest[2 * L : 4 * L], rest[4 * L :]
    return Call._make([grid, *tensors[:8], start, held[:L], held[L:]]), weights


def _learn(c: Call, weights: list[Tensor], begin: int, end: int) -> Written:
    """The serial part of chunks begin..end-1: gradients at each chunk's start, and its write."""
    grid, L = c.grid, len(c.held_g)
    W, b = ([x.new_empty(end - begin + 1, *x.shape) for x in weights[i::2]] for i in (0, 1))
    for stack, x in zip((*W, *b), (*weights[::2], *weights[1::2]), strict=True):
        stack[0] = x
    gamma2, rate = c.gamma * c.gamma, float(c.tau[-1])
    shift = c.gamma * (c.beta - c.v[begin:end] + c.k[begin:end])
    X, G, Z, P = ([[] for _ in range(L)] for _ in range(4))
    top: list[tuple[Tensor, ...]] = []
    writes = 0
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
        if i < grid.writes:
            writes += 1
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
    return Written(W, b, keys, G_, Z_, P_, Normed(z, xh, mu, rstd), g, u, writes)


def _read(
    c: Call, w: Written, begin: int, end: int
) -> tuple[Normed, list[tuple[Tensor, Tensor, Tensor]]]:
    """What the queries of chunks begin..end-1 read, all at once.

    Returns:
        The norm of the last layer's Zq, and per layer Xq, `S = Xq X^T + 1` and Zq, flat over
        chunks and rows.
    """
    lower, one = _lower(c), c.tau.new_ones(1, 1, 1)
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


def _lower(c: Call) -> Tensor:
    """`tau_t` on and below the diagonal, 0 above: `[C, C]`."""
    return c.tau.unsqueeze(1).expand(-1, c.grid.C).tril()


def _tails(grid: Grid, w: Written, tails: list[Tensor], begin: int, end: int) -> list[Tensor]:
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


class _Backward:
    """The cotangents while the groups are walked from last to first."""

    def __init__(self, call: Call, grads: Any) -> None:
        self.call, self.L = call, len(call.held_g)
        L = self.L
        c = call
        self.o = grads[0]
        self.W = [x.clone() for x in grads[1 : 1 + 2 * L : 2]]
        self.b = [x.clone() for x in grads[2 : 1 + 2 * L : 2]]
        self.tails = list(grads[1 + 2 * L :])
        self.q, self.k, self.v = (torch.empty_like(c.q) for _ in range(3))
        self.eta, self.tau = torch.empty_like(c.eta), torch.zeros_like(c.tau)
        self.gamma, self.beta = torch.zeros_like(c.gamma), torch.zeros_like(c.beta)
        self.decay = None if c.decay is None else torch.zeros_like(c.decay)
        self.start = [torch.zeros_like(x) for x in c.start]
        self.held = [torch.zeros_like(x) for x in (*c.held_g, *c.held_x)]

    def gradients(self) -> list[Tensor | None]:
        """In the order of the tensors that `scan` was given."""
        start = self.start
        if self.call.decay is not None:
            start = [x * self.call.decay for x in start]
        weights = [x for pair in zip(self.W, self.b, strict=True) for x in pair]
        slow = (self.tau, self.gamma, self.beta, self.decay)
        return [self.q, self.k, self.v, self.eta, *slow, *start, *weights, *self.held]

    def group(self, weights: list[Tensor], begin: int, end: int) -> None:
        """Chunks begin..end-1, whose first starts from `weights`."""
        c, L = self.call, self.L
        w = _learn(c, weights, begin, end)
        Xq, Zqb, Gb, Xb = self.read(w, begin, end)
        curve = [p * gelu_second(z) for p, z in zip(w.P, w.Z, strict=True)]
        away = None if c.decay is None else self.distances(w)
        ub = torch.empty_like(w.u)
        for j, i in reversed(list(enumerate(range(begin, end)))):
            G, X = [x[j] for x in Gb], [x[j] for x in Xb]
            if i < c.grid.writes:
                self.unwrite(w, j, i, G, X, away)
            if c.grid.keeps(i):
                self.untail(i, G, X)
            if i == 0 and c.grid.held is not None:
                self.unhold(c.grid.held, G)
            for l in range(L):
                self.W[l].baddbmm_(Xq[l][j].mT, Zqb[l][j])
                self.b[l].add_(Zqb[l][j].sum(1, keepdim=True))
            for l in range(L - 1):
                P = gelu_pull(G[l], w.Z[l][j])
                G[l + 1].baddbmm_(P, w.W[l + 1][j])
                self.W[l + 1].baddbmm_(P.mT, w.G[l + 1][j])
            torch.sum(G[-1] * w.g[j], -1, keepdim=True, out=self.eta[i])
            n = Normed(*(x[j] for x in w.n))
            gamma2 = c.gamma * c.gamma
            Z, ub[j] = inner_gradient_vjp(G[-1] * c.eta[i], n, w.g[j], w.u[j], gamma2)
            for l in reversed(range(L)):
                X[l].baddbmm_(Z, w.W[l][j].mT)
                self.W[l].baddbmm_(w.X[l][j].mT, Z)
                self.b[l].add_(Z.sum(1, keepdim=True))
                if l:
                    if i == 0 and c.grid.held is not None:
                        self.held[L + l - 1] = torch.where(c.grid.held, X[l], 0)
                        X[l] = torch.where(c.grid.held, 0, X[l])
                    Z = torch.addcmul(gelu_pull(X[l], w.Z[l - 1][j]), G[l - 1], curve[l - 1][j])
        rb = c.gamma * ub  # of -r
        self.v[begin:end] = -rb
        torch.add(Xb[0], rb, out=self.k[begin:end])
        self.beta.add_(rb.sum((0, 2)).unsqueeze(1))
        slope = torch.addcmul(c.beta - c.v[begin:end] + c.k[begin:end], 2 * c.gamma, w.n.xh)
        self.gamma.add_((ub * slope).sum((0, 2)).unsqueeze(1))

    def read(
        self, w: Written, begin: int, end: int
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Backward of what the queries read.

        Returns:
            Per layer: Xq, the cotangent of Zq, those of G and X.
        """
        c, m = self.call, end - begin
        n, kept = _read(c, w, begin, end)
        o = self.o[begin:end]
        self.gamma.add_((o * n.xh).sum((0, 2)).unsqueeze(1))
        self.beta.add_(o.sum((0, 2)).unsqueeze(1))
        Z = pull(o * c.gamma, n).flatten(0, 1)
        lower = _lower(c)
        Zb, Gb, Xb = ([torch.empty(0)] * self.L for _ in range(3))
        for l in reversed(range(self.L)):
            x, S, _ = kept[l]
            X, G = w.X[l].flatten(0, 1), w.G[l].flatten(0, 1)
            Zb[l] = Z
            A = torch.bmm(Z, G.mT).tril_()
            Gb[l] = torch.bmm((S * lower).mT, Z).neg_()
            self.tau.sub_((A * S).sum((0, 2)))
            A.mul_(-c.tau.unsqueeze(1))
            Xb[l] = torch.bmm(A.mT, x)
            x = torch.bmm(Z, w.W[l][:m].flatten(0, 1).mT).baddbmm_(A, X)
            if l:
                Z = gelu_pull(x, kept[l - 1][2])
            else:
                torch.add(o, x.unflatten(0, (m, -1)), out=self.q[begin:end])
        out = ([x for x, _, _ in kept], Zb, Gb, Xb)
        return tuple([x.unflatten(0, (m, -1)) for x in xs] for xs in out)  # pyright: ignore

    def distances(self, w: Written) -> list[tuple[Tensor, Tensor]]:
        """Per layer, `W - W0` and `b - b0` of the chunk-start weights."""
        start, m = self.call.start, w.g.shape[0]
        return [
            (W[:m] - start[2 * l], b[:m] - start[2 * l + 1])
            for l, (W, b) in enumerate(zip(w.W, w.b, strict=True))
        ]

    def unwrite(
        self,
        w: Written,
        j: int,
        i: int,
        G: list[Tensor],
        X: list[Tensor],
        away: list[tuple[Tensor, Tensor]] | None,
    ) -> None:
        """Backward of the write and decay at the end of chunk i: into G, X and the carried W."""
        c, rate = self.call, float(self.call.tau[-1])
        mask = c.grid.write_mask(i)
        for l in range(self.L):
            W, b = self.W[l], self.b[l]
            if mask is not None:
                W, b = torch.where(mask, W, 0), torch.where(mask, b, 0)
                self.W[l] = self.W[l] - W
                self.b[l] = self.b[l] - b
            R = torch.baddbmm(b, w.X[l][j], W)
            dot = (R * w.G[l][j]).sum((1, 2), keepdim=True)
            if away is not None:
                assert c.decay is not None
                assert self.decay is not None
                moved = (W * away[l][0][j]).sum((1, 2), keepdim=True)
                moved += (b * away[l][1][j]).sum(2, keepdim=True)
                self.decay.sub_(moved.sub_(dot, alpha=rate))
                self.start[2 * l].add_(W)
                self.start[2 * l + 1].add_(b)
                keep = 1 - c.decay
                W.mul_(keep)
                b.mul_(keep)
                R.mul_(keep)
                dot.mul_(keep)
            G[l].sub_(R, alpha=rate)
            X[l].baddbmm_(w.G[l][j], W.mT, alpha=-rate)
            self.tau[-1].sub_(dot.sum())
            if mask is not None:
                self.W[l] = self.W[l] + W
                self.b[l] = self.b[l] + b

    def untail(self, i: int, G: list[Tensor], X: list[Tensor]) -> None:
        """Backward of handing out the unfinished chunk's rows."""
        grid = self.call.grid
        for x, tail in zip((*G, *X[1:]), self.tails, strict=True):
            valid = grid.valid(i)
            if valid is not None:
                tail = torch.where(valid, tail, 0)
            if grid.last is not None:
                tail = torch.where(grid.last[i], tail, 0)
            x.add_(tail)

    def unhold(self, held: Tensor, G: list[Tensor]) -> None:
        """Backward of taking the buffers' rows of G."""
        for l in range(self.L):
            self.held[l] = torch.where(held, G[l], 0)
            G[l].masked_fill_(held, 0)
