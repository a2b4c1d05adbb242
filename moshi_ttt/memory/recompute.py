"""A product with a weight that keeps its arguments for the backward, and makes the rest again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moshi_ttt.ops.recompute import again, gradients, recomputed

__all__ = ["recomputed", "recomputed_linear"]


class _RecomputedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], weight: Tensor, *tensors: Tensor) -> Any:
        ctx.function = function
        ctx.save_for_backward(weight, *tensors)
        return F.linear(function(*tensors), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, *tensors = ctx.saved_tensors
        leaves, (x,) = again(ctx.function, tensors, ctx.needs_input_grad[2:])
        slope = None
        if ctx.needs_input_grad[1]:
            slope = grad.flatten(0, -2).mT @ x.detach().flatten(0, -2)
        return None, slope, *gradients((x,), (grad @ weight,), leaves)


def recomputed_linear(function: Callable[..., Tensor], weight: Tensor, *tensors: Tensor) -> Tensor:
    """`function(*tensors) @ weight^T`, keeping for the backward nothing but its arguments.

    Only `function` is computed again, not the product. See `recomputed`.
    """
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in (weight, *tensors))):
        return F.linear(function(*tensors), weight)
    out = _RecomputedLinear.apply(function, weight, *tensors)
    assert isinstance(out, Tensor)
    return out
