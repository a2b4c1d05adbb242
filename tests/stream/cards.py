"""A sound card whose callbacks a test calls, and devices that are none."""

import os
import signal
import threading
import time
import types

import numpy as np

from moshi_ttt.devices import Device
from moshi_ttt.frames import FRAME
from moshi_ttt.sound import LEAD_MS, Resampler, SoundCard
from tests.stream.streams import noise

RATE = 24_000
STATUS = types.SimpleNamespace(input_overflow=False, output_underflow=False)


def card_of(rate=RATE, channels=1, **options):
    return SoundCard(*(Device(0, "a device", rate, channels) for _ in range(2)), **options)


def lead_of(card, rate=RATE):
    """Samples of silence before the first."""
    return round((LEAD_MS + Resampler(RATE, rate).delay_ms) / 1000 * rate)


def tone(seconds, rate, hz=440.0, level=0.5):
    return (level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype("f4")


def record(card, samples, block, channels=1):
    """Have the card record `samples [N]`, and return all frames it made of them `[M]`."""
    heard, frame = [], np.zeros(FRAME, np.float32)
    for at in range(0, len(samples), block):
        part = np.repeat(samples[at : at + block, None], channels, 1)
        card.on_input(part, len(part), None, STATUS)
        while card.heard.get(frame):
            heard.append(frame.copy())
    return np.concatenate(heard)


def play(card, said, blocks, block, channels=1):
    """Have the card play the frames of `said [N]`, one each 80 ms; returns `[M, channels]`."""
    frames, played = list(said.reshape(-1, FRAME)), []
    for i in range(blocks):
        if i % 4 == 0 and frames:
            card.said.put(frames.pop(0))
        out = np.full((block, channels), 9, np.float32)
        card.on_output(out, block, None, STATUS)
        played.append(out)
    return np.concatenate(played)


class FakeSoundDevice(types.ModuleType):
    """PortAudio's streams, their callbacks called by hand; the model behind them is real.

    The microphone brings 12 frames at once (4 too many); the loudspeaker asks for more than it gets
    and then presses Ctrl-C.
    """

    class PortAudioError(Exception):
        pass

    DEVICE = {  # noqa: RUF012
        "name": "a microphone", "hostapi": 0, "max_input_channels": 2, "max_output_channels": 2,
        "default_samplerate": 44_100.0,
    }  # fmt: skip

    def __init__(self, error=None, devices=(DEVICE,), rates=(RATE,)):
        super().__init__("sounddevice")
        self.error, self.played, self.threads = error, [], []
        self.devices, self.rates = devices, rates
        self.default = types.SimpleNamespace(device=[0 if devices else -1] * 2)

    def query_devices(self):
        return list(self.devices)

    def query_hostapis(self):
        return ({"name": "ALSA"},)

    def check_input_settings(self, samplerate, **_):
        if self.error:
            raise self.error
        if samplerate not in self.rates:
            raise self.PortAudioError(f"Invalid sample rate {samplerate}")

    check_output_settings = check_input_settings

    def InputStream(self, callback, **_):
        return self._stream(lambda: callback(noise(12).view(-1, 1).numpy(), 12 * FRAME, 0, STATUS))

    def OutputStream(self, callback, **_):
        def listen():
            block = np.zeros((FRAME, 1), np.float32)
            while sum(map(np.count_nonzero, self.played)) < 8 * FRAME - 99:
                callback(block, FRAME, 0, STATUS)
                if block.any():
                    self.played.append(block.copy())
                else:
                    time.sleep(0.002)  # a thread that spins leaves the model no interpreter
            callback(block, FRAME, 0, STATUS)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=listen)
        self.threads.append(thread)
        return self._stream(thread.start)

    def _stream(self, start):
        return types.SimpleNamespace(
            start=start, abort=lambda: None, close=lambda: None, latency=0.05
        )
