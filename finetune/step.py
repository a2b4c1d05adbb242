"""One optimizer step over the micro-batches of a global batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from moshi.models.lm import LMModel
from torch import Tensor

from finetune.data.loader import Batch
from finetune.gate_reg import all_gates, gate_penalty, push_gates
from finetune.loss import LossWeights, Sums, TeacherForced, loss_sums, total_weight
from finetune.optim import MasterAdamW
from finetune.world import ALONE, World
from moshi_ttt.hybrid import HybridLMModel
from moshi_ttt.lanes import (
    lanes_of,
    linked_segments,
    named_tensors,
    put_lanes,
    reset_lanes,
    take_lanes,
    use_slot,
)
from moshi_ttt.states import reset_ttt_states, ttt_blocks


@dataclass
class StepResult:
    """What a step did.

    Attributes:
        loss: weighted mean NLL of the text plus that of the audio, in nats.
        sums: the sums behind it, over all micro-batches of all ranks.
        grad_norm: before clipping.
        tokens: target tokens.
        frames: frames that were there.
        segments: of all lanes and ticks.
        begun: segments whose recording began.
        passed: segments that went on from a lane's segment before.
        state_norms: [2, rows] of the memories at the end of each segment, see `state_norms`; of
            this rank.
        bad: None, or why nothing was updated: a loss or gradient that is not a number, with the
            recordings and positions in it.
    """

    loss: float
    sums: Sums
    grad_norm: float
    tokens: int
    frames: int
    segments: int
    begun: int
    passed: int
    state_norms: Tensor
    bad: str | None


def train_step(
    model: TeacherForced,
    ticks: Sequence[Sequence[Batch]],
    optimizer: MasterAdamW,
    weights: LossWeights,
    *,
    max_norm: float,
    pass_states: bool = True,
    reset: bool = False,
    measure: bool = True,
    gate_weight: float = 0.0,
    world: World = ALONE,
) -> StepResult:
    """Forward and backward of every micro-batch, then one update.

    Every lane goes on by one segment a tick; gradients flow through all ticks of a step, and stop
    at its beginning. Rows whose recording begins start anew. The loss is
    sum(weight * NLL) / sum(weight), for text and for audio, both sums over the whole global batch:
    how it is cut into micro-batches and ranks does not change the gradient. A kind of token that
    the batch has none of is left out.

    With a loss or gradient that is not a number nothing is updated, and the lanes go on from where
    they were before the step; a lane whose recording began in it, or that carried such a number
    into it, starts anew at its next segment.

    Args:
        model: with lanes attached for these batches (`attach_lanes`), if anything is to be carried.
        ticks: of each tick the micro-batches, one a slot.
        optimizer: cleared at the end.
        weights: how much a token counts.
        max_norm: gradients are clipped to this norm.
        pass_states: hand the memories' states from segment to segment; otherwise each segment
            starts from W0. Keys and values are carried where `carry_kv` says so, either way.
        reset: let all lanes start anew first, wherever they are reading.
        measure: take the norms of the states.
        gate_weight: of the gate regulariser (`finetune.gate_reg`); in no loss that is returned.
        world: the ranks whose batches make up the global batch.
    """
    lm, device = model.lm, model.lm.device
    moved = [
        [(b.sequence.to(device), b.text_mask.to(device)) for b in batches] for batches in ticks
    ]
    flat = [batch for batches in moved for batch in batches]
    text_total, audio_total = world.sum(total_weight(lm, flat, weights)).tolist()
    if reset:
        reset_lanes(lm)
    before = take_lanes(lm)
    total: Sums | None = None
    norms: list[Tensor] = []
    bad: list[str] = []
    linked = linked_segments(lm) if len(ticks) > 1 else nullcontext()
    with linked:
        for slot in range(len(ticks[0])):
            use_slot(lm, slot)
            loss = torch.zeros((), device=device)
            for batches, tensors in zip(ticks, moved, strict=True):
                reset_lanes(lm, batches[slot].begins)
                if not pass_states and isinstance(lm, HybridLMModel):
                    reset_ttt_states(lm, torch.ones_like(batches[slot].begins))
                text_loss, audio_loss, sums = loss_sums(model, *tensors[slot], weights)
                if measure:
                    norms.append(state_norms(lm))  # before the update moves W0
                loss = loss + audio_loss / max(audio_total, 1e-12)
                if text_total > 0:
                    loss = loss + text_loss / text_total
                total = sums if total is None else total + sums
                number = float(sums.loss.sum())
                if not math.isfinite(number):
                    bad.append(f"loss is {number} on {batches[slot].describe()}")
            # also of a loss that is no number: in a sharded model the other ranks wait for it
            (loss * world.size).backward()  # FSDP takes the mean over the ranks
    if gate_weight > 0:
        push_gates(lm, gate_weight)
    assert total is not None
    reasons: list[str] = []
    if world.any(bool(bad)):
        optimizer.clear()
        norm = math.nan
        reasons = [reason for found in world.gather(bad) for reason in found]
    elif not math.isfinite(norm := optimizer.step(max_norm)):  # of all gradients: on every rank
        names = "; ".join(b.describe() for batches in ticks for b in batches)
        reasons = [f"gradient norm is {norm} on " + "; ".join(world.gather(names))]
    if reasons:
        put_lanes(lm, before)
        _start_anew(lm, ticks)
    total = total.over(world)
    text, audio = total.loss.tolist()
    value = (text / text_total if text_total > 0 else 0.0) + audio / max(audio_total, 1e-12)
    begins = torch.stack([torch.cat([b.begins for b in batches]) for batches in ticks])
    goes_on = ~begins
    goes_on[0] &= not reset
    heard = sum(sum(b.frames) for batches in ticks for b in batches)
    counts = torch.tensor([heard, begins.numel(), int(begins.sum()), int(goes_on.sum())])
    frames, segments, begun, passed = world.sum(counts).tolist()
    states = torch.cat(norms, 1) if norms else torch.zeros(2, 0)
    reason = "; ".join(reasons) or None
    tokens = int(total.count.sum())
    return StepResult(value, total, norm, tokens, frames, segments, begun, passed, states, reason)


def _start_anew(lm: LMModel, ticks: Sequence[Sequence[Batch]]) -> None:
    """After a step is taken back: rows whose recording began in it, or whose state is broken."""
    for slot in range(len(ticks[0])):
        use_slot(lm, slot)
        rows = torch.stack([batches[slot].begins for batches in ticks]).any(0)
        for lanes in lanes_of(lm).values():
            value = lanes.values[slot]
            for _, tensor in named_tensors(value) if value is not None else ():
                rows = rows | ~tensor.view(len(rows), -1).isfinite().all(1).cpu()
        reset_lanes(lm, rows)


@torch.no_grad()
def state_norms(lm: LMModel) -> Tensor:
    """Norms of the fast weights on the lanes of the slot in turn, of all layers, row by row.

    Returns:
        [2, B]: the norm, and that of the distance from W0; [2, 0] where no lanes hold a state.
    """
    squares = []
    blocks = ttt_blocks(lm) if isinstance(lm, HybridLMModel) else {}
    for block in blocks.values():
        value = None if block._lanes is None else block._lanes.values[block._lanes.slot]
        if value is None:
            return torch.zeros(2, 0)
        # in one order, as all ranks have to gather W0
        for now, start in block.memory.fast_weights(value.fast):
            squares.append(torch.stack([(now - w).flatten(1).square().sum(1) for w in (0, start)]))
    return torch.stack(squares).sum(0).sqrt() if squares else torch.zeros(2, 0)


@torch.no_grad()
def memory_metrics(
    lm: LMModel, result: StepResult, world: World = ALONE, gate_weight: float = 0.0
) -> dict[str, float]:
    """Mean and spread of tanh(gate), and the mean of the states' norms over a step's segments.

    `state_norm` and `state_moved` (the distance from W0) are NaN where every call has a state of
    its own (`persistent_states: false`). `gate_reg` is the term that the gate regulariser adds to
    the loss, if it does.
    """
    raw = all_gates(lm)
    gates = torch.tanh(raw)
    norms = torch.cat([found.cpu() for found in world.gather(result.state_norms)], 1)
    norm, moved = norms.mean(1).tolist()
    term = {"gate_reg": gate_weight * float(gate_penalty(raw))} if gate_weight > 0 else {}
    return term | {
        "gate_mean": float(gates.mean()),
        "gate_abs_mean": float(gates.abs().mean()),
        "gate_std": float(gates.std()),
        "state_norm": norm,
        "state_moved": moved,
    }
