"""One pass over the samples of an audio file, in blocks: an hour-long one does not fill memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from moshi_ttt.audio import audio_info
from moshi_ttt.errors import UserError

FRAME_SECONDS = 0.05
"""Levels are taken this often: a few to a syllable, so that words can be told from pauses."""
FULL_SCALE = 0.999
"""From here to 1 a sample is clipped: limiters stop a little short; floats above 1 are not cut."""
_FRAMES_A_BLOCK = 400  # 20 s: large enough for numpy, small beside a model

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Sound:
    """What the samples of a file are like; C channels, F frames of 50 ms.

    Attributes:
        seconds: length.
        sample_rate: Hz.
        power: `[F, C]` mean square about the frame's mean; 1 is full scale.
        cross: `[F]` covariance of left and right about their means; zero where mono.
        mean: `[C]`.
        peak: `[C]` largest magnitude.
        full_scale: `[C]` seconds of samples at full scale.
        not_finite: samples that are NaN or infinite, counted as 0 elsewhere.
        first_not_finite: index and channel of the first of them.
        digest: of rate, channels and samples, whatever the format of the file.
    """

    seconds: float
    sample_rate: int
    power: Array
    cross: Array
    mean: Array
    peak: Array
    full_scale: Array
    not_finite: int
    first_not_finite: tuple[int, int] | None
    digest: str

    @property
    def channels(self) -> int:
        """1 or 2."""
        return self.power.shape[1]


def read_sound(path: Path, progress: Callable[[float], object]) -> Sound:
    """Read a file once.

    Args:
        path: the file.
        progress: told the seconds of each block.

    Raises:
        UserError: as `moshi_ttt.audio.audio_info`; also a file that ends before its header says.
    """
    info = audio_info(path)
    size = max(1, round(info.sample_rate * FRAME_SECONDS))
    digest = hashlib.sha1(f"{info.sample_rate} {info.channels}".encode())
    powers: list[Array] = []
    crosses: list[Array] = []
    total, peak, full = (np.zeros(info.channels) for _ in range(3))
    bad, first, done = 0, None, 0
    try:
        with soundfile.SoundFile(path) as file:
            while len(block := file.read(size * _FRAMES_A_BLOCK, "float32", always_2d=True)):
                x = np.ascontiguousarray(block, np.float32)
                digest.update(x.tobytes())
                finite = np.isfinite(x)
                if not finite.all():
                    if first is None:
                        index, channel = np.argwhere(~finite)[0]
                        first = (done + int(index), int(channel))
                    bad += int((~finite).sum())
                    x = np.where(finite, x, np.float32(0))
                magnitude = np.abs(x)
                peak = np.maximum(peak, magnitude.max(0))
                full += ((magnitude >= FULL_SCALE) & (magnitude <= 1)).sum(0)
                total += x.sum(0, dtype=np.float64)
                whole = len(x) // size * size
                for frames in (x[:whole].reshape(-1, size, info.channels), x[None, whole:]):
                    if frames.size:
                        power, cross = _levels(frames)
                        powers.append(power)
                        crosses.append(cross)
                done += len(x)
                progress(len(x) / info.sample_rate)
    except soundfile.LibsndfileError as error:
        raise UserError(f"{path}: broken or truncated: {error.error_string}") from error
    if done < info.frames:
        raise UserError(
            f"{path}: truncated: its header promises {info.frames} samples, it has {done}"
        )
    return Sound(
        info.duration, info.sample_rate, np.concatenate(powers), np.concatenate(crosses),
        total / done, peak, full / info.sample_rate, bad, first, digest.hexdigest(),
    )  # fmt: skip


def _levels(frames: NDArray[np.float32]) -> tuple[Array, Array]:
    """Power `[F, C]` and covariance `[F]` of frames `[F, N, C]`, each about its own mean."""
    centred = frames - frames.mean(1, keepdims=True, dtype=np.float64).astype(np.float32)
    power = np.einsum("fnc,fnc->fc", centred, centred) / frames.shape[1]
    cross = np.einsum("fn,fn->f", centred[..., 0], centred[..., -1]) / frames.shape[1]
    return power.astype(np.float64), cross.astype(np.float64)
