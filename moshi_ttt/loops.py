"""The two loops around the engine, a file's and a microphone's, and what ends them."""

from __future__ import annotations

import os
import signal
import sys
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
from moshi_ttt.engine import Engine, Frame
from moshi_ttt.errors import UserError
from moshi_ttt.files import written_whole
from moshi_ttt.frame_times import FRAME_MS
from moshi_ttt.frames import FRAME
from moshi_ttt.reporter import Reporter
from moshi_ttt.sound import SoundCard, level_db, sound_running
from moshi_ttt.terminal import pressed_keys

DEAD_SECONDS, WAIT_SECONDS = 5.0, 0.1  # of a device that has stopped; of one look at it


ENDS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


class Interrupts:
    """Ctrl-C, SIGTERM and a closed terminal as a request: the frame at work is finished first.

    Attributes:
        asked: there was one.
        insisted: a second Ctrl-C has broken off whatever was going on.
    """

    def __init__(self) -> None:
        self.asked = self.insisted = False
        self._terminals: list[int] = []
        self._first = signal.SIGINT

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if signum not in (signal.SIGINT, signal.SIGTERM):
            self._terminal_gone()
        if not self.asked:
            self.asked, self._first = True, signal.Signals(signum)
        elif signum == signal.SIGINT:  # `timeout` sends SIGTERM twice and means it once
            self.insisted = True
            raise KeyboardInterrupt(signal.SIGINT)

    def check(self) -> None:
        """Raise KeyboardInterrupt, with the signal, if it was asked for."""
        if self.asked:
            raise KeyboardInterrupt(self._first)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Take them while the body runs; `nohup` has the last ignored, and so it stays."""
        self._terminals = [file.fileno() for file in _open_files() if file.isatty()]
        taken = [s for s in ENDS if s in ENDS[:2] or signal.getsignal(s) != signal.SIG_IGN]
        before = {s: signal.signal(s, self) for s in taken}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _terminal_gone(self) -> None:
        """Writing to it would be an error, in the midst of saving what is to be kept."""
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _open_files() -> list[TextIO]:
    """The process's own, of those that it was started with."""
    return [file for file in (sys.stdin, sys.stdout, sys.stderr) if file is not None]


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


def converse(
    engine: Engine,
    card: SoundCard,
    reporter: Reporter,
    each: Callable[[Frame], object],
    stop: Callable[[], bool],
) -> None:
    """Talk through microphone and loudspeaker, and take the keys of the terminal, until `stop()`.

    Args:
        engine: of one row.
        card: not yet running.
        reporter: says how it begins.
        each: called with every frame.
        stop: asked before every frame.

    Raises:
        UserError: a device fails, or no longer brings or takes anything.
    """
    with sound_running(card) as buffers_ms, pressed_keys(sys.stdin) as pressed:
        reporter.begin(buffers_ms, keys=pressed is not None)

        def keys_and_stop() -> bool:
            if pressed is not None and pressed().lower().count("m") % 2:
                card.muted = not card.muted
            return stop()

        talk(engine, card, each, keys_and_stop)


def talk(
    engine: Engine, card: SoundCard, each: Callable[[Frame], object], stop: Callable[[], bool]
) -> None:
    """Answer what the microphone brings, frame by frame, until `stop()`.

    Raises:
        UserError: the sound card has stopped, or the microphone has brought, or the loudspeaker
            taken, nothing for 5 seconds.
    """
    heard, waits, played, kept = np.zeros(FRAME, np.float32), 0, card.played, 0
    # Counted and not timed: a laptop that slept, or a process that was stopped, wakes up here.
    try:
        while not stop():
            if card.stopped:
                raise UserError("the sound card has stopped by itself: was it taken away?")
            if not card.hear(heard, timeout=WAIT_SECONDS):
                waits += 1
                if waits * WAIT_SECONDS >= DEAD_SECONDS:
                    raise UserError(f"the microphone has brought nothing for {DEAD_SECONDS:.0f} s")
                continue
            waits, before = 0, level_db(heard)
            said = engine.step(heard)
            pcm = said.pcm[0].numpy()
            card.said.put(pcm)
            card.levels_db = before, level_db(pcm)
            each(said)
            kept, played = kept + 1 if card.played == played else 0, card.played
            if kept * FRAME_MS >= 1000 * DEAD_SECONDS:
                raise UserError(f"the loudspeaker has taken nothing for {DEAD_SECONDS:.0f} s")
    finally:
        card.ended = True


def _int16(pcm: Tensor) -> np.ndarray[Any, Any]:
    return (pcm.clamp(-1, 1) * 32767).round().to(torch.int16).numpy()
