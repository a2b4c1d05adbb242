"""Teacher-forced NLL of whole recordings, frame by frame, at the cost of streaming."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel
from moshi.models.lm_utils import _delay_sequence
from moshi.modules.streaming import StreamingModule
from moshi.utils.compile import no_compile
from torch import Tensor, nn

from eval.modes import eval_mode, fast_norms, without_lanes
from moshi_ttt.hybrid import HybridLMModel
from moshi_ttt.ring import clear_kv_rows, widen_kv_rings
from moshi_ttt.states import copy_ttt_rows, reset_ttt_states

FRAMES_PER_CALL = 100
"""Frames of one call unless told otherwise; any other number gives the same NLL."""
NORM_EVERY = 250
"""The state's norm is taken about every so many frames, and at the end."""
Progress = Callable[[int], object]
"""Called with the number of frames just scored."""


@dataclass
class Nll:
    """What scoring one recording gave.

    Attributes:
        values: [1 + dep_q, T] NLL in nats on the CPU, row 0 text, then Moshi's codebooks;
            float64 for a float64 model, else float32. NaN where nothing is predicted: a code of
            -1, and the last `delay` frames of a delayed codebook.
        broken: names the first place where an NLL should be and is no finite number, and says how
            many there are; empty if there is none.
        ms_per_frame: of each call, wall time over all frames it scored, of all rows.
        norm_frames: frames after which norms were taken; the last is the end, or where the call
            began in which the recording ended before other rows did; none if it began there too.
        state_norm: block name -> norm of its fast weights at `norm_frames`.
        state_moved: block name -> norm of their distance from W0, likewise.
    """

    values: Tensor
    broken: str = ""
    ms_per_frame: list[float] = field(default_factory=list)
    norm_frames: list[int] = field(default_factory=list)
    state_norm: dict[str, list[float]] = field(default_factory=dict)
    state_moved: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class _Reading:
    """A recording on its way through a row: `inputs` [R, K, T + 1], delayed; R is 2 with history.

    `next` is the frame it goes on with.
    """

    index: int
    codes: Tensor
    inputs: Tensor
    nll: Nll
    next: int = 0

    @property
    def left(self) -> int:
        return self.codes.shape[-1] - self.next


@torch.no_grad()
def score(
    lm: LMModel,
    recordings: Sequence[Tensor],
    *,
    rows: int = 1,
    frames_per_call: int = FRAMES_PER_CALL,
    reset_every: int | None = None,
    history: Sequence[Tensor] | None = None,
    progress: Progress | None = None,
    done: Callable[[int, Nll], object] | None = None,
) -> list[Nll]:
    """NLL of every code given all before it, as `LMModel.forward` has it, for any length.

    Each recording's codes are delayed once, as a whole, and fed several frames a call through a
    row of a streaming context that is fresh for it. Rows are out of step: where a recording ends,
    the next one starts while the others go on. Nothing of the model changes: neither its
    memories' lanes, nor train or eval mode, nor any random generator, also when an error ends it.

    With `persistent_states: false` the memory is fresh at every call, as its configuration says,
    so there (only) the numbers depend on `frames_per_call` and `rows`.

    Args:
        lm: stock or spliced, not streaming.
        recordings: each [1 + n_q, T] int64: text, Moshi's codebooks, the user's; -1 is "nothing
            here".
        rows: of the streaming context; so many recordings at a time.
        frames_per_call: frames of one call.
        reset_every: put the memories back to W0 every so many frames; attention is untouched.
        history: one more recording for each; the memories are then put not to W0 but to what they
            have become in a row of their own after as many frames of it.
        progress: called after every call.
        done: called with a recording's place and scores when it is finished; the order is theirs.

    Raises:
        ValueError: the model is streaming or wants conditions, codes out of range, memories to
            reset in a model without one, or a history that is too short.
    """
    _check(lm, recordings, rows, frames_per_call, reset_every, history)
    out: dict[int, Nll] = {}
    waiting = iter(range(len(recordings)))
    slots: list[_Reading | None] = [None] * rows
    batch = len(slots) * (1 if history is None else 2)
    with ExitStack() as stack:
        stack.enter_context(without_lanes(lm))
        stack.enter_context(eval_mode(lm))
        stack.enter_context(no_compile())
        stack.enter_context(lm.streaming(batch))
        widen_kv_rings(lm.transformer, frames_per_call)
        while True:
            free = [slot for slot, reading in enumerate(slots) if reading is None]
            for slot, index in zip(free, waiting, strict=False):
                other = None if history is None else history[index]
                slots[slot] = _begin(lm, index, recordings[index], other)
            reading = {slot: r for slot, r in enumerate(slots) if r is not None}
            if not reading:
                return [out[i] for i in range(len(recordings))]
            _renew(lm, reading, len(slots), reset_every, history is not None)
            _call(lm, reading, len(slots), _frames(reading, frames_per_call, reset_every), progress)
            for slot, r in reading.items():
                if r.left == 0:
                    _finish(lm, r)
                    out[r.index], slots[slot] = r.nll, None
                    if done is not None:
                        done(r.index, r.nll)


