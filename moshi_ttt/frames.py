"""Bounded queues of frames between threads, none of which waits for another."""

from __future__ import annotations

import threading
import time

import numpy as np
from numpy.typing import NDArray

FRAME = 1920
"""Samples of a frame: 80 ms at 24 kHz."""

Samples = NDArray[np.float32]


class FrameRing:
    """A queue of at most `slots` frames; a full one loses its oldest.

    Attributes:
        dropped: frames lost so.
        total: frames that ever came.
        size: samples of a frame.
        held: frames in it.
    """

    def __init__(self, slots: int, size: int = FRAME) -> None:
        self._frames, self._came = np.zeros((slots, size), np.float32), np.zeros(slots)
        self.size = size
        self._first = self.held = self.dropped = self.total = 0
        self._changed = threading.Condition()

    def put(self, frame: Samples) -> None:
        """Add a frame, at once."""
        with self._changed:
            slots = len(self._frames)
            if self.held == slots:
                self._first = (self._first + 1) % slots
                self.held -= 1
                self.dropped += 1
            last = (self._first + self.held) % slots
            self._frames[last], self._came[last] = frame, time.monotonic()
            self.held += 1
            self.total += 1
            self._changed.notify()

    def get(self, out: Samples, timeout: float = 0.0) -> bool:
        """Move the oldest frame to `out`; False if none came within `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.held > 0, timeout):
                return False
            out[:] = self._frames[self._first]
            self._first = (self._first + 1) % len(self._frames)
            self.held -= 1
            return True

    def oldest(self) -> float | None:
        """When the oldest frame came, in seconds of `time.monotonic`; None of an empty queue."""
        with self._changed:
            return float(self._came[self._first]) if self.held else None

    def clear(self) -> None:
        """Forget what is in it; that does not count as lost."""
        with self._changed:
            self.held = 0
