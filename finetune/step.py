"""One optimizer step over the micro-batches of a global batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from moshi.models.lm import LMModel
from torch import Tensor

from finetune.data.loader import Batch
from finetune.loss import LossWeights, Sums, loss_sums, total_weight
from finetune.optim import MasterAdamW
from moshi_ttt.hybrid import HybridLMModel
from moshi_ttt.states import attach_ttt_states, ttt_blocks


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
        state_norms: [2, segments] of the memories at the end of each, see `state_norms`.
    """

    loss: float
    sums: Sums
    grad_norm: float
    tokens: int
    state_norms: Tensor = field(default_factory=lambda: torch.zeros(2, 0))


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
    norms: list[Tensor] = []
    for batch, (codes, text_known) in zip(batches, moved, strict=True):
        carried = isinstance(lm, HybridLMModel) and lm.ttt_config.persistent_states
        if carried:
            # Fresh lanes: every segment starts from W0, and the state it ends in can be measured.
            attach_ttt_states(lm, len(codes))
        text_loss, audio_loss, sums = loss_sums(lm, codes, text_known, weights)
        if carried:
            norms.append(state_norms(lm))  # before the update moves W0
        loss = audio_loss / max(audio_total, 1e-12)
        if text_total > 0:
            loss = loss + text_loss / text_total
        if not torch.isfinite(loss):
            optimizer.clear()
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
    tokens = int(total.count.sum())
    states = torch.cat(norms, 1) if norms else torch.zeros(2, 0)
    return StepResult(value, total, norm, tokens, states)


@torch.no_grad()
def state_norms(lm: LMModel) -> Tensor:
    """Norms of the fast weights that hang on the lanes, of all layers together, row by row.

    Returns:
        [2, B]: the norm, and that of the distance from W0; [2, 0] where no lanes hold a state.
    """
    squares = []
    for block in ttt_blocks(lm).values():
        if block._lanes is None or block._lanes.state is None:
            return torch.zeros(2, 0)
        state, start = block._lanes.state.fast, block.memory.params()
        for key in set(state._fields) & set(start._fields):  # the fast weights: W0 has their names
            now, w0 = getattr(state, key), getattr(start, key)
            squares.append(torch.stack([(now - w).flatten(1).square().sum(1) for w in (0, w0)]))
    return torch.stack(squares).sum(0).sqrt()


@torch.no_grad()
def memory_metrics(lm: LMModel, result: StepResult) -> dict[str, float]:
    """Mean and spread of tanh(gate), and the mean of the states' norms over a step's segments.

    `state_norm` and `state_moved` (the distance from W0) are NaN where every call has a state of
    its own (`persistent_states: false`).
    """
    blocks = ttt_blocks(lm).values()
    gates = torch.cat([torch.tanh(block.gate).flatten().float() for block in blocks])
    norm, moved = result.state_norms.mean(1).tolist()
    return {
        "gate_mean": float(gates.mean()),
        "gate_abs_mean": float(gates.abs().mean()),
        "gate_std": float(gates.std()),
        "state_norm": norm,
        "state_moved": moved,
    }
