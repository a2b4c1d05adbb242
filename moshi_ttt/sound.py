"""Microphone and loudspeaker that never wait for the model, nor the model for them.

The sound card's callbacks and the model's loop meet in two bounded queues of frames. When the model
is late the oldest frame that was heard is dropped; when Moshi has nothing ready silence is played.
Both are counted.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moshi_ttt.audio import SAMPLE_RATE
from moshi_ttt.errors import UserError

FRAME = 1920
HEARD_FRAMES, SAID_FRAMES = 8, 4  # 640 and 320 ms: what is held longer is heard as delay
INSTALL = (
    "PortAudio is missing, which microphone and loudspeaker need: install it with "
    "`apt-get install libportaudio2` (macOS: `brew install portaudio`), or use --file"
)

Samples = NDArray[np.float32]


class FrameRing:
    """A queue of at most `slots` frames; a full one loses its oldest.

    Attributes:
        dropped: frames lost so.
    """

    def __init__(self, slots: int, size: int = FRAME) -> None:
        self._frames = np.zeros((slots, size), np.float32)
        self._first = self._held = self.dropped = 0
        self._changed = threading.Condition()

    def put(self, frame: Samples) -> None:
        """Add a frame, at once."""
        with self._changed:
            slots = len(self._frames)
            if self._held == slots:
                self._first = (self._first + 1) % slots
                self._held -= 1
                self.dropped += 1
            self._frames[(self._first + self._held) % slots] = frame
            self._held += 1
            self._changed.notify()

    def get(self, out: Samples, timeout: float = 0.0) -> bool:
        """Move the oldest frame to `out`; False if none came within `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._held > 0, timeout):
                return False
            out[:] = self._frames[self._first]
            self._first = (self._first + 1) % len(self._frames)
            self._held -= 1
            return True


class SoundCard:
    """The two queues, and the callbacks that PortAudio's thread runs.

    Attributes:
        heard: frames from the microphone.
        said: frames for the loudspeaker.
        gaps: times the loudspeaker ran out of frames, after Moshi's first, and played silence.
        lost_by_card: times the sound card itself says it lost what was recorded or played.
    """

    def __init__(self) -> None:
        self.heard, self.said = FrameRing(HEARD_FRAMES), FrameRing(SAID_FRAMES)
        self.gaps = self.lost_by_card = 0
        self._recorded, self._filled = np.zeros(FRAME, np.float32), 0
        self._played, self._left = np.zeros(FRAME, np.float32), 0
        self._begun = False

    def on_input(self, indata: Samples, frames: int, time: object, status: Any) -> None:
        """PortAudio's input callback: cut what was recorded `[frames, 1]` into frames of 80 ms."""
        self.lost_by_card += bool(status.input_overflow)
        at = 0
        while at < frames:
            n = min(FRAME - self._filled, frames - at)
            self._recorded[self._filled : self._filled + n] = indata[at : at + n, 0]
            self._filled, at = (self._filled + n) % FRAME, at + n
            if self._filled == 0:
                self.heard.put(self._recorded)

    def on_output(self, outdata: Samples, frames: int, time: object, status: Any) -> None:
        """PortAudio's output callback: fill `outdata [frames, 1]`, with silence if need be."""
        self.lost_by_card += bool(status.output_underflow)
        at = 0
        while at < frames:
            if self._left == 0:
                if not self.said.get(self._played):
                    self.gaps += self._begun
                    outdata[at:] = 0
                    return
                self._begun, self._left = True, FRAME
            n = min(self._left, frames - at)
            start = FRAME - self._left
            np.clip(self._played[start : start + n], -1, 1, out=outdata[at : at + n, 0])
            self._left, at = self._left - n, at + n

    def report(self) -> str:
        """What was lost, in a line."""
        return (
            f"microphone: {self.heard.dropped} frames dropped; loudspeaker: {self.gaps} gaps, "
            f"{self.said.dropped} frames dropped; lost by the sound card: {self.lost_by_card}"
        )


def sounddevice() -> ModuleType:
    """The module sounddevice, which looks for PortAudio when it is imported.

    Raises:
        UserError: PortAudio is not there; how to install it.
    """
    try:
        import sounddevice as module
    except OSError as error:
        raise UserError(INSTALL) from error
    return module


def device_list() -> str:
    """The sound devices, a line each: `>` marks the default input, `<` the default output.

    Raises:
        UserError: PortAudio is missing, or finds no device.
    """
    devices = sounddevice().query_devices()
    if not len(devices):
        raise UserError("no audio device: PortAudio finds neither microphone nor loudspeaker")
    return str(devices)


def check_sound(input_device: str | None = None, output_device: str | None = None) -> None:
    """See that the devices are there and can do what `sound_running` asks of them.

    Raises:
        UserError: PortAudio is missing, there is no such device, or it cannot do 24 kHz.
    """
    sd = sounddevice()
    shape = {"samplerate": SAMPLE_RATE, "channels": 1, "dtype": "float32"}
    try:
        sd.check_input_settings(device=_device(input_device), **shape)
        sd.check_output_settings(device=_device(output_device), **shape)
    except (sd.PortAudioError, ValueError) as error:  # ValueError: no device of that name
        raise UserError(f"no audio device to use: {error} (see --list-devices)") from error


@contextmanager
def sound_running(
    card: SoundCard, input_device: str | None = None, output_device: str | None = None
) -> Iterator[None]:
    """Record and play at 24 kHz, mono, while the body runs.

    Args:
        card: what its callbacks fill and empty.
        input_device: number or part of the name, as `device_list` says; None is the default.
        output_device: likewise. See `check_sound`.

    Raises:
        UserError: PortAudio is missing, or the device fails.
    """
    sd = sounddevice()
    shape = {"samplerate": SAMPLE_RATE, "channels": 1, "dtype": "float32", "blocksize": FRAME}
    try:
        with (
            sd.InputStream(device=_device(input_device), callback=card.on_input, **shape),
            sd.OutputStream(device=_device(output_device), callback=card.on_output, **shape),
        ):
            yield
    except sd.PortAudioError as error:
        raise UserError(f"the audio device failed: {error}") from error


def _device(name: str | None) -> int | str | None:
    return int(name) if name is not None and name.isdecimal() else name
