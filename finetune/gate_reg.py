"""The gate regulariser: a term of the loss that pushes gates away from one half.

    weight * mean over all channels of 4 g (1 - g),  g = |tanh(gate)|

It is largest where a gate is half open. It depends on nothing but the gates, and no channel on
another, so its gradient is added as written, once a step, to what the backwards have left: the same
for any micro-batches, and on each rank for the channels that it holds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from moshi.models.lm import LMModel
from torch import Tensor

from finetune.args import TrainArgs
from finetune.sharding import gathered, local
from moshi_ttt.states import ttt_blocks


def gate_weight(args: TrainArgs) -> Callable[[int], float]:
    """Weight of the term at a step: a line from 0 to all of it, from `memory_start_step` on."""
    outer = max(1, round(args.optim.pct_start * args.max_steps))
    warmup, start = args.gate_reg.warmup_steps or outer, args.memory_start_step
    return lambda step: args.gate_reg.weight * min(1.0, max(0, step - start) / warmup)


def gate_penalty(gates: Tensor) -> Tensor:
    """The mean of `4 g (1 - g)`, 0 to 1."""
    g = torch.tanh(gates).abs()
    return (4 * g * (1 - g)).mean()


@torch.no_grad()
def all_gates(lm: LMModel) -> Tensor:
    """The gates of all memories, whole and flat, float32; every rank has to ask."""
    return torch.cat([gathered(b.gate).flatten().float() for b in ttt_blocks(lm).values()])


@torch.no_grad()
def push_gates(lm: LMModel, weight: float) -> None:
    """Add the gradient of the term to those of the gates; one without a gradient has no part."""
    gates = [block.gate for block in ttt_blocks(lm).values()]
    channels = sum(gate.numel() for gate in gates)
    for gate in gates:
        if gate.grad is None:
            continue
        t = torch.tanh(local(gate))
        slope = 4 * (1 - 2 * t.abs()) * t.sign() * (1 - t * t)
        local(gate.grad).add_(slope, alpha=weight / channels)
