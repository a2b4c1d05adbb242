"""Microphone and loudspeaker that never wait for the model, nor the model for them.

The sound card's callbacks and the model's loop meet in two bounded queues of frames. When the model
is late the oldest frame that was heard is dropped; when Moshi has nothing ready silence is played.
Both are counted.

A sound card has its own rate: the callbacks resample between it and the model's 24 kHz, block by
block, without seams. That costs them some ten microseconds and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import soxr

from moshi_ttt.audio import SAMPLE_RATE
from moshi_ttt.devices import Device, sounddevice
from moshi_ttt.echo import EchoMeter, Envelope
from moshi_ttt.errors import UserError
from moshi_ttt.frames import FRAME, FrameRing, Samples

HEARD_FRAMES, SAID_FRAMES = 8, 6  # 640 and 480 ms: what is held longer is heard as delay
SPARE_FRAMES, QUIET_DB = 63, -50.0  # after 5 s with a frame to spare, one that is quiet is left out
BLOCKS_A_SECOND = 50  # blocks of 20 ms: what a stream waits for at each end
INPUT_SECONDS, OUTPUT_SECONDS = 0.06, 0.1  # buffers: Python's callbacks may be late by less
LEAD_MS = 80  # of silence before Moshi's first frame: later ones may be late by so much

SILENT_DB = -100.0


class Resampler:
    """A stream of samples at another rate; what was put in comes out whole, a little later.

    Args:
        source: Hz, of what is put in.
        target: Hz, of what comes out.

    Attributes:
        delay_ms: the longest that a sample is held back; 0 where the rates are equal.
    """

    def __init__(self, source: int, target: int) -> None:
        self._stream: soxr.ResampleStream | None = None
        self.delay_ms = 0.0
        if source == target:
            return
        self._stream = soxr.ResampleStream(source, target, 1, dtype="float32", quality="HQ")
        block = np.zeros(source // 100, np.float32)
        for _ in range(50):  # its filters and buffers are made by the first samples: not while live
            self._stream.resample_chunk(block)
            self.delay_ms = max(self.delay_ms, 1000 * self._stream.delay() / target)
        self._stream.clear()

    def __call__(self, samples: Samples) -> Samples:
        """Go on with `samples [N]`; returns what is ready, which may be nothing."""
        return samples if self._stream is None else self._stream.resample_chunk(samples)


class SoundCard:
    """The two queues, and the callbacks that PortAudio's threads run.

    Args:
        microphone: from `choose_sound`.
        loudspeaker: likewise.
        muted: start so.

    Attributes:
        heard: frames from the microphone.
        said: frames for the loudspeaker.
        levels_db: of the last frame that was heard and of what was said to it.
        muted: what the microphone brings is silence from now on.
        ended: nothing more will be said, and running out of frames is no gap.
        stopped: a stream has ended, by itself before `ended`.
        gaps: times the loudspeaker ran out of frames, after Moshi's first, and played silence.
        shortened: frames left out of Moshi's pauses, to make up for a delay: a gap makes all that
            follows late, for ever otherwise.
        played: blocks that the loudspeaker has taken.
        lost_by_card: times the sound card itself says it lost what was recorded or played.
        echo: compares the two sides, as the sound card has them.
        delay_ms: from mouth to microphone's queue and from said to played, at most, while no frame
            is late; without the sound card's own buffers.
    """

    def __init__(self, microphone: Device, loudspeaker: Device, *, muted: bool = False) -> None:
        self.microphone, self.loudspeaker = microphone, loudspeaker
        self.heard, self.said = FrameRing(HEARD_FRAMES), FrameRing(SAID_FRAMES)
        self.muted, self.ended, self.stopped = muted, False, False
        self.levels_db = (SILENT_DB, SILENT_DB)
        self.gaps = self.shortened = self.played = self.lost_by_card = 0
        self._spare = 0  # frames in a row after which another one was waiting
        self._from_card = Resampler(microphone.rate, SAMPLE_RATE)
        self._to_card = Resampler(SAMPLE_RATE, loudspeaker.rate)
        self.echo = EchoMeter(Envelope(loudspeaker.rate), Envelope(microphone.rate))
        lead_ms = LEAD_MS + self._to_card.delay_ms
        self.delay_ms = 1000 * FRAME / SAMPLE_RATE + self._from_card.delay_ms + lead_ms
        self._recorded, self._filled = np.zeros(FRAME, np.float32), 0
        self._lead = round(lead_ms / 1000 * loudspeaker.rate)
        self._said = np.zeros(FRAME, np.float32)
        self._ready: Samples = np.zeros(0, np.float32)
        self._begun = self._dry = False

    def on_input(self, indata: Samples, frames: int, time: object, status: Any) -> None:
        """PortAudio's input callback: make frames of 80 ms of what was recorded.

        Args:
            indata: `[frames, channels]`; of several channels the mean of the first two is heard.
            frames: samples a channel.
            time: not used.
            status: PortAudio's flags.
        """
        self.lost_by_card += bool(status.input_overflow)
        mono = indata[:, 0] if indata.shape[1] == 1 else indata[:, :2].mean(1)
        self.echo.heard.add(mono)
        samples = self._from_card(np.zeros_like(mono) if self.muted else mono)
        at = 0
        while at < len(samples):
            n = min(FRAME - self._filled, len(samples) - at)
            self._recorded[self._filled : self._filled + n] = samples[at : at + n]
            self._filled, at = (self._filled + n) % FRAME, at + n
            if self._filled == 0:
                self.heard.put(self._recorded)

    def on_output(self, outdata: Samples, frames: int, time: object, status: Any) -> None:
        """PortAudio's output callback: fill `outdata`, with silence if need be.

        Args:
            outdata: `[frames, channels]`; the first two channels get the same.
            frames: samples a channel.
            time: not used.
            status: PortAudio's flags.
        """
        self.lost_by_card += bool(status.output_underflow)
        outdata[:] = 0
        at = 0
        while at < frames:
            if self._begun and self._lead > 0:
                n = min(self._lead, frames - at)
                self._lead, at = self._lead - n, at + n
            elif len(self._ready) > 0:
                n = min(len(self._ready), frames - at)
                np.clip(self._ready[:n], -1, 1, out=outdata[at : at + n, 0])
                self._ready, at = self._ready[n:], at + n
            elif self._next():
                self._ready, self._begun, self._dry = self._to_card(self._said), True, False
            else:
                self.gaps += self._begun and not self._dry and not self.ended
                self._dry = True
                break
        outdata[:, 1:2] = outdata[:, :1]
        self.echo.played.add(outdata[:, 0])
        self.played += 1

    def on_finished(self) -> None:
        """PortAudio's callback after a stream's last block, whatever ended it."""
        self.stopped = True

    def _next(self) -> bool:
        """Take the next frame that was said; after a delay that is over, one pause gets shorter."""
        if not self.said.get(self._said):
            return False
        self._spare = self._spare + 1 if self.said.held else 0
        if self._spare > SPARE_FRAMES and level_db(self._said) < QUIET_DB:
            self._spare = 0
            self.shortened += 1
            return self.said.get(self._said)
        return True

    def hear(self, out: Samples, timeout: float) -> bool:
        """Move the oldest frame that was heard to `out`; False if none came within `timeout`."""
        if not self.heard.get(out, timeout):
            return False
        if self.muted:  # since it was recorded
            out[:] = 0
        return True

    def report(self) -> str:
        """What was lost, in a line."""
        return (
            f"microphone: {self.heard.dropped} frames dropped; loudspeaker: {self.gaps} gaps, "
            f"{self.said.dropped} frames dropped; lost by the sound card: {self.lost_by_card}"
        )


@contextmanager
def sound_running(card: SoundCard) -> Iterator[float]:
    """Record and play while the body runs.

    Args:
        card: what its callbacks fill and empty.

    Yields:
        Milliseconds of the sound card's own buffers, both ways together, as PortAudio has them.

    Raises:
        UserError: a device fails.
    """
    sd, buffers_ms = sounddevice(), 0.0
    sides = (  # the microphone last: opening takes a moment, and what is heard in it would be late
        (sd.OutputStream, card.loudspeaker, card.on_output, OUTPUT_SECONDS),
        (sd.InputStream, card.microphone, card.on_input, INPUT_SECONDS),
    )
    with ExitStack() as stack:
        try:
            for make, device, callback, latency in sides:
                stream = make(
                    device=device.index,
                    samplerate=device.rate,
                    channels=device.channels,
                    dtype="float32",
                    blocksize=device.rate // BLOCKS_A_SECOND,
                    latency=latency,
                    callback=callback,
                    finished_callback=card.on_finished,
                )
                stack.callback(stream.close)
                # not `stop`, which waits until all is played: a device that is gone never plays it
                stack.callback(stream.abort)
                stream.start()
                buffers_ms += 1000 * stream.latency
        except sd.PortAudioError as error:
            raise UserError(f"the audio device failed: {error} (see --list-devices)") from error
        yield buffers_ms


def level_db(samples: Samples) -> float:
    """Level of `samples [N]` in dBFS: 0 is a square wave at full scale, a sine there is -3."""
    return max(SILENT_DB, float(10 * np.log10(samples @ samples / len(samples) + 1e-20)))
