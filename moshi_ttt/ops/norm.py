"""What memories share: layer norm, its gradients, GELU's derivatives, the least precision."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

EPS = 1e-6
"""Added to the variance (layer norm) or the mean square (RMS norm)."""


class Normed(NamedTuple):
    """A layer norm without its affine part, and what its gradients need.

    Attributes:
        z: the input, `[..., D]`.
        xh: `(z - mu) / sigma`, `[..., D]`.
        mu: mean of `z`, `[..., 1]`.
        rstd: `1 / sigma = 1 / sqrt(var + eps)`, population variance, `[..., 1]`.
    """

    z: Tensor
    xh: Tensor
    mu: Tensor
    rstd: Tensor


def raised(x: Tensor) -> Tensor:
    """`x` in float32, or as it is if that is float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def normalise(z: Float[Tensor, "*batch D"]) -> Normed:
    """`xh = (z - mu) / sigma` in one kernel. Not for use under autograd."""
    return Normed(z, *torch.native_layer_norm(z, z.shape[-1:], None, None, EPS))


def pull(y: Float[Tensor, "*batch D"], n: Normed) -> Float[Tensor, "*batch D"]:
    """VJP of `xh` with respect to `z`: `(y - mean(y) - xh * mean(y * xh)) / sigma`."""
    return torch.ops.aten.native_layer_norm_backward(
        y, n.z, n.z.shape[-1:], n.mu, n.rstd, None, None, [True, False, False]
    )[0]


def inner_gradient(n: Normed, gamma2: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of `1/2 ||gamma * xh + beta - r||^2` at `z` (arXiv:2407.04620, section 2.5).

        u = gamma * (gamma * xh + beta - r);  g = (u - mean(u) - xh * mean(u * xh)) / sigma

    Args:
        n: the norm at `z`, `[..., D]`.
        gamma2: `gamma ** 2`, broadcastable to `z`.
        shift: `gamma * (beta - r)`, the shape of `z`; the part of `u` known before `z` is.

    Returns:
        `g` and `u`, the shape of `z`.
    """
    u = torch.addcmul(shift, gamma2, n.xh)
    return pull(u, n), u


def inner_gradient_vjp(
    G: Tensor, n: Normed, g: Tensor, u: Tensor, gamma2: Tensor
) -> tuple[Tensor, Tensor]:
    """VJP of `inner_gradient` with cotangent `G` of `g`.

    Returns:
        The cotangent of `z`, and `ub`, that of `u`; from `ub` follow those of the target,
        `-gamma * ub`, of gamma, `ub * (2 * gamma * xh + beta - r)`, and of beta, `gamma * ub`.
    """
    ub = pull(G, n)
    m = (u * n.xh).mean(-1, keepdim=True)
    a_xh = (G * n.xh).mean(-1, keepdim=True)
    xhb = torch.addcmul(gamma2 * ub, torch.addcmul(G * m, u, a_xh), n.rstd, value=-1)
    sb = (G * g).mean(-1, keepdim=True) * n.rstd
    return torch.addcmul(pull(xhb, n), n.xh, sb, value=-1), ub


def gelu(x: Tensor) -> Tensor:
    """`x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`: GELU is the tanh form everywhere."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def gelu_pull(y: Tensor, x: Tensor) -> Tensor:
    """`y * gelu'(x)`."""
    return torch.ops.aten.gelu_backward(y, x, approximate="tanh")


def gelu_second(x: Tensor) -> Tensor:
    """`gelu''(x)`, with `w = c (x + a x^3)`: `sech(w)^2 (w' + x/2 w'' - x tanh(w) w'^2)`."""
    c, a = math.sqrt(2 / math.pi), 0.044715
    x2 = x * x
    th = torch.tanh(x * (c + c * a * x2))
    d1 = c + (3 * c * a) * x2
    return (1 - th * th) * torch.addcmul(d1 + (3 * c * a) * x2, x * th, d1 * d1, value=-1)
