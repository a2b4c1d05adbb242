"""Recordings to codes, through Mimi's streaming form with several frames a call."""

from __future__ import annotations

import torch
from moshi.models.compression import MimiModel
from torch import Tensor

from .ring import widen_kv_rings

FRAMES_PER_CALL = 50
"""4 s a call: longer calls are slower on a CPU, whose cache they leave."""


@torch.no_grad()
def encode_recording(
    mimi: MimiModel, pcm: Tensor, frames_per_call: int = FRAMES_PER_CALL
) -> Tensor:
    """Encode a whole recording as a stream would, one stream a channel.

    The codes are those of `mimi.encode` on the whole (without its memory) and of calls of one
    frame after `widen_kv_rings(mimi, 2)`. Without that, one frame being two steps of Mimi's
    transformer, moshi's ring loses the oldest key of every other step: 1 of 250 in the real Mimi.

    Args:
        mimi: a codec, not streaming at the moment; it is left so.
        pcm: float32 `[C, samples]` at the codec's rate (24 kHz) in -1 to 1, on any device; the
            last partial frame is filled with zeros.
        frames_per_call: frames of 80 ms a call; the result does not depend on it.

    Returns:
        int64 `[C, K, T]` on the codec's device, K its active codebooks, T frames of 80 ms.

    Raises:
        ValueError: `pcm` is not `[C, samples]` with at least one sample, or is not finite.
    """
    if pcm.dim() != 2 or 0 in pcm.shape:
        raise ValueError(f"pcm must be [channels, samples] and not empty, got {list(pcm.shape)}")
    if frames_per_call < 1:
        raise ValueError(f"frames_per_call must be at least 1, got {frames_per_call}")
    if not bool(torch.isfinite(pcm).all()):
        raise ValueError("pcm holds samples that are not finite")
    parameter = next(mimi.parameters())
    pcm = torch.nn.functional.pad(pcm, (0, -pcm.shape[-1] % mimi.frame_size))
    steps_per_frame = round(mimi.encoder_frame_rate / mimi.frame_rate)
    codes: list[Tensor] = []
    with mimi.streaming(len(pcm)):
        widen_kv_rings(mimi, steps_per_frame * frames_per_call)
        for piece in pcm.split(mimi.frame_size * frames_per_call, dim=-1):
            codes.append(mimi.encode(piece[:, None].to(parameter)))
    return torch.cat(codes, dim=-1)
