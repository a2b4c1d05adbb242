"""Teacher-forced NLL of whole recordings, frame by frame, at the cost of streaming."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel
from moshi.models.lm_utils import _delay_sequence
from moshi.modules.streaming import StreamingModule
from moshi.utils.compile import no_compile
from torch import Tensor, nn

from moshi_ttt.hybrid import HybridLMModel
from moshi_ttt.ring import widen_kv_rings
from moshi_ttt.states import preserved_ttt_states, reset_ttt_states, ttt_blocks

FRAMES_PER_CALL = 100
"""Frames of one call unless told otherwise; any other number gives the same NLL."""
NORM_EVERY = 250
"""The state's norm is taken about every so many frames, and at the end."""


@dataclass
class Nll:
    """What scoring a batch of recordings gave.

    Attributes:
        values: [B, 1 + dep_q, T] NLL in nats on the CPU, row 0 text, then Moshi's codebooks;
            float64 for a float64 model, else float32. NaN where nothing is predicted: a code of
            -1, beyond a row's length, and the last `delay` frames of a delayed codebook.
        ms_per_frame: wall time of each call divided by its frames.
        norm_frames: frames after which norms were taken.
        state_norm: block name -> norm of its fast weights (mean over rows) at `norm_frames`.
        state_moved: block name -> norm of their distance from W0, likewise.
    """

    values: Tensor
    ms_per_frame: list[float] = field(default_factory=list)
    norm_frames: list[int] = field(default_factory=list)
    state_norm: dict[str, list[float]] = field(default_factory=dict)
    state_moved: dict[str, list[float]] = field(default_factory=dict)


