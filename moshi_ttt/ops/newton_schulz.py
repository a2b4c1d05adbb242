"""Newton-Schulz: the nearest matrix with orthonormal rows or columns, about, and its gradient.

    X0 = x / (||x||_F + 1e-7), transposed if tall
    X' = a X + (b A + c A^2) X,  A = X X^T       five times, each with its own a, b, c

The singular values of x that are not tiny end within a few percent of 1. It runs in float32 or
better: in bfloat16 a wide matrix of low rank leaves its own column space. An exactly zero matrix
stays zero and passes no gradient, where the formula's own would be about 5e9.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""a, b, c of the five steps."""

EPS = 1e-7
"""Added to the Frobenius norm."""

TINY = 1e-12
"""The least norm that a gradient of a norm divides by."""


class Trace(NamedTuple):
    """What `newton_schulz_vjp` needs of a forward, `[N, m, n]` with m <= n.

    Attributes:
        n: `||x||_F`, `[N, 1, 1]`.
        X: the matrix before each step.
        A: `X X^T` of each step, `[N, m, m]`.
        B: `b A + c A^2` of each step, `[N, m, m]`.
    """

    n: Tensor
    X: list[Tensor]
    A: list[Tensor]
    B: list[Tensor]


def newton_schulz(x: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
    """`x` with its singular values brought near 1; differentiable by autograd.

    Args:
        x: any shape of matrix, raised to float32 if its precision is lower.

    Returns:
        The same shape, float32 or float64.
    """
    X, n = _wide(x)
    X = X * _scale(n)
    for abc in COEFFICIENTS:
        X, _, _ = _step(X, *abc)
    return _unwide(X, x.shape)


def newton_schulz_trace(x: Float[Tensor, "*batch m n"]) -> tuple[Tensor, Trace]:
    """`newton_schulz(x)`, and what its backward needs. Not for use under autograd."""
    X, n = _wide(x)
    X = X * _scale(n)
    trace = Trace(n, [], [], [])
    for abc in COEFFICIENTS:
        trace.X.append(X)
        X, A, B = _step(X, *abc)
        trace.A.append(A)
        trace.B.append(B)
    return _unwide(X, x.shape), trace


def newton_schulz_vjp(y: Float[Tensor, "*batch m n"], trace: Trace) -> Float[Tensor, "*batch m n"]:
    """VJP of `newton_schulz` with cotangent `y`, the shape of its input.

    A step with cotangent Y: `Xb = a Y + B Y + S X` with `R = Y X^T + X Y^T`,
    `S = b R + c (R A + A R)`. The normalisation:
    `xb = X0b / (n + eps) - X0 <X0b, X0> / max(n, 1e-12)`, for `X0 = x / (n + eps)`.
    """
    Y, X = _wide(y)[0], trace.X
    steps = zip(COEFFICIENTS, X, trace.A, trace.B, strict=True)
    for (a, b, c), X, A, B in reversed(list(steps)):
        R = Y @ X.mT
        R = R + R.mT
        RA = R @ A
        S = torch.add(b * R, RA + RA.mT, alpha=c)
        Y = torch.baddbmm(torch.baddbmm(Y, B, Y, beta=a), S, X)
    X0 = trace.X[0]
    inner = (Y * X0).sum((-2, -1), keepdim=True)
    Y = Y * _scale(trace.n) - X0 * (inner / trace.n.clamp(min=TINY))
    return _unwide(Y, y.shape)


def _step(X: Tensor, a: float, b: float, c: float) -> tuple[Tensor, Tensor, Tensor]:
    A = X @ X.mT
    B = torch.baddbmm(A, A, A, beta=b, alpha=c)
    return torch.baddbmm(X, B, X, beta=a), A, B


def _wide(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` as `[N, m, n]`, m <= n, in float32 or better, and its norm `[N, 1, 1]`."""
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    X = x.reshape(-1, *x.shape[-2:])
    X = X.mT if X.shape[1] > X.shape[2] else X
    return X, torch.linalg.vector_norm(X, dim=(1, 2), keepdim=True)


def _unwide(X: Tensor, shape: torch.Size) -> Tensor:
    return (X.mT if shape[-2] > shape[-1] else X).reshape(shape)


def _scale(n: Tensor) -> Tensor:
    """`1 / (n + eps)`, and 0 where the matrix is 0."""
    return torch.where(n > 0, 1 / (n + EPS), 0)
