"""Reading audio of any rate and format soundfile knows, as float32, resampled."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor
from torchaudio.functional import resample

from moshi_ttt.errors import UserError

SAMPLE_RATE = 24_000
"""Hz, of everything that goes into or comes out of Mimi."""

_UNKNOWN_SIZE = (0, 0xFFFFFFFF)  # what a writer to a pipe leaves in a wav's header


@dataclass(frozen=True)
class AudioInfo:
    """What a file's header says.

    Attributes:
        frames: samples per channel, at the file's own rate.
        sample_rate: Hz.
        channels: 1 or 2.
    """

    frames: int
    sample_rate: int
    channels: int

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.frames / self.sample_rate


def _check_wav(path: Path) -> None:
    """Find what libsndfile mends in silence or reports vaguely: a cut wav and a rate of 0 Hz."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != b"RIFF":
            return
        file.seek(12)
        while len(head := file.read(8)) == 8:
            name, length = struct.unpack("<4sI", head)
            start = file.tell()
            if name == b"fmt ":
                (rate,) = struct.unpack("<4xI", file.read(8).ljust(8, b"\1"))
                if rate == 0:
                    raise UserError(f"{path}: the sample rate is 0 Hz")
            if name == b"data":
                if length not in _UNKNOWN_SIZE and start + length > size:
                    raise UserError(
                        f"{path}: truncated: its header promises {length} bytes of samples, "
                        f"the file has {size - start}"
                    )
                return
            file.seek(start + length + length % 2)


def audio_info(path: str | os.PathLike[str]) -> AudioInfo:
    """Read and check a file's header; the samples are not looked at.

    Raises:
        UserError: the file is missing, empty, not audio or cut short, its rate is 0 Hz, or it has
            more than two channels.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such audio file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty (0 bytes)")
    _check_wav(path)
    try:
        info = soundfile.info(path)
    except soundfile.LibsndfileError as error:
        raise UserError(f"{path}: not readable as audio: {error.error_string}") from error
    except TypeError as error:  # a name that ends in .raw: soundfile asks for what it has no header
        raise UserError(f"{path}: not readable as audio: {error}") from error
    if info.frames == 0:
        raise UserError(f"{path}: the audio is empty (0 samples)")
    if info.channels > 2:
        raise UserError(
            f"{path}: {info.channels} channels; mono or stereo (left Moshi, right user) is wanted"
        )
    return AudioInfo(info.frames, info.samplerate, info.channels)


def read_audio(path: str | os.PathLike[str], sample_rate: int = SAMPLE_RATE) -> Tensor:
    """Read a whole file at its own rate and resample it.

    Args:
        path: the file.
        sample_rate: Hz, of the result.

    Returns:
        float32 `[channels, N]`, channels 1 or 2, N = ceil(frames * sample_rate / its own rate).

    Raises:
        UserError: as `audio_info`; also a file that ends before its header says, or a sample
            that is NaN or infinite, named with its index (at the file's rate) and channel.
    """
    path = Path(path)
    info = audio_info(path)
    try:
        samples, _ = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise UserError(f"{path}: broken or truncated: {error.error_string}") from error
    if len(samples) < info.frames:
        raise UserError(
            f"{path}: truncated: its header promises {info.frames} samples, it has {len(samples)}"
        )
    finite = np.isfinite(samples)
    if not finite.all():
        index, channel = np.argwhere(~finite)[0]
        raise UserError(f"{path}: sample {index} of channel {channel} is {samples[index, channel]}")
    pcm = torch.from_numpy(np.ascontiguousarray(samples.T))
    return resample(pcm, info.sample_rate, sample_rate)