@torch.no_grad()
def score(
    lm: LMModel,
    codes: Tensor,
    lengths: Tensor | None = None,
    *,
    frames_per_call: int = FRAMES_PER_CALL,
    reset_every: int | None = None,
) -> Nll:
    """NLL of every code given all before it, as `LMModel.forward` has it, for any length.

    The codes are delayed once, as a whole, and fed through a fresh streaming context several
    frames a call. Nothing of the model changes: neither its memories' lanes, nor train or eval
    mode, nor any random generator, also when an error ends it.

    With `persistent_states: false` the memory is fresh at every call, as its configuration says,
    so there (only) the numbers depend on `frames_per_call`.

    Args:
        lm: stock or spliced, not streaming.
        codes: [B, 1 + n_q, T] int64: text, Moshi's codebooks, the user's; -1 is "nothing here".
        lengths: [B] frames of each row, the first ones; None is all of them.
        frames_per_call: frames of one call.
        reset_every: put the memories back to W0 every so many frames; attention is untouched.

    Raises:
        ValueError: the model is streaming or wants conditions, codes or lengths out of range, or
            memories to reset in a model without one.
        FloatingPointError: an NLL that should be there is not finite; named with its place.
    """
    _check(lm, codes, lengths, frames_per_call, reset_every)
    batch, _, frames = codes.shape
    initial = lm._get_initial_token().expand(batch, -1, -1)
    codes = codes.to(lm.device)
    delayed = _delay_sequence(lm.delays, codes, initial)
    sequence = torch.cat([initial, delayed], dim=2)
    wide = torch.float64 if lm.dtype == torch.float64 else torch.float32
    predicted = lm.audio_offset + lm.dep_q
    out = Nll(torch.full((batch, predicted, frames), float("nan"), dtype=wide))
    spliced = isinstance(lm, HybridLMModel)
    with ExitStack() as stack:
        stack.enter_context(preserved_ttt_states(lm) if spliced else nullcontext())
        stack.enter_context(_eval_mode(lm))
        stack.enter_context(no_compile())
        stack.enter_context(lm.streaming(batch))
        widen_kv_rings(lm.transformer, frames_per_call)
        for start, end in _pieces(frames, frames_per_call, reset_every):
            if reset_every is not None and start and start % reset_every == 0:
                reset_ttt_states(lm)
            began = time.perf_counter()
            hidden, text_logits = lm.forward_text(sequence[:, :, start:end])
            targets = sequence[:, :, start + 1 : end + 1]
            logits = lm.forward_depformer_training(targets, hidden)
            nll = torch.cat(
                [_nll(text_logits, targets[:, :1]), _nll(logits, targets[:, 1:predicted])], dim=1
            )
            out.values[:, :, start:end] = nll.to(out.values)  # waits for the device
            out.ms_per_frame.append((time.perf_counter() - began) * 1e3 / (end - start))
            if spliced and (end == frames or start // NORM_EVERY < end // NORM_EVERY):
                _take_norms(lm, end, out)
    out.values = _undelay(out.values, codes.cpu(), lm.delays[:predicted], lengths)
    return out


@contextmanager
def writing_off(lm: nn.Module) -> Iterator[None]:
    """Inside, no memory of `lm` writes: all that is left of them is their slow weights.

    Raises:
        ValueError: the model has no memory.
    """
    memories = [block.memory for block in ttt_blocks(lm).values()]
    before = [memory.lr_scale for memory in memories]
    try:
        for memory in memories:
            memory.lr_scale = 0.0
        yield
    finally:
        for memory, scale in zip(memories, before, strict=True):
            memory.lr_scale = scale


def _check(
    lm: LMModel,
    codes: Tensor,
    lengths: Tensor | None,
    frames_per_call: int,
    reset_every: int | None,
) -> None:
    for name, module in lm.named_modules():
        if isinstance(module, StreamingModule) and module.is_streaming:
            raise ValueError(f"{name or 'the model'} is streaming: score it outside of any stream")
    if lm.fuser is not None:
        raise ValueError("the model wants conditions: it cannot be scored on codes alone")
    if codes.dim() != 3 or codes.shape[1] != lm.num_codebooks or codes.shape[2] < 1:
        raise ValueError(
            f"codes must be [B, {lm.num_codebooks}, T], got {list(codes.shape)}: text, then audio"
        )
    heads = [lm.text_linear.out_features] + [lm.card] * lm.n_q
    low, high = codes.amin((0, 2)).tolist(), codes.amax((0, 2)).tolist()
    for row, cards in enumerate(heads):
        if low[row] < lm.zero_token_id or high[row] >= cards:
            value = low[row] if low[row] < lm.zero_token_id else high[row]
            raise ValueError(f"row {row} of the codes holds {value}: -1 to {cards - 1} is allowed")
    if lengths is not None and not bool(((lengths > 0) & (lengths <= codes.shape[2])).all()):
        raise ValueError(f"lengths must be 1 to {codes.shape[2]}, got {lengths.tolist()}")
    for name, value in (("frames_per_call", frames_per_call), ("reset_every", reset_every)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if reset_every is not None and not isinstance(lm, HybridLMModel):
        raise ValueError("reset_every: the model has no memory to reset")


@contextmanager
def _eval_mode(lm: nn.Module) -> Iterator[None]:
    before = {module: module.training for module in lm.modules()}
    lm.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def _pieces(frames: int, most: int, reset_every: int | None) -> Iterator[tuple[int, int]]:
    start = 0
    while start < frames:
        end = min(start + most, frames)
        if reset_every is not None:
            end = min(end, (start // reset_every + 1) * reset_every)
        yield start, end
        start = end


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """[B, K, T, card] and [B, K, T] -> [B, K, T]; NaN where the target is not a code."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    known = (targets >= 0) & (targets < logits.shape[-1])
    nll = F.cross_entropy(
        logits.flatten(0, 2), torch.where(known, targets, 0).flatten(), reduction="none"
    )
    return torch.where(known, nll.view_as(targets), float("nan"))


def _undelay(values: Tensor, codes: Tensor, delays: list[int], lengths: Tensor | None) -> Tensor:
    """Put each NLL at the frame its code belongs to, and see that all that should be are there."""
    batch, rows, frames = values.shape
    out = torch.full_like(values, float("nan"))
    for row, delay in enumerate(delays):
        out[:, row, : max(0, frames - delay)] = values[:, row, delay:]
    ends = torch.full((batch,), frames) if lengths is None else lengths.cpu()
    last = ends.view(-1, 1) - torch.tensor(delays)
    known = (torch.arange(frames) < last.unsqueeze(-1)) & (codes[:, :rows] != -1)
    bad = (known & ~out.isfinite()).nonzero()
    if len(bad):
        b, k, t = bad[0].tolist()
        raise FloatingPointError(
            f"the NLL of row {b}, codebook {k} (0 is text), frame {t} is {out[b, k, t].item()}; "
            f"{len(bad)} such in all"
        )
    return torch.where(known, out, float("nan"))


def _take_norms(lm: nn.Module, frame: int, out: Nll) -> None:
    out.norm_frames.append(frame)
    for name, block in ttt_blocks(lm).items():
        streaming = block._streaming_state
        assert streaming is not None
        state, start = streaming.memory.fast, block.memory.params()
        norm = moved = torch.zeros(())
        for key in set(state._fields) & set(start._fields):
            now, w0 = getattr(state, key), getattr(start, key)
            norm = norm.to(now) + now.flatten(1).square().sum(1)
            moved = moved.to(now) + (now - w0).flatten(1).square().sum(1)
        out.state_norm.setdefault(name, []).append(norm.sqrt().mean().item())
        out.state_moved.setdefault(name, []).append(moved.sqrt().mean().item())
