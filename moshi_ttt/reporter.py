"""What a conversation tells people: words as they come, statistics, and how it went."""

from __future__ import annotations

import json
import sys
import time
from typing import TextIO

from moshi_ttt.engine import Engine, Frame, memory_norms
from moshi_ttt.errors import UserError
from moshi_ttt.findings import History, findings, table
from moshi_ttt.frame_times import FRAME_MS
from moshi_ttt.monitor import Reading, to_json
from moshi_ttt.sound import SoundCard
from moshi_ttt.terminal import Console, Outlet, bar

STATS_SECONDS = 5.0
NO_SOUND_SECONDS, NO_SOUND_DB = 10.0, -90.0  # the least noise of a microphone is above
METER_FRAMES = 2  # from one meter to the next


class Readings:
    """Readings of an engine's memories: kept for the end, and written down line by line.

    Args:
        path: a JSONL file to make; a line is there as soon as its reading is. None writes nothing.
        live: never wait for the file.

    Raises:
        UserError: the file cannot be made.
    """

    def __init__(self, path: str | None = None, *, live: bool = False) -> None:
        self.history = History()
        try:
            self._file: TextIO | None = None if path is None else open(path, "w", buffering=1)
        except OSError as error:
            raise UserError(f"--stats {path}: {error.strerror}") from error
        self._outlet = Outlet(self._file) if live and self._file is not None else None

    def __call__(self, reading: Reading) -> None:
        """One more reading."""
        self.history.add(reading)
        if self._file is not None:
            (self._outlet or self._file).write(json.dumps(to_json(reading, "frame")) + "\n")

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
        if self._outlet is not None:
            self._outlet.close()
        if self._file is not None:
            self._file.close()


class Reporter:
    """Prints text as it comes, and statistics at times and at the end.

    With a file it waits until they are written; in a live conversation it never does.

    Args:
        engine: whose.
        card: of a live conversation.
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
        self._console = None if card is None else Console(sys.stdout, sys.stderr)
        self._silent, self._told = 0, False
        self._next = time.monotonic() + STATS_SECONDS

    def begin(self, buffers_ms: float, *, keys: bool) -> None:
        """Say what a live conversation goes through and how it is steered.

        Args:
            buffers_ms: of the sound card.
            keys: whether there is a keyboard to mute with.
        """
        assert self.card is not None
        assert self._console is not None
        delay = self.card.delay_ms + buffers_ms
        mute = "unmutes" if self.card.muted else "mutes"
        steer = f"m {mute} the microphone, " if keys else ""
        if self.card.muted and not keys:
            steer = "the microphone stays muted (there is no keyboard to unmute with), "
        self._console.say(
            f"microphone: {self.card.microphone}; loudspeaker: {self.card.loudspeaker}\n"
            f"from ear to voice {delay:.0f} ms, and what a frame takes to compute\n"
            f"{steer}Ctrl-C ends; use headphones, or Moshi hears and answers itself\n"
        )

    def frame(self, frame: Frame) -> None:
        """Print a frame's text, and statistics when their time has come."""
        if self.readings is not None and (reading := frame.readings[0]) is not None:
            self.readings(reading)
        piece = frame.text[0]
        if piece and self._console is not None:
            self._console.words(piece)
        elif piece:
            sys.stdout.write(piece)
            sys.stdout.flush()
        if self.card is not None and self._console is not None:
            self._live(self.card, self._console)
        if self.often and time.monotonic() >= self._next:
            self._next = time.monotonic() + STATS_SECONDS
            if self._console is not None:
                self._console.say(self._statistics())
                return
            if sys.stdout.isatty():
                sys.stdout.write("\n")
            sys.stderr.write(self._statistics())

    def _live(self, card: SoundCard, console: Console) -> None:
        """The meter, and what a person should know now rather than at the end."""
        if card.echo.update() is not None and not self._told:
            self._told = True
            console.say(f"{echo_words(card)}\n")
        heard, said = card.levels_db
        self._silent = self._silent + 1 if heard < NO_SOUND_DB and not card.muted else 0
        if self._silent == round(1000 * NO_SOUND_SECONDS / FRAME_MS):
            console.say(
                f"the microphone {card.microphone.name!r} has brought nothing but silence for "
                f"{NO_SOUND_SECONDS:.0f} s: is it the right one, and switched on?\n"
            )
        if self.engine.times.count % METER_FRAMES == 0:
            you = "muted; m unmutes".ljust(len(bar(0.0))) if card.muted else bar(heard)
            lost = card.heard.dropped + card.said.dropped
            lost_words = f"  {lost} frames dropped" if lost else ""
            console.meter(f"you {you}  moshi {bar(said)}{lost_words}")

    def end(self) -> None:
        """End the line of text, and write the statistics to stderr, if there was anything."""
        console, words = self._console, ""
        if self.engine.times.count:
            words = self._statistics()
            if self.card is not None:
                words += f"{echo_words(self.card)}\n"
            if self.readings is not None:
                words += self.readings.words()
        if console is not None:
            console.close()
            words += f"{console.lost} characters of text were not taken\n" if console.lost else ""
        elif words:
            sys.stdout.write("\n")
            sys.stdout.flush()
        sys.stderr.write(words)

    def _statistics(self) -> str:
        latest = "" if self.readings is None else self.readings.latest()
        return statistics(self.engine, self.card) + latest


def echo_words(card: SoundCard) -> str:
    """Whether the microphone hears the loudspeaker, and what to do then, in a line."""
    echo = card.echo.worst
    if echo is not None:
        return (
            f"echo: the microphone hears the loudspeaker {echo.delay_ms:.0f} ms later (correlation "
            f"{echo.correlation:.2f}), and Moshi answers itself: use headphones, or a microphone "
            "with echo cancelling"
        )
    if not card.echo.enough:
        return "echo: not known, too little was said"
    return f"echo: none (correlation {card.echo.correlation:.2f})"


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
