"""One optimizer step over the micro-batches of a global batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from moshi.models.lm import LMModel

from finetune.data.loader import Batch
from finetune.loss import LossWeights, Sums, loss_sums, total_weight
from finetune.optim import MasterAdamW
from moshi_ttt.block import named_tensors
from moshi_ttt.states import ttt_blocks


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not a number, with the step and the recordings in it."""


@dataclass
class StepResult:
    """What a step did.

    Attributes:
        loss: weighted mean NLL of the text plus that of the audio, in nats.
        sums: the sums behind it, over all micro-batches.
        grad_norm: before clipping.
        tokens: target tokens.
    """

    loss: float
    sums: Sums
    grad_norm: float
    tokens: int


def train_step(
    lm: LMModel,
    batches: list[Batch],
    optimizer: MasterAdamW,
    weights: LossWeights,
    *,
    max_norm: float,
    step: int,
) -> StepResult:
    """Forward and backward of every micro-batch, then one update.

    The loss is sum(weight * NLL) / sum(weight), for text and for audio, both sums over the whole
    global batch: how it is cut into micro-batches does not change the gradient. A kind of token
    that the batch has none of is left out.

    Raises:
        NonFiniteError: naming step and recordings; nothing was updated.
    """
    device = lm.device
    moved = [(b.codes.to(device), b.text_mask.to(device)) for b in batches]
    text_total, audio_total = total_weight(lm, moved, weights).tolist()
    total: Sums | None = None
    for batch, (codes, text_known) in zip(batches, moved, strict=True):
        text_loss, audio_loss, sums = loss_sums(lm, codes, text_known, weights)
        loss = audio_loss / max(audio_total, 1e-12)
        if text_total > 0:
            loss = loss + text_loss / text_total
        if not torch.isfinite(loss):
            raise NonFiniteError(f"step {step}: loss is {loss.item()} on {batch.describe()}")
        loss.backward()
        total = sums if total is None else total + sums
    assert total is not None
    norm = optimizer.step(max_norm)
    if not math.isfinite(norm):
        names = "; ".join(batch.describe() for batch in batches)
        raise NonFiniteError(f"step {step}: gradient norm is {norm} on {names}")
    text, audio = total.loss.tolist()
    value = (text / text_total if text_total > 0 else 0.0) + audio / max(audio_total, 1e-12)
    return StepResult(value, total, norm, int(total.count.sum()))


@torch.no_grad()
def memory_metrics(lm: LMModel) -> dict[str, float]:
    """Mean and spread of tanh(gate) and the norm of the carried fast weights over all layers.

    The state's norm is NaN where no state is carried (every step starts from W0).
    """
    blocks = ttt_blocks(lm).values()
    gates = torch.cat([torch.tanh(block.gate).flatten().float() for block in blocks])
    squares = [
        float(t.float().square().sum())
        for block in blocks
        if block._lanes is not None and block._lanes.state is not None
        for name, t in named_tensors(block._lanes.state.fast)
        if name.startswith(("W", "b"))
    ]
    return {
        "gate_mean": float(gates.mean()),
        "gate_abs_mean": float(gates.abs().mean()),
        "gate_std": float(gates.std()),
        "state_norm": math.sqrt(sum(squares)) if squares else math.nan,
    }
