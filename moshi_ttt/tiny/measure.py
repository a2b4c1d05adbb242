"""How good the tiny codec is, as numbers, on voices it never heard."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMGen
from moshi.models.loaders import CheckpointInfo
from torch import Tensor

from moshi_ttt.codec import encode_recording

from .mel import FRAME, envelope
from .plan import Recording
from .speech import render, utterances


def entropy(codes: Tensor, bins: int) -> float:
    """Unigram entropy of codes in nats."""
    share = torch.bincount(codes.flatten(), minlength=bins).double()
    share = share[share > 0] / share.sum()
    return -(share * share.log()).sum().item()


def conditional_entropy(codes: Tensor, bins: int) -> float:
    """Entropy in nats of a code given the one before it, counted, `[T]`: optimistic on little."""
    pairs = codes[:-1] * bins + codes[1:]
    return entropy(pairs, bins * bins) - entropy(codes[:-1], bins)


def repeat_agreement(recording: Recording, codes: Tensor) -> float:
    """Share of frames in which a phrase that returns has the codes of its first time.

    Args:
        recording: whose `utterances` the codes are of.
        codes: `[C, T]`, one codebook of every speaker's channel.
    """
    first: dict[tuple[int, str], Tensor] = {}
    same = total = 0
    for line, _, begin, frames in utterances(recording):
        heard = codes[line.speaker, begin : begin + frames]
        known = first.setdefault((line.speaker, line.text), heard)
        if known is not heard:
            same += int((known == heard).sum())
            total += frames
    return same / total if total else math.nan


@torch.no_grad()
def measure_codec(mimi: MimiModel, recordings: list[Recording]) -> dict[str, Any]:
    """Encode and decode recordings and compare with what was spoken.

    Returns:
        level_db: decoded RMS over the input's in speech, dB; envelope: correlation of the
        envelopes of 80 ms; silence_dbfs: level of decoded silence from its third frame on;
        entropy: nats a codebook; used: codes used a codebook; repeat: `repeat_agreement` of every
        codebook; conditional: `conditional_entropy` of codebook 0.
    """
    bins = mimi.cardinality
    spoken, decoded, all_codes, repeats = [], [], [], []
    for recording in recordings:
        pcm = torch.from_numpy(render(recording)[0])
        codes = encode_recording(mimi, pcm)
        repeats.append([repeat_agreement(recording, codes[:, k]) for k in range(codes.shape[1])])
        spoken.append(envelope(pcm).flatten())
        decoded.append(envelope(mimi.decode(codes)[:, 0]).flatten())
        all_codes.append(codes[0])
    a, b, codes = torch.cat(spoken), torch.cat(decoded), torch.cat(all_codes, -1)
    speech = a > 0.01
    level = 10 * math.log10(b[speech].square().mean() / a[speech].square().mean())
    still = encode_recording(mimi, torch.zeros(1, 25 * FRAME))
    quiet = envelope(mimi.decode(still)[:, 0, 3 * FRAME :]).mean().item()
    return {
        "level_db": level,
        "envelope": torch.corrcoef(torch.stack([a, b]))[0, 1].item(),
        "silence_dbfs": 20 * math.log10(quiet + 1e-9),
        "silence_steady": bool((still[..., 8:] == still[..., -1:]).all()),
        "entropy": [round(entropy(row, bins), 3) for row in codes],
        "used": [len(row.unique()) for row in codes],
        "repeat": [round(float(x), 3) for x in torch.tensor(repeats).nanmean(0)],
        "conditional": conditional_entropy(codes[0], bins),
    }


@torch.no_grad()
def frame_milliseconds(
    info: CheckpointInfo, frames: int = 100, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Time of every frame through Mimi's encoder, LMGen and Mimi's decoder, sorted, in ms.

    Args:
        info: a base, loaded in float32 on the CPU.
        frames: timed ones; ten more go before them.
        clock: seconds; `time.process_time` leaves out what other processes take.
    """
    mimi, lm = info.get_mimi(), info.get_moshi(dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    pcm = 0.05 * torch.randn(frames + 10, 1, 1, FRAME, generator=generator)
    taken: list[float] = []
    lm_gen = LMGen(lm)
    with mimi.streaming(1), lm_gen.streaming(1):
        for frame in pcm:
            begin = clock()
            tokens = lm_gen.step(mimi.encode(frame))
            if tokens is not None:
                mimi.decode(tokens[:, 1:])
            taken.append(1e3 * (clock() - begin))
    return sorted(taken[10:])
