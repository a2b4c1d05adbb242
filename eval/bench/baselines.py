"""What the training of the memories is measured against: plain autograd.

It computes the function of `moshi_ttt.ops.ttt_linear` and `ttt_mlp`; the benchmark checks it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moshi_ttt.ops.grid import Grid
from moshi_ttt.ops.norm import EPS, gelu


def plain_scan(
    grid: Grid,
    frames: tuple[Tensor, Tensor, Tensor, Tensor],
    slow: tuple[Tensor, Tensor, Tensor, Tensor | None],
    start: list[Tensor],
    weights: list[Tensor],
    held_g: list[Tensor],
    held_x: list[Tensor],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """`moshi_ttt.ops.scan.scan` as one writes it down: chunk after chunk, through autograd.

    For rows that stand together at the start of a chunk.

    Raises:
        ValueError: they do not, or the call ends inside a chunk.
    """
    if grid.start != 0 or grid.leftover:
        raise ValueError("the baseline takes whole chunks")
    q, k, v, eta = frames
    tau, gamma, beta, decay = slow
    lower = tau.unsqueeze(1).expand(-1, grid.C).tril()
    outputs = []
    for i in range(grid.n):
        X, Z = [k[i]], []
        for W, b in zip(weights[::2], weights[1::2], strict=True):
            if Z:
                X.append(gelu(Z[-1]))
            Z.append(torch.baddbmm(b, X[-1], W))
        xh, rstd = _ln(Z[-1])
        u = gamma * (gamma * xh + beta - (v[i] - k[i]))
        g = (u - u.mean(-1, keepdim=True) - xh * (u * xh).mean(-1, keepdim=True)) * rstd
        G = [eta[i] * g]
        for W, z in zip(reversed(weights[2::2]), reversed(Z[:-1]), strict=True):
            G.insert(0, (G[0] @ W.mT) * gelu_slope(z))
        x, z = q[i], q[i]
        for l, (W, b) in enumerate(zip(weights[::2], weights[1::2], strict=True)):
            if l:
                x = gelu(z)
            z = torch.baddbmm(b, x, W) - (lower * (x @ X[l].mT + 1)) @ G[l]
        outputs.append(q[i] + gamma * _ln(z)[0] + beta)
        new = []
        for l, (W, b) in enumerate(zip(weights[::2], weights[1::2], strict=True)):
            new.append(torch.baddbmm(W, (tau[-1] * X[l]).mT, G[l], alpha=-1))
            new.append(b - tau[-1] * G[l].sum(1, keepdim=True))
        if decay is not None:
            new = [torch.lerp(w, w0, decay) for w, w0 in zip(new, start, strict=True)]
        weights = new
    return torch.stack(outputs), list(weights), held_g, held_x


def _ln(z: Tensor) -> tuple[Tensor, Tensor]:
    """`(z - mu) / sigma` and `1 / sigma`."""
    z = z - z.mean(-1, keepdim=True)
    rstd = (z.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return z * rstd, rstd


def gelu_slope(x: Tensor) -> Tensor:
    """`gelu'(x)`, of the tanh form."""
    c, a = (2 / torch.pi) ** 0.5, 0.044715
    th = torch.tanh(c * x * (1 + a * x * x))
    return 0.5 * (1 + th) + 0.5 * c * x * (1 - th * th) * (1 + 3 * a * x * x)
