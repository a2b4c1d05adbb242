"""Keep the inputs of a function for its backward, and make the rest again."""

from __future__ import annotations

from collections.abc import Callable
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
        wanted = ctx.needs_input_grad[1:]
        tensors = [
            x.detach().requires_grad_(w) for x, w in zip(ctx.saved_tensors, wanted, strict=True)
        ]
        with torch.enable_grad():
            out = ctx.function(*tensors)
        out = out if isinstance(out, tuple) else (out,)
        pairs = [(o, g) for o, g in zip(out, grads, strict=True) if o.requires_grad]
        inputs = [x for x in tensors if x.requires_grad]
        outputs, grads = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, inputs, grads, allow_unused=True))
        return None, *(next(found) if w else None for w in wanted)


def recomputed(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """`function(*tensors)`, keeping for the backward nothing but `tensors`.

    Unlike `torch.utils.checkpoint` it hides nothing from saved-tensor hooks and leaves the random
    state alone; `function` must be deterministic and read no other tensor that needs gradients.
    """
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return function(*tensors)
    return _Recomputed.apply(function, *tensors)
