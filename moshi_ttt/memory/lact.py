"""The LaCT memory: slow weights around `moshi_ttt.ops.lact`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moshi_ttt.config import TTTConfig
from moshi_ttt.memory.base import Memory, full
from moshi_ttt.ops import lact

START_LR = 1e-3
"""What the three learning rates of a frame start at."""


class LaCT(Memory):
    """A memory whose fast weights are SwiGLUs, written once a large chunk (arXiv:2505.23884).

    `Wg = L R + 0.5 I` and `Wu` likewise, of rank `low_rank` when they start; `Wo` in full. Learned
    of each frame: three learning rates (softplus), the momentum gate m and the write gate w
    (sigmoid), and a factor on the head's output (SiLU, starting at 1). `eta` is learned per head
    and starts at `base_lr`. See `Memory`.
    """

    op = lact
    silu = True
    rates = 6
    reads_late = True

    def __init__(self, width: int, num_heads: int, config: TTTConfig) -> None:
        super().__init__(width, num_heads, config)
        options, H, D = config.options, num_heads, self.head_dim
        r, rank, hidden = options["stacked"], options["low_rank"], options["hidden_mult"] * D
        with torch.no_grad():
            softplus_inverse, silu_of_it_is_1 = math.log(math.expm1(START_LR)), 1.2784645
            bias = self.lr_bias.view(6, H)
            bias[:3], bias[5] = softplus_inverse, silu_of_it_is_1
        if rank:
            for name in ("g", "u"):
                left = torch.randn(H, r, hidden, rank) * 0.5 * rank**-0.5
                right = torch.randn(H, r, rank, D) * 0.5 * D**-0.5
                self.register_parameter(f"L{name}", nn.Parameter(left))
                self.register_parameter(f"R{name}", nn.Parameter(right))
        else:
            for name in ("g", "u"):
                self.register_parameter(
                    f"W{name}", nn.Parameter(torch.randn(H, r, hidden, D) * D**-0.5)
                )
        self.Wo = nn.Parameter(torch.randn(H, r, D, hidden) * hidden**-0.5)
        self.log_eta = nn.Parameter(torch.full((H,), math.log(options["base_lr"])))

    def params(self) -> lact.Params:
        """The op's parameters, in float32 or better."""
        options = self.config.options
        eta = torch.exp(full(self.log_eta)) * (self.lr_scale if self.writes() else 0.0)
        return lact.Params(
            self._start("g"), self._start("u"), full(self.Wo), eta, self.config.chunk_size,
            options["momentum"], options["muon"], options["residual"],
        )  # fmt: skip

    def gates(self, rates: Tensor) -> dict[str, Tensor]:
        """Learning rates `lr` of Wg, Wu and Wo, momentum `m`, write gate `w`."""
        lr = F.softplus(rates[:3]).permute(1, 2, 3, 0)
        return {"lr": lr, "m": torch.sigmoid(rates[3]), "w": torch.sigmoid(rates[4])}

    def output_gate(self, rates: Tensor) -> Tensor:
        """`silu(linear(x))`."""
        return F.silu(rates[5])

    def _start(self, name: str) -> Tensor:
        """`L R + 0.5 I`, or the matrix itself."""
        if not self.config.options["low_rank"]:
            return full(getattr(self, f"W{name}"))
        left, right = full(getattr(self, f"L{name}")), full(getattr(self, f"R{name}"))
        eye = torch.eye(left.shape[-2], right.shape[-1], dtype=left.dtype, device=left.device)
        return torch.matmul(left, right) + 0.5 * eye
