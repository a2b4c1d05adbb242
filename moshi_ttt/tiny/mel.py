"""What the tiny codec is taught: log-mel pictures of single 80 ms frames."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchaudio.functional import melscale_fbanks

FRAME = 1920
"""Samples of a frame: 80 ms at 24 kHz."""
MELS = 32
PARTS = 3
"""Windows of 40 ms in a frame, half overlapping, all inside it, so nothing looks ahead."""
_WINDOW = 960


def log_mel(pcm: Tensor) -> Tensor:
    """Log-mel power of every frame.

    Args:
        pcm: `[B, samples]` at 24 kHz, a multiple of 1920 samples.

    Returns:
        `[B, T, PARTS, MELS]`, natural log of power plus 1e-5, float32.
    """
    frames = pcm.unflatten(-1, (-1, FRAME)).unfold(-1, _WINDOW, _WINDOW // 2)
    window = torch.hann_window(_WINDOW, device=pcm.device)
    power = torch.fft.rfft(frames * window, n=_WINDOW).abs().square() / window.square().sum()
    bank = melscale_fbanks(_WINDOW // 2 + 1, 50.0, 7_600.0, MELS, 24_000, norm=None)
    return torch.log(power @ bank.to(pcm.device) + 1e-5)


def cepstra(mels: Tensor, count: int) -> Tensor:
    """The smooth shape of each frame's spectrum: an orthonormal DCT of its mean log-mel.

    Args:
        mels: from `log_mel`.
        count: coefficients kept, the level (index 0) among them.

    Returns:
        `[B, T, count]`; the level is halved, so that loudness does not crowd out the sound.
    """
    n = torch.arange(MELS, device=mels.device) + 0.5
    k = torch.arange(count, device=mels.device)
    basis = torch.cos(math.pi / MELS * n[:, None] * k) * math.sqrt(2 / MELS)
    basis[:, 0] *= 0.5 / math.sqrt(2)
    return mels.mean(-2) @ basis


def envelope(pcm: Tensor, samples: int = FRAME) -> Tensor:
    """RMS of each stretch of `samples`: `[..., samples * n]` to `[..., n]`."""
    return pcm.unflatten(-1, (-1, samples)).square().mean(-1).add(1e-12).sqrt()
