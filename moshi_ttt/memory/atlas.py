"""The Atlas memory: slow weights around `moshi_ttt.ops.atlas`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moshi_ttt.config import TTTConfig
from moshi_ttt.memory.base import Memory, full
from moshi_ttt.ops import atlas


class Atlas(Memory):
    """A memory trained at every frame on the last `window` frames (arXiv:2505.23735).

    Learned of each frame: what is kept of the weights, `alpha = 1 - sigmoid(x . w + b)`, which
    starts at `1 - decay` (`decay: 0` is `alpha = 1`), of the momentum (`theta`, sigmoid), the
    weight of the frame in the loss (`gamma`, sigmoid), and the size of the write,

        eta = base_lr * lr_scale * sigmoid(x . w + b) / C                           with Muon
        eta = base_lr * lr_scale * sigmoid(x . w + b) * (1 - theta) / (C * window)  without

    so that however often a chunk hears one and the same frame, and whatever the gates, what it
    writes of it is at most `base_lr` of the loss's gradient (without this the inner loop diverged
    within 21 steps: eval/LOG.md). With Muon the sigmoid is the write gate after it.
    The polynomial's coefficients start at `1 / i!`. See `Memory`.

    Titans (arXiv:2501.00663) is `window: 1, polynomial: none, muon: false`.
    """

    op = atlas
    rates = 4

    def __init__(self, width: int, num_heads: int, config: TTTConfig) -> None:
        super().__init__(width, num_heads, config)
        options, H, D = config.options, num_heads, self.head_dim
        polynomial, rank = options["polynomial"], options["outer_rank"] or D
        features = {"none": D, "elementwise": 2 * D, "outer": D + rank}[polynomial]
        hidden = options["hidden_mult"] * D
        if options["decay"] > 0:
            with torch.no_grad():
                decay = options["decay"]
                self.lr_bias[:H] = math.log(decay) - math.log1p(-decay)
        self.W1 = nn.Parameter(torch.randn(H, D, hidden if options["deep"] else features) * 0.02)
        self.W2 = self.coef = self.proj = None
        if options["deep"]:
            self.W2 = nn.Parameter(torch.randn(H, hidden, features) * features**-0.5)
        if polynomial != "none":
            self.coef = nn.Parameter(torch.tensor([1.0, 0.5**0.5]).repeat(H, 1))
        if polynomial == "outer":
            self.proj = nn.Parameter(torch.randn(H, rank, D * (D + 1) // 2) * rank**-0.5)

    def params(self) -> atlas.Params:
        """The op's parameters, in float32 or better."""
        options = self.config.options
        return atlas.Params(
            full(self.W1),
            *(None if x is None else full(x) for x in (self.W2, self.coef, self.proj)),
            chunk_size=self.config.chunk_size,
            window=options["window"],
            muon=options["muon"],
        )

    def gates(self, rates: Tensor) -> dict[str, Tensor]:
        """`alpha`, `eta`, `theta` and `gamma` of each frame."""
        options = self.config.options
        forget, eta, theta, gamma = torch.sigmoid(rates).unbind(0)
        rate = options["base_lr"] * self.lr_scale / self.config.chunk_size
        if not options["muon"]:
            eta = eta * (1 - theta) / options["window"]
        keeps = 0.0 if options["decay"] == 0 or not self.writes() else 1.0
        return {
            "alpha": 1 - keeps * forget,
            "eta": eta * (rate if self.writes() else 0.0),
            "theta": theta,
            "gamma": gamma,
        }