def _begin(lm: LMModel, index: int, codes: Tensor, history: Tensor | None) -> _Reading:
    initial = lm._get_initial_token()
    sequences = [codes]
    if history is not None:
        other = torch.full_like(codes, lm.zero_token_id)
        frames = min(codes.shape[-1], history.shape[-1])
        other[:, :frames] = history[:, :frames]
        sequences.append(other)
    both = torch.stack(sequences).to(lm.device)
    initial = initial.expand(len(both), -1, -1)
    inputs = torch.cat([initial, _delay_sequence(lm.delays, both, initial)], dim=2)
    wide = torch.float64 if lm.dtype == torch.float64 else torch.float32
    values = torch.full((lm.audio_offset + lm.dep_q, codes.shape[-1]), float("nan"), dtype=wide)
    return _Reading(index, codes.cpu(), inputs, Nll(values))


def _frames(reading: dict[int, _Reading], most: int, reset_every: int | None) -> int:
    """Frames of the next call: no row may pass a place where its memories are renewed."""
    frames = min(most, max(r.left for r in reading.values()))
    if reset_every is not None:
        frames = min(frames, *(reset_every - r.next % reset_every for r in reading.values()))
    return frames


def _renew(
    lm: LMModel, reading: dict[int, _Reading], slots: int, reset_every: int | None, lent: bool
) -> None:
    """Rows whose recording begins start anew; those at a multiple of `reset_every` forget."""
    starting = [slot for slot, r in reading.items() if r.next == 0]
    if starting:
        rows = starting + ([slots + slot for slot in starting] if lent else [])
        mask = torch.zeros(slots * (2 if lent else 1), dtype=torch.bool, device=lm.device)
        mask[rows] = True
        lm.reset_streaming(mask)
        clear_kv_rows(lm.transformer, mask)
    if reset_every is None:
        return
    due = [slot for slot, r in reading.items() if r.next and r.next % reset_every == 0]
    if due and lent:
        copy_ttt_rows(lm, [slots + slot for slot in due], due)
    elif due:
        mask = torch.zeros(slots, dtype=torch.bool, device=lm.device)
        mask[due] = True
        reset_ttt_states(lm, mask)


def _call(
    lm: LMModel,
    reading: dict[int, _Reading],
    slots: int,
    frames: int,
    progress: Progress | None,
) -> None:
    began = time.perf_counter()
    # the row of a recording that ends inside the call reads on: the last chance to take its norm
    _take_norms(lm, {slot: r for slot, r in reading.items() if r.next and r.left < frames})
    batch = slots * next(len(r.inputs) for r in reading.values())
    shape = (batch, lm.num_codebooks, frames + 1)
    inputs = torch.full(shape, lm.zero_token_id, device=lm.device)
    for slot, r in reading.items():
        piece = r.inputs[:, :, r.next : r.next + frames + 1]
        inputs[slot::slots, :, : piece.shape[-1]] = piece
    predicted = lm.audio_offset + lm.dep_q
    hidden, text_logits = lm.forward_text(inputs[:, :, :-1])
    targets = inputs[:slots, :, 1:]
    logits = lm.forward_depformer_training(targets, hidden[:slots])
    found = [
        _nll(text_logits[:slots], targets[:, :1]),
        _nll(logits, targets[:, 1:predicted]),
    ]
    nll = torch.cat(found, dim=1).cpu()  # waits for the device
    taken = {slot: min(frames, r.left) for slot, r in reading.items()}
    scored = sum(taken.values())
    ms = (time.perf_counter() - began) * 1e3 / scored
    for slot, r in reading.items():
        r.nll.values[:, r.next : r.next + taken[slot]] = nll[slot, :, : taken[slot]]
        r.nll.ms_per_frame.append(ms)
        r.next += taken[slot]
    whole = {slot: r for slot, r in reading.items() if taken[slot] == frames}
    due = {
        slot: r
        for slot, r in whole.items()
        if r.left == 0 or (r.next - frames) // NORM_EVERY < r.next // NORM_EVERY
    }
    _take_norms(lm, due)
    if progress is not None:
        progress(scored)


