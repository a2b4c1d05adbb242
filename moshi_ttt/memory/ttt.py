"""What TTT-Linear and TTT-MLP share: the inner learning rate, the layer norm, tau and decay."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moshi_ttt.config import TTTConfig
from moshi_ttt.memory.base import Memory, full


class TTT(Memory):
    """A memory of test-time training, without its fast weights (arXiv:2407.04620).

    The inner learning rate of a frame and head is
    `eta = base_lr * lr_scale * sigmoid(x . w + b) / D`, 0 with `writing: false`. See `Memory`.
    """

    def __init__(self, width: int, num_heads: int, config: TTTConfig) -> None:
        super().__init__(width, num_heads, config)
        H, D, decay = num_heads, self.head_dim, config.options["decay"]
        self.gamma = nn.Parameter(torch.ones(H, D))
        self.beta = nn.Parameter(torch.zeros(H, D))
        self.delta = nn.Parameter(torch.zeros(config.chunk_size))
        self.decay_logit = None
        if decay > 0:
            logit = math.log(decay) - math.log1p(-decay)
            self.decay_logit = nn.Parameter(torch.full((H,), logit))

    def gates(self, rates: Tensor) -> dict[str, Tensor]:
        """`eta`, the inner learning rate of each frame."""
        rate = self.config.options["base_lr"] * self.lr_scale / self.head_dim
        return {"eta": torch.sigmoid(rates[0]) * (rate if self.writes() else 0.0)}

    def _rest(self) -> tuple[Tensor | int | None, ...]:
        """The part of the op's parameters that both have."""
        decay = None
        if self.decay_logit is not None:  # it is part of a write
            decay = torch.sigmoid(full(self.decay_logit))
            decay = decay if self.writes() else 0.0 * decay
        slow = (full(x) for x in (self.gamma, self.beta, self.delta))
        return *slow, decay, self.config.options["write_every"]
