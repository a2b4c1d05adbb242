"""Initialisers that do nothing where nothing is stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_FILLS = {
    Tensor.add_,
    Tensor.clamp_,
    Tensor.erfinv_,
    Tensor.fill_,
    Tensor.mul_,
    Tensor.normal_,
    Tensor.uniform_,
    Tensor.zero_,
    nn.init.kaiming_uniform_,  # inside it no method is seen
}
"""What `torch.nn.init` is made of."""


class Unfilled(TorchFunctionMode):
    """Inside, what would fill a tensor on the meta device leaves it as it is.

    It has no numbers, yet torch takes milliseconds a tensor to go through the motions: most of the
    time that a 7B takes to be built there.
    """

    def __torch_function__(  # noqa: D105
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FILLS and (x := args[0] if args else kwargs["tensor"]).is_meta:
            return x
        return func(*args, **kwargs)
