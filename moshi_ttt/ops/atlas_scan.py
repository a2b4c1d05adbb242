"""Atlas's chunks in turn, with a backward that keeps O(sqrt(chunks)) states.

The pairs (k_i, v_i) of a chunk are numbered from c - 1 frames before it, L = C + c - 1 in all, so
that the window of frame t is t <= i < t + c. With the chunk-start gradients g_i = U_i (x) X_i,

    S_t = P_t S + sum_i R_ti g_i                 P, R from theta, the window and gamma
    M_t = a_t M - sum_{s<=t} A_ts NS5(S_s)       a, A from alpha and eta

and without Newton-Schulz M_t is linear in the pairs: with `b = A P, E = A R`

    M_t = a_t M - b_t S - sum_i E_ti g_i,        x M_t = a_t x M - b_t x S - (E * x X^T)_t U

so that nothing of the size of M is made for a frame. A slot without a new frame has alpha = theta
= 1, eta = 0 and an empty window. Every factor is a product of gates, never a quotient: gates may
be 0. M and S of a matrix go together, `[N, 2, out, in]`; N = B * H.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from moshi_ttt.ops.atlas_chunk import plain_chunk
from moshi_ttt.ops.atlas_layers import features, learn, orthogonal
from moshi_ttt.ops.grid import Grid
from moshi_ttt.ops.norm import gelu
from moshi_ttt.ops.recompute import recomputed


def gates(
    grid: Grid, alpha: Tensor, eta: Tensor, theta: Tensor, gamma: Tensor, c: int, muon: bool
) -> list[Tensor]:
    """What the gates come to, for all chunks at once.

    Args:
        grid: where the frames lie.
        alpha: `[B, H, T]`, likewise eta and theta.
        eta: see alpha.
        theta: see alpha.
        gamma: `[N, c - 1 + n C]`, of each pair, 0 where there is none.
        c: the window.
        muon: whether Newton-Schulz stands between S and M.

    Returns:
        Tensors `[n, N, ...]`: `(a, -b)` `[C, 2]`, E `[C, L]`, the factors of (M, S) in (M, S) after
        the chunk `[2, 2]`, and those of the pairs `[L, 2]`. With `muon`: `(a, P)`, A `[C, C]`, R.
    """
    C, L = grid.C, grid.C + c - 1
    there = grid.lay(torch.ones_like(alpha).unsqueeze(-1))
    alpha, eta, theta = (grid.lay(x.unsqueeze(-1)) for x in (alpha, eta, theta))
    window = there.new_ones(C, L).triu().tril(c - 1)
    P, R = _decays(theta.where(there > 0, 1)).split([1, C], -1)
    R = (R * there.mT) @ window * gamma.unfold(1, L, C).transpose(0, 1).unsqueeze(2)
    a, A = _decays(alpha.where(there > 0, 1)).split([1, C], -1)
    A = A * eta.mT
    if muon:
        return [torch.cat([a, P], -1), A, R]
    b, E = (A @ torch.cat([P, R], -1)).split([1, L], -1)
    first = torch.cat([a, -b], -1)
    mix = torch.stack([first[..., -1, :], pad(P[..., -1, :], (1, 0))], -2)
    return [first, E, mix, torch.stack([-E[..., -1, :], R[..., -1, :]], -1)]


def _decays(x: Tensor) -> Tensor:
    """`[..., C, 1]` -> `[..., C, 1 + C]`: at (t, s) the product of x over s < r <= t, s from -1.

    Doubling, since the backward of `torch.cumprod` reads the host to look for zeros.
    """
    C = x.shape[-2]
    lower = x.new_ones(C, C + 1, dtype=torch.bool).tril()
    y, d = x.where(lower, 1), 1
    while d < C:
        y = y * pad(y[..., :-d, :], (0, 0, d, 0), value=1.0)
        d *= 2
    return y.tril(1)


def scan(
    grid: Grid,
    frames: tuple[Tensor, Tensor, Tensor],
    phi: list[Tensor],
    gates: list[Tensor],
    state: list[Tensor],
    start: list[Tensor],
    *,
    muon: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run the memory over a grid of frames; differentiable once in every tensor.

    Args:
        grid: where the frames lie; at least one chunk.
        frames: q `[N, n C, D]`, and k and v `[N, c - 1 + n C, D]`.
        phi: coef and proj, those there are, as `features` takes them.
        gates: from `gates`.
        state: M and S of each matrix, in the order of `learn`, `[N, 2, out, in]`.
        start: chunk-start M of each matrix, `[N, out, in]`; empty where it is M itself.
        muon: as in `gates`.

    Returns:
        Outputs `[N, n C, D]`, and `state` and `start` after the last frame.
    """
    C, J = grid.C, len(state)
    q, k, v = frames
    before = k.shape[1] - q.shape[1]
    size = math.isqrt(grid.n - 1) + 1
    outs = []
    for begin in range(0, grid.n, size):
        end = min(begin + size, grid.n)
        pairs = slice(begin * C, end * C + before)
        run = partial(_group, grid, begin, end, J, len(start), len(gates), muon)
        tensors = (*state, *start, q[:, begin * C : end * C], k[:, pairs], v[:, pairs])
        o, *rest = recomputed(run, *tensors, *(x[begin:end] for x in gates), *phi)
        outs.append(o)
        state, start = rest[:J], rest[J:]
    return torch.cat(outs, 1), state, start