def _finish(lm: LMModel, reading: _Reading) -> None:
    """Put each NLL at the frame its code belongs to, and see that all that should be are there."""
    values, codes = reading.nll.values, reading.codes
    rows, frames = values.shape
    delays = lm.delays[:rows]
    out = torch.full_like(values, float("nan"))
    for row, delay in enumerate(delays):
        out[row, : max(0, frames - delay)] = values[row, delay:]
    last = frames - torch.tensor(delays)
    known = (torch.arange(frames) < last.unsqueeze(-1)) & (codes[:rows] != -1)
    bad = (known & ~out.isfinite()).nonzero()
    if len(bad):
        k, t = bad[0].tolist()
        reading.nll.broken = (
            f"the NLL of codebook {k} (0 is text), frame {t} is {out[k, t].item()}; "
            f"{len(bad)} such in all"
        )
    reading.nll.values = torch.where(known, out, float("nan"))


def _check(
    lm: LMModel,
    recordings: Sequence[Tensor],
    rows: int,
    frames_per_call: int,
    reset_every: int | None,
    history: Sequence[Tensor] | None,
) -> None:
    for name, module in lm.named_modules():
        if isinstance(module, StreamingModule) and module.is_streaming:
            raise ValueError(f"{name or 'the model'} is streaming: score it outside of any stream")
    if lm.fuser is not None:
        raise ValueError("the model wants conditions: it cannot be scored on codes alone")
    limits = {"rows": rows, "frames_per_call": frames_per_call, "reset_every": reset_every}
    for name, value in limits.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if reset_every is not None and not isinstance(lm, HybridLMModel):
        raise ValueError("reset_every: the model has no memory to reset")
    for codes in (*recordings, *(history or ())):
        _check_codes(lm, codes)
    if history is None:
        return
    if reset_every is None or len(history) != len(recordings):
        raise ValueError("history: one for each recording is needed, and reset_every")
    for codes, other in zip(recordings, history, strict=True):
        needed = (codes.shape[1] - 1) // reset_every * reset_every
        if other.shape[1] < needed:
            raise ValueError(f"history: {needed} frames are needed, one has {other.shape[1]}")


def _check_codes(lm: LMModel, codes: Tensor) -> None:
    if codes.dim() != 2 or codes.shape[0] != lm.num_codebooks or codes.shape[1] < 1:
        raise ValueError(
            f"codes must be [{lm.num_codebooks}, T], got {list(codes.shape)}: text, then audio"
        )
    heads = [lm.text_linear.out_features] + [lm.card] * lm.n_q
    low, high = codes.amin(1).tolist(), codes.amax(1).tolist()
    for row, cards in enumerate(heads):
        if low[row] < lm.zero_token_id or high[row] >= cards:
            value = low[row] if low[row] < lm.zero_token_id else high[row]
            raise ValueError(f"row {row} of the codes holds {value}: -1 to {cards - 1} is allowed")


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """[B, K, T, card] and [B, K, T] -> [B, K, T]; NaN where the target is not a code."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    known = (targets >= 0) & (targets < logits.shape[-1])
    nll = F.cross_entropy(
        logits.flatten(0, 2), torch.where(known, targets, 0).flatten(), reduction="none"
    )
    return torch.where(known, nll.view_as(targets), float("nan"))


def _take_norms(lm: nn.Module, reading: dict[int, _Reading]) -> None:
    if not reading or not isinstance(lm, HybridLMModel):
        return
    for r in reading.values():
        r.nll.norm_frames.append(r.next)
    for name, (norm, moved) in fast_norms(lm).items():
        norms, moves = norm.tolist(), moved.tolist()
        for slot, r in reading.items():
            r.nll.state_norm.setdefault(name, []).append(norms[slot])
            r.nll.state_moved.setdefault(name, []).append(moves[slot])
