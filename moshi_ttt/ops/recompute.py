"""Keep the inputs of a function for its backward, and make the rest again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *tensors: Tensor) -> Any:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        leaves, out = again(ctx.function, ctx.saved_tensors, ctx.needs_input_grad[1:])
        return None, *gradients(out, grads, leaves)


def again(
    function: Callable[..., Any], tensors: Iterable[Tensor], wanted: Iterable[bool]
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Leaves in place of `tensors`, and the function's outputs on them."""
    pairs = zip(tensors, wanted, strict=True)
    leaves = [x.detach().requires_grad_(w) for x, w in pairs]
    with torch.enable_grad():
        out = function(*leaves)
    return leaves, out if isinstance(out, tuple) else (out,)


def gradients(
    out: tuple[Tensor, ...], grads: tuple[Tensor, ...], leaves: list[Tensor]
) -> list[Tensor | None]:
    """The gradient of each of `leaves`, None where none is wanted."""
    inputs = [x for x in leaves if x.requires_grad]
    if not inputs:
        return [None] * len(leaves)
    pairs = [(o, g) for o, g in zip(out, grads, strict=True) if o.requires_grad]
    outputs, cotangents = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in leaves]


def recomputed(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """`function(*tensors)`, keeping for the backward nothing but `tensors`.

    Unlike `torch.utils.checkpoint` it hides nothing from saved-tensor hooks and leaves the random
    state alone; `function` must be deterministic and read no other tensor that needs gradients.
    """
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return function(*tensors)
    return _Recomputed.apply(function, *tensors)
