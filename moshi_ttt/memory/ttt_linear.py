"""The TTT-Linear memory: slow weights around `moshi_ttt.ops.ttt_linear`."""

from __future__ import annotations

import torch
from torch import nn

from moshi_ttt.config import TTTConfig
from moshi_ttt.memory.base import full
from moshi_ttt.memory.ttt import TTT
from moshi_ttt.ops import ttt_linear


class TTTLinear(TTT):
    """A memory whose fast weights are one linear map per head (arXiv:2407.04620).

    `W0 ~ N(0, 0.02)`, bias 0. See `TTT`.
    """

    op = ttt_linear

    def __init__(self, width: int, num_heads: int, config: TTTConfig) -> None:
        super().__init__(width, num_heads, config)
        H, D = self.num_heads, self.head_dim
        self.W1 = nn.Parameter(torch.randn(H, D, D) * 0.02)
        self.b1 = nn.Parameter(torch.zeros(H, D))

    def params(self) -> ttt_linear.Params:
        """The op's parameters, in float32 or better."""
        start = map(full, (self.W1, self.b1))
        return ttt_linear.Params._make([*start, *self._rest()])