def _group(
    grid: Grid, begin: int, end: int, J: int, starts: int, terms: int, muon: bool, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """Chunks begin..end-1: outputs, M and S, and the chunk-start M unless all rows have it at M."""
    state, start = list(tensors[:J]), list(tensors[J : J + starts])
    q, k, v, *rest = tensors[J + starts :]
    factors, phi = rest[:terms], rest[terms:]
    outs, C, before = [], grid.C, k.shape[1] - q.shape[1]
    phi_q, phi_k = features(q, *phi), features(k, *phi)
    for i in range(begin, end):
        slots = slice((i - begin) * C, (i - begin + 1) * C)
        pairs = slice(slots.start, slots.stop + before)
        frames = (phi_q[:, slots], q[:, slots], phi_k[:, pairs], k[:, pairs], v[:, pairs])
        now = [x[i - begin] for x in factors]
        if i not in grid.writes:
            start = start or [x[:, 0] for x in state]
        if muon:  # NS5 keeps ten times the size of its input, and a chunk has C of them
            run = partial(_muon, len(state), len(start))
            o, *state = recomputed(run, *state, *start, *frames, *now)
        else:
            o, state = plain_chunk(state, start, frames, now)
        outs.append(o)
        if i in grid.writes:
            full = grid.write_mask(i)
            pairs = zip(state, start, strict=True)
            start = [] if full is None else [torch.where(full, x[:, 0], y) for x, y in pairs]
    if grid.start is not None and end < grid.n:
        return torch.cat(outs, 1), *state
    return torch.cat(outs, 1), *state, *(x.clone() for x in start or [x[:, 0] for x in state])


def _muon(J: int, starts: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """One chunk with Newton-Schulz: outputs, and M and S after it."""
    state, start = tensors[:J], tensors[J : J + starts]
    x, q, phi, k, v, first, A, R = tensors[J + starts :]
    a, P = first.unsqueeze(-1).unbind(2)
    z, after = q, []
    learned = learn(start or [x[:, 0] for x in state], phi, k, v)
    for j, (Y, X, U) in enumerate(zip(state, learned.X, learned.U, strict=True)):
        x = gelu(z) if j else x
        M, S = Y.unbind(1)
        U = R.unsqueeze(-1) * U.unsqueeze(1)
        S = torch.matmul(U.mT, X.unsqueeze(1)) + P.unsqueeze(-1) * S.unsqueeze(1)
        O = orthogonal(S)
        read = torch.matmul(x.unsqueeze(1), O.mT)
        z = a * torch.bmm(x, M.mT) - (A.mT.unsqueeze(-1) * read).sum(1)
        M = a[:, -1:] * M - torch.bmm(A[:, -1:], O.flatten(2)).view_as(M)
        after.append(torch.stack([M, S[:, -1]], 1))
    return (q + z if J > 1 else z), *after
