"""One chunk of Atlas without Newton-Schulz, with a backward by hand.

With the rows X, U of the pairs, the queries' inputs x, and M and S of a matrix together as Y, `[N,
2, out, in]`, a layer is

    z = sum_i first_i (x Y_i^T) - (E * x X^T) U          what the queries read
    Y_i <- sum_j mix_ij Y_j + (last_i * U)^T X           what the chunk writes

By hand because autograd makes a tensor of the size of Y for every use of Y, and adds them up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moshi_ttt.ops.atlas_layers import Learned, learn
from moshi_ttt.ops.norm import gelu, gelu_pull, gelu_second


class Gates(NamedTuple):
    """What the gates of a chunk come to, see `atlas_scan`; C frames, L pairs.

    Attributes:
        first: `[N, C, 2]`, (a, -b).
        E: `[N, C, L]`.
        mix: `[N, 2, 2]`.
        last: `[N, L, 2]`.
    """

    first: Tensor
    E: Tensor
    mix: Tensor
    last: Tensor


class _Layer(NamedTuple):
    Y: Tensor
    X: Tensor
    U: Tensor
    x: Tensor
    both: Tensor  # x Y^T, [N, C, 2, out]
    K: Tensor  # x X^T


def plain_chunk(
    state: Sequence[Tensor],
    start: Sequence[Tensor],
    frames: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    gates: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """Outputs `[N, C, D]`, and M and S after the chunk; differentiable once.

    Args:
        state: M and S of each matrix, `[N, 2, out, in]`.
        start: chunk-start M of each matrix, `[N, out, in]`; empty: it is M.
        frames: phi(q), q, and the pairs' phi(k), k and v.
        gates: as `Gates`.
    """
    out = _Plain.apply(len(state), len(start), *state, *start, *frames, *gates)
    assert isinstance(out, tuple)
    return out[0], list(out[1:])


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, J: int, starts: int, *tensors: Tensor) -> Any:
        state, start = tensors[:J], tensors[J : J + starts]
        x, q, phi, k, v = tensors[J + starts : -4]
        gates = Gates(*tensors[-4:])
        learned = learn(start or [Y[:, 0] for Y in state], phi, k, v)
        z, new, kept = q, [], []
        for j, (Y, X, U) in enumerate(zip(state, learned.X, learned.U, strict=True)):
            if j:
                kept.append(z)
                x = gelu(z)
            z, after, layer = _forward(Y, X, U, x, gates)
            new.append(after)
            kept += layer[3:]
        ctx.J, ctx.starts = J, starts
        ctx.save_for_backward(*tensors, *learned.X, *learned.U, *learned.inner, *kept)
        return (q + z if J > 1 else z), *new

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, go: Tensor, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        J, starts = ctx.J, ctx.starts
        take = partial(_take, iter(ctx.saved_tensors))
        state, start, _, gates = take(J), take(starts), take(5), Gates(*take(4))
        learned = Learned(take(J), take(J), take(2 * (J - 1)))
        layers, Z = [], []
        for j in range(J):
            Z += take(1) if j else []
            layers.append(_Layer(state[j], learned.X[j], learned.U[j], *take(3)))
        gz, totals, pulls = go, [torch.zeros_like(x) for x in gates], []
        for j in reversed(range(J)):
            gx, *pull = _backward(layers[j], gates, gz, grads[j], totals)
            gz = gelu_pull(gx, Z[j - 1]) if j else gx
            pulls.insert(0, pull)
        gY, gX, gU = (list(x) for x in zip(*pulls, strict=True))
        W = start or [Y[:, 0] for Y in state]
        gW = [torch.zeros_like(w) for w in start] or [Y[:, 0] for Y in gY]
        gphi, gk, gv = _learn_backward(W, learned, gX, gU, gW)
        gq = go if J > 1 else None
        return None, None, *gY, *(gW if start else ()), gz, gq, gphi, gk, gv, *totals


def _take(tensors: Iterator[Tensor], n: int) -> list[Tensor]:
    return list(islice(tensors, n))


def _forward(
    Y: Tensor, X: Tensor, U: Tensor, x: Tensor, gates: Gates
) -> tuple[Tensor, Tensor, _Layer]:
    both = torch.bmm(x, Y.flatten(1, 2).mT).unflatten(-1, (2, -1))
    K = torch.bmm(x, X.mT)
    z = (both * gates.first.unsqueeze(-1)).sum(-2).baddbmm_(gates.E * K, U, alpha=-1)
    after = torch.bmm(gates.mix, Y.flatten(2)).view_as(Y)
    after.flatten(1, 2).baddbmm_(_twice(U, gates.last).mT, X)
    return z, after, _Layer(Y, X, U, x, both, K)


def _backward(
    l: _Layer, gates: Gates, gz: Tensor, grad: Tensor, totals: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cotangents of x, Y, X and U; those of the gates are added to `totals`."""
    gboth, gV = _twice(gz, gates.first), torch.bmm(l.X, grad.flatten(1, 2).mT)
    split = gV.unflatten(-1, (2, -1))
    gEK = torch.bmm(gz, l.U.mT)
    gK = gates.E * gEK
    totals[0] += (l.both * gz.unsqueeze(2)).sum(-1)
    totals[1] -= l.K * gEK
    totals[2] += torch.bmm(grad.flatten(2), l.Y.flatten(2).mT)
    totals[3] += (split * l.U.unsqueeze(2)).sum(-1)
    gU = (split * gates.last.unsqueeze(-1)).sum(2).baddbmm_((gates.E * l.K).mT, gz, alpha=-1)
    gX = torch.bmm(_twice(l.U, gates.last), grad.flatten(1, 2)).baddbmm_(gK.mT, l.x, alpha=-1)
    gx = torch.bmm(gboth, l.Y.flatten(1, 2)).baddbmm_(gK, l.X, alpha=-1)
    gY = torch.bmm(gates.mix.mT, grad.flatten(2)).view_as(l.Y)
    gY.flatten(1, 2).baddbmm_(gboth.mT, l.x)
    return gx, gY, gX, gU


def _twice(x: Tensor, factors: Tensor) -> Tensor:
    """`[N, rows, width]` times `[N, rows, 2]`: `[N, rows, 2 width]`."""
    return (x.unsqueeze(2) * factors.unsqueeze(-1)).flatten(2)


def _learn_backward(
    W: Sequence[Tensor],
    learned: Learned,
    gX: list[Tensor],
    gU: list[Tensor],
    gW: list[Tensor],
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Cotangents of phi(k), k and v; those of the matrices are added to `gW`."""
    phi, *h = learned.X
    if not h:
        e = 2 * gU[0]
        gW[0].baddbmm_(e.mT, phi)
        return gX[0].baddbmm_(e, W[0]), None, -e
    z, p = learned.inner
    gp = gelu_pull(gU[0], z)
    e = 2 * torch.baddbmm(gU[1], gp, W[1].mT)
    gW[1].baddbmm_(torch.cat([learned.U[1], e], 1).mT, torch.cat([gp, h[0]], 1))
    gh = torch.baddbmm(gX[1], e, W[1])
    gz = gelu_pull(gh, z).addcmul_(gU[0] * p, gelu_second(z))
    gW[0].baddbmm_(gz.mT, phi)
    return gX[0].baddbmm_(gz, W[0]), e, -e
