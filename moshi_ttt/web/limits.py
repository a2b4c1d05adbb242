"""How much a client may ask of the server, and sockets that nobody talks on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web
from aiohttp.typedefs import Handler


@dataclass(frozen=True)
class Limits:
    """Of a client; seconds unless said otherwise.

    Attributes:
        idle: without sound, a pause included, until a conversation ends.
        save: between two saves of a memory.
        keep: at least, between two saves that were asked for.
        slow: until a client that does not read what it is sent is given up.
        close: that a client has to answer the end of a conversation.
        patience: that a socket has to send a request, the first and every later one.
        message: bytes.
        faster: than real time, sound may come...
        burst: ... beyond so much of it, as a network that had stalled brings it.
        messages: a second...
        message_burst: ... beyond so many.
        sockets: at a time, beyond those of conversations.
        memories: kept by name; a disk is only so large, and names cost nothing.
    """

    idle: float = 60.0
    save: float = 60.0
    keep: float = 2.0
    slow: float = 10.0
    close: float = 3.0
    patience: float = 15.0
    message: int = 1 << 16
    faster: float = 2.0
    burst: float = 30.0
    messages: float = 500.0
    message_burst: float = 2000.0
    sockets: int = 64
    memories: int = 1000


class Bucket:
    """So much a second, and so much at once.

    Args:
        rate: a second.
        size: at once.
        clock: in seconds.
    """

    def __init__(
        self, rate: float, size: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate, self._size, self._clock = rate, size, clock
        self._left, self._then = size, clock()

    def take(self, amount: float = 1.0) -> bool:
        """Take some; False, and nothing is taken, if there is less."""
        now = self._clock()
        self._left = min(self._size, self._left + (now - self._then) * self._rate)
        self._then = now
        if amount > self._left:
            return False
        self._left -= amount
        return True

    @property
    def full(self) -> bool:
        """Nothing has been taken that has not come back."""
        return self._left + (self._clock() - self._then) * self._rate >= self._size


class _Shut(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.abort()


class Door:
    """Lets so many sockets in, and shows those out that ask for nothing.

    A request's head that comes a byte a minute, a connection kept alive for nothing, an answer that
    is not taken: aiohttp waits for each of them for ever, or an hour.

    Args:
        most: sockets at a time.
        patience: seconds.
        refused: called for every socket that is not let in.

    Attributes:
        server: aiohttp's, once it is there.
    """

    def __init__(self, most: int, patience: float, refused: Callable[[], object]) -> None:
        self._most, self._patience, self._refused = most, patience, refused
        self._busy: set[object] = set()
        self._since: dict[object, float] = {}
        self.server: web.Server | None = None

    def __call__(self) -> asyncio.Protocol:
        """The protocol of a new socket."""
        assert self.server is not None
        if len(self.server.connections) >= self._most:
            self._refused()
            return _Shut()
        return self.server()

    async def pass_through(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """A middleware: a socket has time for as long as a request of its is being handled."""
        protocol = request.protocol
        self._busy.add(protocol)
        try:
            return await handler(request)
        finally:
            self._busy.discard(protocol)
            self._since[protocol] = time.monotonic()

    async def watch(self) -> None:
        """Look around every second, for ever."""
        while True:
            await asyncio.sleep(min(1.0, self._patience / 4))
            assert self.server is not None
            now, there = time.monotonic(), self.server.connections
            self._since = {p: self._since.get(p, now) for p in there}
            for protocol in there:
                late = protocol not in self._busy and now - self._since[protocol] > self._patience
                if late and protocol.transport is not None:
                    protocol.transport.abort()
