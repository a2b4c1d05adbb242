"""The TTT-MLP memory: slow weights around `moshi_ttt.ops.ttt_mlp`."""

from __future__ import annotations

import torch
from torch import nn

from moshi_ttt.config import TTTConfig
from moshi_ttt.memory.base import full
from moshi_ttt.memory.ttt import TTT
from moshi_ttt.ops import ttt_mlp


class TTTMLP(TTT):
    """A memory whose fast weights are a two-layer MLP per head (arXiv:2407.04620).

    Its hidden width is `config.options["hidden_mult"] * D`. `W0 ~ N(0, 0.02)`, biases 0. See `TTT`.
    """

    op = ttt_mlp

    def __init__(self, width: int, num_heads: int, config: TTTConfig) -> None:
        super().__init__(width, num_heads, config)
        H, D = self.num_heads, self.head_dim
        hidden = config.options["hidden_mult"] * D
        self.W1 = nn.Parameter(torch.randn(H, D, hidden) * 0.02)
        self.b1 = nn.Parameter(torch.zeros(H, hidden))
        self.W2 = nn.Parameter(torch.randn(H, hidden, D) * 0.02)
        self.b2 = nn.Parameter(torch.zeros(H, D))

    def params(self) -> ttt_mlp.Params:
        """The op's parameters, in float32 or better."""
        start = map(full, (self.W1, self.b1, self.W2, self.b2))
        return ttt_mlp.Params._make([*start, *self._rest()])
