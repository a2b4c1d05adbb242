"""Atlas's function of a frame and its inner gradient, as rows; shared by chunks and by the step.

    deep      M(x) = x + W1 gelu_tanh(W2 phi(x))
    linear    M(x) = W1 phi(x)

The inner gradient of a frame at a matrix W is an outer product: of the layer's input, a row of X,
and of the loss's gradient at the layer's output, a row of U. `gamma` is not in it. Matrices come
in the order they are applied: `[W2, W1]`, or `[W1]` alone. Tensors are `[N, rows, width]`,
N = B * H.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moshi_ttt.ops.newton_schulz import Trace, newton_schulz, newton_schulz_trace, newton_schulz_vjp
from moshi_ttt.ops.norm import gelu, gelu_pull, gelu_second


class Learned(NamedTuple):
    """The inner gradients of some pairs, `sum_i U_i (x) X_i` for each matrix.

    Attributes:
        X: per matrix `[N, rows, in]`, the layer's inputs.
        U: per matrix `[N, rows, out]`, gradients of `||M(k) - v||^2` at its outputs.
        inner: deep: what GELU was applied to, and the gradient behind it; linear: nothing.
    """

    X: list[Tensor]
    U: list[Tensor]
    inner: list[Tensor]


def features(x: Tensor, coef: Tensor | None = None, proj: Tensor | None = None) -> Tensor:
    """Phi of `x` `[N, rows, D]`: `[N, rows, P]`.

    Args:
        x: frames.
        coef: `[N, 2]`, or None for phi(x) = x.
        proj: `[H, R, D(D+1)/2]`, or None for elementwise squares.
    """
    if coef is None:
        return x
    first, second = coef[:, :, None, None].unbind(1)
    if proj is None:
        return torch.cat([first * x, second * (x * x)], -1)
    H, D = len(proj), x.shape[-1]
    y = x.unflatten(0, (-1, H)).transpose(0, 1)  # proj is read once for all batch rows
    i, j = torch.triu_indices(D, D, device=x.device)
    scaled = torch.cat([y, math.sqrt(2) * y], -1)
    products = y[..., i] * scaled[..., j + D * (i < j)]
    z = torch.bmm(products.flatten(1, 2), proj.mT).view(H, *y.shape[1:3], -1)
    return torch.cat([first * x, second * z.transpose(0, 1).flatten(0, 1)], -1)


def learn(W: Sequence[Tensor], phi: Tensor, k: Tensor, v: Tensor) -> Learned:
    """The inner gradients of the pairs (k, v) at `W`; `phi` is that of k."""
    if len(W) == 1:
        return Learned([phi], [2 * (torch.bmm(phi, W[0].mT) - v)], [])
    z = torch.bmm(phi, W[0].mT)
    h = gelu(z)
    u = 2 * torch.baddbmm(k - v, h, W[1].mT)
    p = torch.bmm(u, W[1])
    return Learned([phi, h], [slope(p, z), u], [z, p])


def slope(y: Tensor, x: Tensor) -> Tensor:
    """`y * gelu'(x)`, differentiable once."""
    if not torch.is_grad_enabled():
        return gelu_pull(y, x)
    out = _Slope.apply(y, x)
    assert isinstance(out, Tensor)
    return out


class _Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(y, x)
        return gelu_pull(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, x = ctx.saved_tensors
        return gelu_pull(grad, x), grad * y * gelu_second(x)


def orthogonal(x: Tensor) -> Tensor:
    """`newton_schulz(x)` with the backward made by hand, which multiplies less than autograd's."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return newton_schulz(x)
    out = _Orthogonal.apply(x)
    assert isinstance(out, Tensor)
    return out


class _Orthogonal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out, trace = newton_schulz_trace(x)
        ctx.save_for_backward(trace.n, *trace.X, *trace.A, *trace.B)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        n, *rest = ctx.saved_tensors
        steps = len(rest) // 3
        X, A, B = (rest[i : i + steps] for i in range(0, 3 * steps, steps))
        return newton_schulz_vjp(grad, Trace(n, X, A, B))
