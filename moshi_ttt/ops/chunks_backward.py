"""A group of chunks, backward: recomputes the forward from the group's first weights.

See `scan` for the letters. Every piece is ordinary but the VJP of the inner gradient, in `norm`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moshi_ttt.ops.chunks import Call, Written, learn, position_lower, read
from moshi_ttt.ops.norm import Normed, gelu_pull, gelu_second, inner_gradient_vjp, pull


class Backward:
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
        w = learn(c, weights, begin, end)
        Xq, Zqb, Gb, Xb = self.read(w, begin, end)
        curve = [p * gelu_second(z) for p, z in zip(w.P, w.Z, strict=True)]
        away = None if c.decay is None else self.distances(w)
        ub = torch.empty_like(w.u)
        for j, i in reversed(list(enumerate(range(begin, end)))):
            G, X = [x[j] for x in Gb], [x[j] for x in Xb]
            if i in c.grid.writes:
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
        n, kept = read(c, w, begin, end)
        o = self.o[begin:end]
        self.gamma.add_((o * n.xh).sum((0, 2)).unsqueeze(1))
        self.beta.add_(o.sum((0, 2)).unsqueeze(1))
        Z = pull(o * c.gamma, n).flatten(0, 1)
        lower = position_lower(c)
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
