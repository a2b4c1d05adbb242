"""What all requests share: the host of the conversations, the kept memories, counts and limits."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

from aiohttp import web

from moshi_ttt.frame_times import FRAME_MS
from moshi_ttt.host import Conversation, Host
from moshi_ttt.kept import Kept
from moshi_ttt.web.guard import Guard
from moshi_ttt.web.limits import Bucket, Door, Limits
from moshi_ttt.web.metrics import Metrics
from moshi_ttt.web.protocol import LEAVING, Over

_SHOWN = ("update", "loss_before", "loss_after", "moved", "state", "gate_abs")
_TIMES_SECONDS = 0.5


class Guest(Protocol):
    """A conversation, as far as the service knows one."""

    def end(self, over: Over) -> None:
        """End it, soon."""
        ...


@dataclass
class Service:
    """See the top of this file.

    Attributes:
        host: of the conversations.
        model: what is talked to, for people.
        layers: those with a memory that keeps a state.
        kept: memories by name; None keeps nothing for anyone.
        limits: of a client.
        guests: those that are there.
        leaving: names whose conversations are over and whose memories are being saved.
        stopping: no new conversation begins.
    """

    host: Host
    model: str
    layers: Sequence[str]
    kept: Kept | None
    limits: Limits
    token: str | None = None
    origins: Sequence[str] = ()
    guests: set[Guest] = field(default_factory=set)
    leaving: set[str] = field(default_factory=set)
    stopping: bool = False

    def __post_init__(self) -> None:
        """Make the parts."""
        self.metrics = Metrics(self.host)
        self.guard = Guard(self.token, self.origins, self.metrics.refuse)
        sockets = self.host.capacity + self.limits.sockets
        self.door = Door(sockets, self.limits.patience, lambda: self.metrics.refuse("sockets"))
        self.arrivals = Bucket(2.0 * self.host.capacity, 8.0 * self.host.capacity)
        self.numbers = count(1)
        self._times: dict[str, Any] = {}
        self._times_until = 0.0

    @property
    def keeps(self) -> bool:
        """Whether a memory can be kept."""
        return self.kept is not None and bool(self.layers)

    def about(self) -> dict[str, Any]:
        """What it is that one can talk to."""
        return {
            "name": self.model,
            "memory": bool(self.layers),
            "layers": list(self.layers),
            "rows": self.host.capacity,
            "taken": self.host.taken,
            "frame_ms": FRAME_MS,
            "sample_rate": 24_000,
            "keeps": self.keeps,
            "token": self.guard.wants_token,
        }

    def stats(self, conversation: Conversation) -> dict[str, Any]:
        """How a conversation and the host are doing, as the page shows it."""
        if time.monotonic() > self._times_until:  # sorting 65536 of them takes a millisecond
            times = self.host.engine.times
            p50, p95, _ = times.percentiles()
            ms = {"last": times.recent(1), "p50": p50, "p95": p95, "mean": times.recent()}
            self._times = {name: _plain(value) for name, value in ms.items()}
            self._times_until = time.monotonic() + _TIMES_SECONDS
        said = {
            "type": "stats",
            "frames": conversation.frames,
            "ms": self._times,
            "dropped": {"heard": conversation.dropped_heard, "said": conversation.dropped_said},
            "late": self.host.engine.times.late,
            "sessions": self.host.taken,
            "rows": self.host.capacity,
        }
        if (reading := conversation.reading) is not None:
            said["layers"] = {name: _shown(values) for name, values in reading.layers.items()}
        return said

    def stop(self) -> None:
        """Tell all conversations that the server stops, and let none begin."""
        self.stopping = True
        for guest in set(self.guests):
            guest.end(stops())


def stops() -> Over:
    """The end of a conversation whose server stops."""
    return Over("stopped", "the server stops", LEAVING)


SERVICE = web.AppKey("service", Service)


def _shown(values: Mapping[str, list[float] | float]) -> dict[str, float | None]:
    """Of one layer: heads averaged, those that are no number left out."""
    return {name: _mean(values[name]) for name in _SHOWN if name in values}


def _mean(value: list[float] | float) -> float | None:
    numbers = value if isinstance(value, list) else [value]
    finite = [v for v in numbers if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else None


def _plain(value: float) -> float | None:
    return round(value, 2) if math.isfinite(value) else None
