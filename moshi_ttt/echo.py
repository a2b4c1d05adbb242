"""Does the microphone hear the loudspeaker? The envelopes of both, compared at every delay.

Moshi that hears itself answers itself. What was played and what was heard are followed as levels,
100 a second; an echo is a delay at which the one rises and falls as the other did a moment before.

Rises and falls over 50 ms are compared, not levels: two people who talk at the same time have
levels that correlate by as much as 0.7 over ten seconds, their rises and falls by 0.2. And only
where something was played, or a long turn of the user would hide the echo of a short answer.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

HZ = 100  # levels a second
LONGEST = 100  # levels: delays up to one second
RISE = 5  # levels: 50 ms
FLOOR, ACTIVE = 1e-6, -5.0  # mean square of what counts as silence; its log10 for something played
MEMORY = 30 * HZ  # levels: what is further back counts for less
ENOUGH = 8 * HZ  # levels with something played, before anything is said
ECHO = 0.35  # correlation
SLIP_SECONDS = 0.1  # a stream that falls behind the clock by more has lost sound
_RING = 8 * HZ


class Echo(NamedTuple):
    """An echo.

    Attributes:
        correlation: of the rises and falls of what was played and of what was heard, 0 to 1.
        delay_ms: from the one to the other, the sound card's buffers included.
    """

    correlation: float
    delay_ms: float


class Envelope:
    """The levels of a stream of samples, log10 of the mean square, in a ring that is written once.

    Args:
        rate: Hz.

    Attributes:
        count: levels so far.
    """

    def __init__(self, rate: int) -> None:
        self.rate, self.count = rate, 0
        self._levels = np.full(_RING, np.log10(FLOOR))
        self._sum, self._samples = 0.0, 0
        self._began: float | None = None
        self._ahead = 0.0

    def add(self, samples: NDArray[np.float32], now: float | None = None) -> None:
        """Go on with `samples [N]`, which have come or gone at `now`, in seconds.

        What the clock says is missing (a stalled or overrun sound card) counts as silence, or the
        delay between two streams would change.
        """
        now = time.monotonic() if now is None else now
        if self._began is None:
            self._began = now
        behind = now - self._began + self._ahead - self._samples / self.rate
        self._ahead = max(self._ahead, self._ahead - behind)
        if behind > SLIP_SECONDS:
            self._skip(round(behind * self.rate))
        at = 0
        while at < len(samples):
            edge = (self.count + 1) * self.rate // HZ
            part = samples[at : at + edge - self._samples]
            self._sum += float(part @ part)
            self._samples, at = self._samples + len(part), at + len(part)
            if self._samples == edge:
                mean = self._sum / (edge - self.count * self.rate // HZ)
                self._levels[self.count % _RING] = np.log10(mean + FLOOR)
                self._sum, self.count = 0.0, self.count + 1

    def _skip(self, samples: int) -> None:
        self._samples += samples
        count = self._samples * HZ // self.rate
        silent = np.arange(max(self.count, count - _RING), count)
        self._levels[silent % _RING] = np.log10(FLOOR)
        self._sum, self.count = 0.0, count

    def rises(self, first: int, last: int) -> NDArray[np.float64]:
        """Levels `first` to `last - 1`, less those 50 ms before each."""
        at = np.arange(first, last)
        return self._levels[at % _RING] - self._levels[(at - RISE) % _RING]

    def active(self, first: int, last: int) -> NDArray[np.bool_]:
        """Where there is something to hear, or was 50 ms before."""
        at = np.arange(first, last)
        return np.maximum(self._levels[at % _RING], self._levels[(at - RISE) % _RING]) > ACTIVE


class EchoMeter:
    """Compares two envelopes while they are being written, in fixed memory.

    Args:
        played: of the loudspeaker.
        heard: of the microphone.

    Attributes:
        worst: the echo with the highest correlation so far; None without any.
    """

    def __init__(self, played: Envelope, heard: Envelope) -> None:
        self.played, self.heard = played, heard
        self.worst: Echo | None = None
        self._done = LONGEST + RISE
        # by delay, -LONGEST to LONGEST: played and heard; played twice; heard twice; levels
        self._sums = np.zeros((4, 2 * LONGEST + 1))

    def update(self) -> Echo | None:
        """Take in the levels that are new; the echo, if there is one now."""
        ready = min(self.heard.count, self.played.count - LONGEST)
        start = max(self._done, ready - _RING // 4)  # after a gap; the ring holds no more
        if start < ready:
            self._done = ready
            self._add(start, ready)
        found = self._echo()
        if found is not None and (self.worst is None or found > self.worst):
            self.worst = found
        return found

    def _add(self, start: int, ready: int) -> None:
        first, last, delays = start - LONGEST, ready + LONGEST, 2 * LONGEST + 1
        # [levels, delays]: what was played `delay` levels before each that was heard
        active = sliding_window_view(self.played.active(first, last), delays)[:, ::-1]
        if not active.any():
            return
        played = sliding_window_view(self.played.rises(first, last), delays)[:, ::-1] * active
        heard = self.heard.rises(start, ready)
        self._sums *= (1 - 1 / MEMORY) ** (ready - start)
        self._sums[0] += heard @ played
        self._sums[1] += (played**2).sum(0)
        self._sums[2] += heard**2 @ active
        self._sums[3] += active.sum(0)

    @property
    def enough(self) -> bool:
        """Whether enough was played to say anything."""
        return bool(self._sums[3, LONGEST] >= ENOUGH)

    @property
    def correlation(self) -> float:
        """The highest correlation at a delay that an echo can have, now."""
        return float(self._correlations()[LONGEST:].max())

    def _correlations(self) -> NDArray[np.float64]:
        both, played, heard, _ = self._sums
        return both / np.sqrt(played * heard + 1e-12)

    def _echo(self) -> Echo | None:
        """An echo comes after the sound: what correlates as well before it (a beat) is none."""
        if not self.enough:
            return None
        by_delay = self._correlations()
        delay = int(by_delay[LONGEST:].argmax())
        best, before = by_delay[LONGEST + delay], by_delay[:LONGEST].max()
        if best < ECHO or best < 1.5 * before:
            return None
        return Echo(float(best), 1000 * delay / HZ)
