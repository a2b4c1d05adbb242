"""Sound as clients send and want it, to and from frames of 24 kHz: Ogg/Opus, or plain samples.

What is broken is a `SoundError`, whatever it is: sphn's reader was given some 90 000 random and
mutated Ogg streams, and says ValueError to all that it does not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import soxr
import sphn

from moshi_ttt.audio import SAMPLE_RATE
from moshi_ttt.frames import FRAME, Samples

_PIECE = 1024  # bytes of Ogg: a page, 255 packets at most, is what they can bring to an end
_QUALITY = "LQ"  # flat to 9 kHz, and 5 ms late each way; soxr's next better one is 35 ms late


class SoundError(ValueError):
    """What was sent is not sound of the format agreed on."""


class Sound(Protocol):
    """One client's sound, both ways."""

    def heard(self, data: bytes) -> Iterator[Samples]:
        """The sound in a message, at 24 kHz, piece by piece.

        Raises:
            SoundError: it is broken; and so is the stream from here on.
        """
        ...

    def said(self, frame: Samples) -> bytes:
        """A frame of Moshi's voice `[1920]` as the client wants it; may be empty."""
        ...


def sound_of(form: str, rate: int) -> Sound:
    """The sound of a format, `"opus"` or `"pcm"`, and rate in Hz."""
    return OpusSound() if form == "opus" else PcmSound(rate)


class OpusSound:
    """Ogg/Opus as moshi's own clients speak it: 24 kHz, mono."""

    def __init__(self) -> None:
        self._reader = sphn.OpusStreamReader(SAMPLE_RATE)
        self._writer = sphn.OpusStreamWriter(SAMPLE_RATE)

    def heard(self, data: bytes) -> Iterator[Samples]:
        """See `Sound`."""
        for at in range(0, len(data), _PIECE):
            try:
                pcm = self._reader.append_bytes(data[at : at + _PIECE])
            except ValueError as error:
                raise SoundError("the sound is not Ogg/Opus, or is broken") from error
            yield pcm

    def said(self, frame: Samples) -> bytes:
        """See `Sound`."""
        return self._writer.append_pcm(frame)


class PcmSound:
    """int16, little endian, mono, resampled without seams where the rate is not 24 kHz."""

    def __init__(self, rate: int) -> None:
        self._in = self._out = None
        if rate != SAMPLE_RATE:
            self._in = soxr.ResampleStream(rate, SAMPLE_RATE, 1, "float32", _QUALITY)
            self._out = soxr.ResampleStream(SAMPLE_RATE, rate, 1, "float32", _QUALITY)

    def heard(self, data: bytes) -> Iterator[Samples]:
        """See `Sound`."""
        if len(data) % 2:
            raise SoundError(f"samples are 2 bytes each: a message of {len(data)} is cut")
        pcm = np.frombuffer(data, "<i2").astype(np.float32) / np.float32(32768)
        yield pcm if self._in is None else self._in.resample_chunk(pcm)

    def said(self, frame: Samples) -> bytes:
        """See `Sound`."""
        pcm = frame if self._out is None else self._out.resample_chunk(frame)
        return np.round(np.clip(pcm, -1, 1) * 32767).astype("<i2").tobytes()


class Framer:
    """Cuts sound into frames of 1920 samples."""

    def __init__(self) -> None:
        self._frame, self._filled = np.zeros(FRAME, np.float32), 0

    def cut(self, pcm: Samples) -> Iterator[Samples]:
        """The frames that are full now; each is written over for the next."""
        at = 0
        while at < len(pcm):
            n = min(FRAME - self._filled, len(pcm) - at)
            self._frame[self._filled : self._filled + n] = pcm[at : at + n]
            self._filled, at = (self._filled + n) % FRAME, at + n
            if self._filled == 0:
                yield self._frame

    def drop(self) -> None:
        """Forget the samples of the frame that is not full."""
        self._filled = 0
