"""Ctrl-C and SIGTERM as a request: the step at work is finished and saved first."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """A run was asked to stop, and its state is saved.

    Attributes:
        signum: by which signal.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class StopRequest:
    """What was asked for so far; a second signal insists.

    Attributes:
        signum: the signal, None as long as there was none.
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Take the signals while the body runs."""
        before = {s: signal.signal(s, self) for s in SIGNALS}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
