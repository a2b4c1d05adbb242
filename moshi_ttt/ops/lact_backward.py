"""LaCT's chunks, backward, by hand; letters as in `lact_chunks`.

A cotangent has the letter of its tensor. The double backward of the SwiGLUs is two walks: along
the chain of c, from the first layer to the last, and along the chain of x, back again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moshi_ttt.ops.lact_chunks import EPS, ROWS, Layer, Slow, Write
from moshi_ttt.ops.newton_schulz import TINY, newton_schulz_vjp


def chain_vjp(
    layers: list[Layer],
    W: Tensor,
    y: Tensor | None,
    residual: bool,
    extra: list[tuple[Tensor, Tensor, Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """VJP of the chain.

    Args:
        layers: of `chain`.
        W: `[3, N, r, F, D]`.
        y: cotangent of the last layer's output, None where it is not used.
        residual: whether a layer adds its input.
        extra: per layer, cotangents that x, a, b and h have besides.

    Returns:
        The cotangents of the chain's input and of W.
    """
    out = torch.empty_like(W)
    for j, (x, _, b, s, d, h) in reversed(list(enumerate(layers))):
        Wg, Wu, Wo = W[:, :, j]
        xb, ab, bb, hb = extra[j] if extra else (None, None, None, None)
        if y is not None:
            hb = _plus(hb, y, Wo.mT)
            out[2, :, j] = h.mT @ y
            if residual:
                xb = y if xb is None else xb + y
        else:
            out[2, :, j] = 0
        assert hb is not None
        hs = hb * s
        bb = hs if bb is None else bb + hs
        hd = hb * b * d
        ab = hd if ab is None else ab + hd
        out[0, :, j], out[1, :, j] = ab.mT @ x, bb.mT @ x
        y = _plus(_plus(xb, ab, Wg), bb, Wu)
    assert y is not None
    return y, out


def ascend_vjp(
    w: Write, G: Tensor, lr: Tensor, residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """VJP of `chain` and `ascend`, for the cotangent `G` `[3, N, r, F, D]` of the gradient.

    Returns:
        The cotangents of k, v, lr `[N, C, 3]` and W.
    """
    lg, lu, lo = (x.unsqueeze(-1) for x in lr.unbind(-1))
    rates, extra = torch.zeros_like(lr), []
    c = direct = None
    walked = []
    for j, (layer, up) in enumerate(zip(w.layers, w.ascents, strict=True)):
        x, a, b, s, d, h = layer
        Wg, Wu, Wo = w.W[:, :, j]
        Gg, Gu, Go = G[:, :, j]
        xGg, xGu, cGo = x @ Gg.mT, x @ Gu.mT, up.c @ Go.mT
        rates += torch.stack([(up.da * xGg).sum(-1), (up.db * xGu).sum(-1), (h * cGo).sum(-1)], -1)
        da, db = lg * xGg, lu * xGu
        if c is not None:
            direct = torch.zeros_like(w.W) if direct is None else direct
            da, db = _plus(da, c, Wg.mT), _plus(db, c, Wu.mT)
            direct[0, :, j], direct[1, :, j] = up.da.mT @ c, up.db.mT @ c
        bd, ps = b * d, da * up.p
        p = torch.addcmul(db * s, da, bd)
        walked.append(p)
        sig = torch.sigmoid(a)
        bend = sig * (1 - sig) * (2 + a * (1 - 2 * sig))
        extra.append(
            (
                _plus((lg * up.da) @ Gg, lu * up.db, Gu),
                torch.addcmul(db * up.p * d, ps, b * bend),
                ps * d,
                lo * cGo,
            )
        )
        c = _plus(_plus(c if residual else None, lo * h, Go), p, Wo)
    assert c is not None
    k, W = chain_vjp(w.layers, w.W, None, residual, extra)
    for j, (up, p) in enumerate(zip(w.ascents, walked, strict=True)):
        W[2, :, j] += p.mT @ up.c
    return k, c, rates, W if direct is None else W.add_(direct)


def write_vjp(
    slow: Slow, w: Write, gates: Tensor, W: Tensor, D: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """VJP of a write, down to the gradient that it is made of.

    Args:
        slow: as `Slow`.
        w: the write.
        gates: `[2, N, 1, 1, 1]`, as given to `write`.
        W: cotangent of the weights after it, `[3, N, r, F, D]`.
        D: cotangent of the momentum after it.
        mask: who writes, or None for everyone.

    Returns:
        The cotangents of the gradient, of the weights before (the direct path alone), of the
        momentum before, of the gates, and of the norms of the starts' rows.
    """
    old, W = torch.where(w.on, 0, W), torch.where(w.on, W, 0)
    U, norms = torch.addcmul(w.W, gates[1], w.O), []
    for (part, dim), S in zip(ROWS, slow[:2], strict=True):
        n = torch.linalg.vector_norm(U[part], dim=dim, keepdim=True)
        delta = (W[part] * U[part]).sum(dim, keepdim=True)
        norms.append(delta / (n + EPS))
        W[part] *= S / (n + EPS)
        W[part] -= U[part] * (norms[-1] * S / (n.clamp(min=TINY) * (n + EPS)))
    G = gates[1] * W
    if w.trace is not None:
        G = newton_schulz_vjp(G, w.trace)
    by = torch.zeros_like(gates)
    by[1] = (W * w.O).sum((0, 2, 3, 4)).view_as(gates[1])
    if slow.momentum:
        G = G + (D if mask is None else torch.where(mask, D, 0))
        by[0] = (G * w.D0).sum((0, 2, 3, 4)).view_as(gates[0])
        before = gates[0] * G
        D = before if mask is None else torch.where(mask, before, D)
    return G, old.add_(W), D, by, norms[0], norms[1]


def _plus(x: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """`x + a b`, batched; None is 0."""
    return torch.bmm(a, b) if x is None else torch.baddbmm(x, a, b)
