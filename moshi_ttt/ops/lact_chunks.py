"""LaCT's chunks, forward: the SwiGLUs, what a chunk writes, and what its queries read.

The three matrices of a head live in one tensor `[3, N, r, F, D]`, Wo transposed, so that they share
their shape; N = B * H. With rows as frames, layer j of the chain takes x to

    a = x Wg^T,  b = x Wu^T,  s = silu(a),  h = s * b,  f(x) = h Wo^T        (x + f(x): residual)

and, against it, the ascent direction c of the layer's output (v at the last) to

    p = c Wo,  da = p * b * silu'(a),  db = p * s,  c' = da Wg + db Wu       (c + ...: residual)

Nothing here writes in place: autograd can go through all of it. `lact_backward` goes by hand.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moshi_ttt.ops.newton_schulz import Trace, newton_schulz, newton_schulz_trace

Matrices = Tensor | tuple[Tensor, Tensor, Tensor]
"""Wg, Wu, Wo `[N, r, F, D]`, the last transposed; in one tensor or in three."""

EPS = 1e-5
"""Added to the norm of a row before dividing by it."""

ROWS = ((slice(0, 2), -1), (slice(2, 3), -2))
"""The rows of Wg and Wu run along the last axis, those of Wo, transposed, along the one before."""


class Slow(NamedTuple):
    """What does not change during a call.

    Attributes:
        gu: `[2, N, r, F, 1]`, norms of the rows of the starts of Wg and Wu.
        o: `[1, N, r, 1, D]`, norms of the rows of the start of Wo.
        momentum: whether D is carried.
        muon: whether D passes Newton-Schulz.
        residual: whether a layer adds its input.
    """

    gu: Tensor
    o: Tensor
    momentum: bool
    muon: bool
    residual: bool


class Layer(NamedTuple):
    """A layer's activations, `[N, C, D]` or `[N, C, F]`; `d` is silu'(a)."""

    x: Tensor
    a: Tensor
    b: Tensor
    s: Tensor
    d: Tensor
    h: Tensor


class Ascent(NamedTuple):
    """The chain back through a layer, `[N, C, D]` or `[N, C, F]`."""

    c: Tensor
    p: Tensor
    da: Tensor
    db: Tensor


class Write(NamedTuple):
    """A chunk's write and what its backward needs.

    Attributes:
        W: `[3, N, r, F, D]`, chunk-start weights.
        D0: the momentum before; the layers' axis is empty without one.
        D: the momentum after, or the gradient itself.
        O: what is added to W, before its rate: D, or what Newton-Schulz makes of it.
        trace: of Newton-Schulz, where there is one and it was asked for.
        on: `[3, N, r, 1, 1]` bool, matrices that are written.
        layers: of the keys.
        ascents: of the values.
    """

    W: Tensor
    D0: Tensor
    D: Tensor
    O: Tensor
    trace: Trace | None
    on: Tensor
    layers: list[Layer]
    ascents: list[Ascent]


def pack(g: Tensor, u: Tensor, o: Tensor) -> Tensor:
    """Matrices `[B, H, r, ., .]` of g, u and o as `[3, N, r, F, D]`."""
    return torch.stack([g, u, o.mT]).flatten(1, 2)


def unpack(W: Tensor, B: int, H: int) -> tuple[Tensor, Tensor, Tensor]:
    """The way back from `pack`, as views."""
    g, u, o = (x.unflatten(0, (B, H)) for x in W)
    return g, u, o.mT


def recall(x: Tensor, W: Matrices, residual: bool) -> tuple[Tensor, list[Layer]]:
    """`M(x)` of `[N, C, D]`, and the layers on the way."""
    layers = chain(x, W, residual)
    return output(layers[-1], W[2][:, -1], residual), layers


def chain(x: Tensor, W: Matrices, residual: bool) -> list[Layer]:
    """The layers that `x` `[N, C, D]` passes, without what the last hands on."""
    layers: list[Layer] = []
    for j in range(W[0].shape[1]):
        if j:
            x = output(layers[-1], W[2][:, j - 1], residual)
        a, b = x @ W[0][:, j].mT, x @ W[1][:, j].mT
        sig = torch.sigmoid(a)
        s = a * sig
        layers.append(Layer(x, a, b, s, sig + s * (1 - sig), s * b))
    return layers


def output(layer: Layer, Wo: Tensor, residual: bool) -> Tensor:
    """What a layer hands on; `Wo` `[N, F, D]`, transposed."""
    return torch.baddbmm(layer.x, layer.h, Wo) if residual else layer.h @ Wo


def ascend(
    layers: list[Layer], v: Tensor, lr: Tensor, W: Tensor, residual: bool
) -> tuple[Tensor, list[Ascent]]:
    """The gradient of `<M(k), v>`, each frame's times its learning rates `[N, C, 3]`."""
    lg, lu, lo = (x.unsqueeze(-1) for x in lr.unbind(-1))
    c, gradients, ascents = v, list[Tensor](), list[Ascent]()
    for j, (x, _, b, s, d, h) in reversed(list(enumerate(layers))):
        p = c @ W[2, :, j].mT
        da, db = p * b * d, p * s
        ascents.append(Ascent(c, p, da, db))
        G = [da.mT @ (lg * x), db.mT @ (lu * x), (lo * h).mT @ c]
        gradients.append(torch.stack(G))
        if j:
            c = torch.baddbmm(c if residual else c.new_zeros(()), da, W[0, :, j])
            c = torch.baddbmm(c, db, W[1, :, j])
    return torch.stack(gradients[::-1], 2), ascents[::-1]


def write(
    slow: Slow,
    W: Tensor,
    D0: Tensor,
    frames: tuple[Tensor, Tensor, Tensor],
    gates: Tensor,
    mask: Tensor | None,
    trace: bool = False,
) -> tuple[Tensor, Tensor, Write]:
    """The write at the end of a chunk.

    Args:
        slow: as `Slow`.
        W: `[3, N, r, F, D]`, chunk-start weights.
        D0: the momentum, likewise; its layers' axis is empty without one.
        frames: k, v `[N, C, D]` and lr `[N, C, 3]` of the whole chunk.
        gates: `[2, N, 1, 1, 1]`, momentum and `eta * w`.
        mask: `[N, 1, 1, 1]` bool, who writes, or None for everyone.
        trace: keep the steps of Newton-Schulz for the backward.

    Returns:
        Weights and momentum for the next chunk, and what the backward needs.
    """
    k, v, lr = frames
    layers = chain(k, W, slow.residual)
    D, ascents = ascend(layers, v, lr, W, slow.residual)
    if slow.momentum:
        D = torch.addcmul(D, gates[0], D0)
    O, steps = D, None
    if slow.muon:
        O, steps = newton_schulz_trace(D) if trace else (newton_schulz(D), None)
    on = D.ne(0).flatten(-2).any(-1)[..., None, None] & gates[1].ne(0)
    on = on if mask is None else on & mask
    U = torch.addcmul(W, gates[1], O)
    parts = [
        U[part] * (start / (torch.linalg.vector_norm(U[part], dim=dim, keepdim=True) + EPS))
        for (part, dim), start in zip(ROWS, slow[:2], strict=True)
    ]
    kept = D0
    if slow.momentum:
        kept = D if mask is None else torch.where(mask, D, D0)
    new = torch.where(on, torch.cat(parts), W)
    return new, kept, Write(W, D0, D, O, steps, on, layers, ascents)
