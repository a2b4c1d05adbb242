"""The two loops around the engine, a file's and a microphone's, and what they tell people."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO

import numpy as np
import soundfile
import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.audio import SAMPLE_RATE, read_audio
from moshi_ttt.engine import FRAME_MS, Engine, Frame, memory_norms
from moshi_ttt.errors import UserError
from moshi_ttt.files import written_whole
from moshi_ttt.findings import History, findings, table
from moshi_ttt.monitor import Reading, to_json
from moshi_ttt.sound import FRAME, SoundCard

STATS_SECONDS = 5.0
SILENT_MIC_SECONDS = 5.0


class Interrupts:
    """Ctrl-C as a request: the frame at work is finished first. A second one insists."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def check(self) -> None:
        """Raise KeyboardInterrupt if it was asked for."""
        if self.asked:
            raise KeyboardInterrupt

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Take Ctrl-C while the body runs."""
        before = signal.signal(signal.SIGINT, self)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class Readings:
    """What an engine's watcher is told: kept for the end, and written down line by line.

    Args:
        path: a JSONL file to make; a line is there as soon as its reading is. None writes nothing.
    """

    def __init__(self, path: str | None = None) -> None:
        self.history = History()
        self._file: TextIO | None = None if path is None else open(path, "w", buffering=1)

    def __call__(self, reading: Reading) -> None:
        """One more reading."""
        self.history.add(reading)
        if self._file is not None:
            self._file.write(json.dumps(to_json(reading, "frame")) + "\n")

    def latest(self) -> str:
        """The last reading as a table; empty before the first."""
        return table(self.history.readings[-1]) if self.history.readings else ""

    def words(self) -> str:
        """What all of them mean, a line each."""
        if not self.history.readings:
            return "memories: no reading, the stream was too short for one\n"
        found = findings(self.history.readings)
        if not found:
            return "memories: nothing wrong was found\n"
        return "".join(f"found: {line}\n" for line in found)

    def close(self) -> None:
        """End the file."""
        if self._file is not None:
            self._file.close()


class Reporter:
    """Prints text as it comes, and statistics at times and at the end.

    Args:
        engine: whose.
        card: of a microphone.
        often: every 5 seconds too.
        readings: of the memories, if they are watched.
    """

    def __init__(
        self,
        engine: Engine,
        card: SoundCard | None,
        *,
        often: bool,
        readings: Readings | None = None,
    ) -> None:
        self.engine, self.card, self.often, self.readings = engine, card, often, readings
        self._next = time.monotonic() + STATS_SECONDS

    def frame(self, frame: Frame) -> None:
        """Print a frame's text, and statistics when their time has come."""
        piece = frame.text[0]
        if piece:
            sys.stdout.write(piece)
            sys.stdout.flush()
        if self.often and time.monotonic() >= self._next:
            self._next = time.monotonic() + STATS_SECONDS
            if sys.stdout.isatty():
                sys.stdout.write("\n")
            self._statistics()

    def end(self) -> None:
        """End the line of text, and write the statistics to stderr, if there was anything."""
        if not self.engine.times.count:
            return
        sys.stdout.write("\n")
        sys.stdout.flush()
        self._statistics()
        if self.readings is not None:
            sys.stderr.write(self.readings.words())

    def _statistics(self) -> None:
        latest = "" if self.readings is None else self.readings.latest()
        sys.stderr.write(statistics(self.engine, self.card) + latest)


def statistics(engine: Engine, card: SoundCard | None = None) -> str:
    """Times, losses and the memories' norms, for people."""
    times = engine.times
    p50, p95, p99 = times.percentiles()
    lines = [
        f"{times.count} frames ({times.count * FRAME_MS / 1000:.1f} s); "
        f"ms per frame: p50 {p50:.1f}, p95 {p95:.1f}, p99 {p99:.1f} of {FRAME_MS:.0f}, "
        f"{times.late} late; real-time factor {times.real_time_factor:.3f}",
        card.report() if card else "0 frames dropped (a file waits)",
    ]
    norms = memory_norms(engine.lm)
    lines += [f"memory {name}: |W - W0| = {norm:.4g}" for name, norm in norms.items()]
    return "".join(f"{line}\n" for line in lines)


def user_channel(path: str, channel: str | None) -> Tensor:
    """The user's samples `[N]` at 24 kHz.

    Args:
        path: a file of any rate; of a stereo one the right channel is the user.
        channel: `"left"` or `"right"`, of a stereo file.

    Raises:
        UserError: the file cannot be read (see `read_audio`), or has no such channel.
    """
    pcm = read_audio(path)
    if len(pcm) == 1:
        if channel is not None:
            raise UserError(f"{path} is mono: it has no {channel} channel")
        return pcm[0]
    channel = channel or "right"
    sys.stderr.write(f"{path} is stereo: its {channel} channel is the user\n")
    return pcm[0 if channel == "left" else 1]


def stream_file(
    engine: Engine,
    pcm: Tensor,
    out: str | os.PathLike[str],
    each: Callable[[Frame], object],
    check: Callable[[], object] = lambda: None,
) -> None:
    """Talk to a recording and write Moshi's voice, as long as it, whole or not at all.

    Args:
        engine: of one row.
        pcm: `[N]` at 24 kHz.
        out: the wav file.
        each: called with every frame.
        check: called after every frame; what it raises ends the stream and leaves no file.
    """
    size, left = engine.frame_size, len(pcm)
    frames = F.pad(pcm, (0, -left % size)).view(-1, size)
    with (
        written_whole(out) as beside,
        soundfile.SoundFile(beside, "w", SAMPLE_RATE, 1, "PCM_16", format="WAV") as wav,
    ):
        for frame in frames:
            said = engine.step(frame)
            wav.write(_int16(said.pcm[0, :left]))
            left -= size
            each(said)
            check()


def talk(
    engine: Engine, card: SoundCard, each: Callable[[Frame], object], stop: Callable[[], bool]
) -> None:
    """Answer what the microphone brings, frame by frame, until `stop()`.

    Raises:
        UserError: the microphone has brought nothing for 5 seconds.
    """
    heard, last = np.zeros(FRAME, np.float32), time.monotonic()
    while not stop():
        if card.heard.get(heard, timeout=0.1):
            last = time.monotonic()
            said = engine.step(heard)
            card.said.put(said.pcm[0].numpy())
            each(said)
        elif time.monotonic() - last > SILENT_MIC_SECONDS:
            raise UserError(f"the microphone has brought nothing for {SILENT_MIC_SECONDS:.0f} s")


def _int16(pcm: Tensor) -> np.ndarray[Any, Any]:
    return (pcm.clamp(-1, 1) * 32767).round().to(torch.int16).numpy()
