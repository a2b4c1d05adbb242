"""What a live conversation shows, and the keys it takes, without ever waiting for a terminal.

A terminal that is stopped (Ctrl-S), a pipe that nobody reads and a disk that is slow hold up only
the thread that writes to them. What finds no room in its bounded queue is lost, and counted.
"""

from __future__ import annotations

import io
import os
import select
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

QUEUED = 1 << 16  # characters that wait for a file at most
WAIT_SECONDS = 2.0  # for a file that takes nothing, at the end
CELLS, LOWEST_DB = 20, -60.0  # of the meter's bars


class Outlet:
    """A file that is written to by a thread of its own.

    Args:
        file: a text file; one with a descriptor is written to directly, past its buffer, so that
            nothing is left in there for the end of the process to wait for.

    Attributes:
        lost: characters that were not written, because there was no room or the file failed.
    """

    def __init__(self, file: TextIO) -> None:
        self.lost = 0
        self._file, self._descriptor = file, _descriptor(file)
        self._texts: deque[str] = deque()
        self._queued, self._ended = 0, False
        self._changed = threading.Condition()
        file.flush()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def behind(self) -> bool:
        """Whether more than a line or two wait to be written."""
        return self._queued > 400

    def write(self, text: str) -> bool:
        """Have `text` written, all of it or nothing; False if there is no room. At once."""
        with self._changed:
            if self._ended or self._queued + len(text) > QUEUED:
                self.lost += len(text)
                return False
            self._texts.append(text)
            self._queued += len(text)
            self._changed.notify_all()
        return True

    def close(self) -> None:
        """End the thread; waits a moment for what is still to be written."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join(WAIT_SECONDS)
        if self._thread.is_alive():
            self.lost += self._queued

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._texts or self._ended)
                if not self._texts:
                    return
                text = "".join(self._texts)
                self._texts.clear()
            try:
                self._put(text)
            except OSError:  # a closed pipe, a terminal that is gone, a full disk
                self.lost += len(text)
            with self._changed:
                self._queued -= len(text)

    def _put(self, text: str) -> None:
        if self._descriptor is None:
            self._file.write(text)
            self._file.flush()
            return
        data = memoryview(text.encode(self._file.encoding or "utf-8", "replace"))
        while data:
            data = data[os.write(self._descriptor, data) :]


def _descriptor(file: TextIO) -> int | None:
    try:
        return file.fileno()
    except io.UnsupportedOperation:  # kept in memory, by a test or a notebook
        return None


class Console:
    """Moshi's words, messages, and below them a line with the meter.

    Words go to `out`, everything else to `err`. Where both are the same terminal, words go on
    where they ended above the meter; where only `err` is one, the meter is alone there; where it is
    none there is no meter.

    Args:
        out: stdout.
        err: stderr.
    """

    def __init__(self, out: TextIO, err: TextIO) -> None:
        shows = err.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._terminal = err.fileno() if shows else None
        self.err = Outlet(err)
        self.out = self.err if shows and out.isatty() else Outlet(out)
        self._column, self._drawn = 0, False  # where the words end; whether the meter is there

    def words(self, piece: str) -> None:
        """Go on with a piece of text."""
        if self.out is not self.err:
            self.out.write(piece)
            return
        if self._column + len(piece) >= self._width:
            piece = "\n" + piece.lstrip()
        _, newline, tail = piece.rpartition("\n")
        back = self._without_meter()
        if self.out.write(back + piece):
            self._drawn = False
            self._column = len(tail) + (0 if newline else self._column)

    def say(self, lines: str) -> None:
        """Write whole lines, each with its end, to `err`."""
        start = self._without_meter()
        if self.out is self.err and self._column:
            start += "\n"
        if self.err.write(start + lines):
            self._drawn = False
            self._column = 0 if self.out is self.err else self._column

    def meter(self, line: str) -> None:
        """Show a line in place of the last one; skipped while the terminal is behind."""
        if self._terminal is None or self.err.behind:
            return
        line = line[: self._width - 1]
        above = self.out is self.err and not self._drawn and self._column
        if self.err.write(("\n" if above else "\r") + line + "\x1b[K"):
            self._drawn = True

    def close(self) -> None:
        """Take the meter away, end the line of words, and write what is left."""
        if self._drawn or self._column:
            self.err.write(self._without_meter() + ("\n" if self._column else ""))
        if self.out is not self.err:
            self.out.write("\n")
            self.out.close()
        self.err.close()

    @property
    def lost(self) -> int:
        """Characters that could not be written."""
        return self.err.lost + (0 if self.out is self.err else self.out.lost)

    @property
    def _width(self) -> int:
        assert self._terminal is not None
        try:
            return os.get_terminal_size(self._terminal).columns or 80
        except OSError:  # it has just been closed
            return 80

    def _without_meter(self) -> str:
        """What takes the meter away and goes back to the end of the words above it."""
        if not self._drawn:
            return ""
        above = f"\x1b[A\x1b[{self._column + 1}G" if self.out is self.err and self._column else ""
        return "\r\x1b[K" + above


def bar(db: float) -> str:
    """A level as a bar of 20 cells, 3 dB each, and the number."""
    cells = round(CELLS * (1 - max(LOWEST_DB, min(db, 0.0)) / LOWEST_DB))
    number = f"{db:4.0f} dBFS" if db >= LOWEST_DB else "   silent"
    return f"[{'#' * cells}{'-' * (CELLS - cells)}] {number}"


@contextmanager
def pressed_keys(file: TextIO | None) -> Iterator[Callable[[], str] | None]:
    """Take single keys from the terminal while the body runs; then it is as it was.

    Args:
        file: stdin; None where the process has none.

    Yields:
        A function that returns what was pressed since, at once; None where `file` is no terminal
        that can be asked.
    """
    try:
        import termios
    except ImportError:  # Windows
        yield None
        return
    if file is None or file.closed or not file.isatty():
        yield None
        return
    keyboard = _Keyboard(file.fileno(), termios)
    try:
        yield keyboard.pressed
    finally:
        keyboard.restore()


class _Keyboard:
    """Never asks for anything in the background, where asking stops the process."""

    def __init__(self, descriptor: int, termios: Any) -> None:
        self._descriptor, self._termios = descriptor, termios
        self._before = termios.tcgetattr(descriptor)

    def _ours(self) -> bool:
        """Whether the process is in the foreground of its terminal."""
        return os.tcgetpgrp(self._descriptor) == os.getpgrp()

    def pressed(self) -> str:
        termios = self._termios
        try:
            if not self._ours():
                return ""
            now = termios.tcgetattr(self._descriptor)
            if now[3] & (termios.ICANON | termios.ECHO):  # at first, and after a stop (Ctrl-Z)
                now[3] &= ~(termios.ICANON | termios.ECHO)
                now[6][termios.VMIN], now[6][termios.VTIME] = 1, 0
                termios.tcsetattr(self._descriptor, termios.TCSANOW, now)
            if not select.select([self._descriptor], [], [], 0)[0]:
                return ""
            return os.read(self._descriptor, 64).decode("ascii", "ignore")
        except (OSError, termios.error):  # the terminal is gone, and SIGHUP on its way
            return ""

    def restore(self) -> None:
        termios = self._termios
        try:
            if self._ours():
                # at once: a terminal that is stopped (Ctrl-S) never gets to the end of its output
                termios.tcflush(self._descriptor, termios.TCIFLUSH)
                termios.tcsetattr(self._descriptor, termios.TCSANOW, self._before)
        except (OSError, termios.error):  # gone
            return
