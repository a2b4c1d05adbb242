"""All that a client is sent, by one task, so that one who does not read holds up nobody else.

Nothing is queued for it but what the host keeps of Moshi's voice (a full queue drops its oldest
frame, before it is encoded, so that a stream of Opus stays whole) and the last few messages of
metadata; of all else only the newest is sent.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from aiohttp import web

from moshi_ttt.host import Conversation
from moshi_ttt.web import protocol
from moshi_ttt.web.metrics import Metrics
from moshi_ttt.web.protocol import Over, message, metadata
from moshi_ttt.web.sound import Sound

_MOST_NEWS = 8


class Mouth:
    """Speaks to one client.

    Args:
        ws: its websocket.
        metrics: that count what is sent.
        readings: the client wants metadata.

    Attributes:
        answered_at: when (`time.monotonic`) it last answered a ping of the websocket, and so had
            read what was sent before.
    """

    def __init__(self, ws: web.WebSocketResponse, metrics: Metrics, *, readings: bool) -> None:
        self._ws, self._metrics, self._readings = ws, metrics, readings
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._news: deque[dict[str, Any]] = deque(maxlen=_MOST_NEWS)
        self._asked: bytes | None = None
        self._pinged = self._ticked = False
        self.answered_at = time.monotonic()

    def notify(self) -> None:
        """There is something to say; any thread may call it."""
        self._loop.call_soon_threadsafe(self._wake.set)

    def tell(self, news: dict[str, Any]) -> None:
        """A message of metadata, if the client wants any."""
        if self._readings:
            self._news.append(news)
            self._wake.set()

    def pinged(self) -> None:
        """The client sent a ping of the protocol's."""
        self._pinged = True
        self._wake.set()

    def asked(self, payload: bytes) -> None:
        """The client sent a ping of the websocket's."""
        self._asked = payload
        self._wake.set()

    def tick(self) -> None:
        """A second is over."""
        self._ticked = True
        self._wake.set()

    async def send(self, data: bytes) -> None:
        """Send one message.

        Raises:
            Over: the client has left.
        """
        self._metrics.sent.inc(len(data))
        await _unless_left(self._ws.send_bytes(data))

    async def run(
        self, conversation: Conversation, sound: Sound, stats: Callable[[], dict[str, Any]]
    ) -> None:
        """Say what there is to say, until the conversation is over.

        Args:
            conversation: whose voice and text.
            sound: of the client.
            stats: what it is told every second.

        Raises:
            Over: the client has left.
        """
        while conversation.over is None:
            await self._wake.wait()
            self._wake.clear()
            while (said := conversation.said()) is not None:
                if data := sound.said(said[0]):
                    await self.send(message(protocol.SOUND, data))
                if said[1]:
                    await self.send(message(protocol.TEXT, said[1].encode()))
            if self._pinged:
                self._pinged = False
                await self.send(message(protocol.PING))
            await self._send_news()
            if self._ticked:
                self._ticked = False
                if self._readings:
                    await self.send(metadata(stats()))
                await _unless_left(self._ws.ping())
            if self._asked is not None:
                payload, self._asked = self._asked, None
                await _unless_left(self._ws.pong(payload))

    async def say_goodbye(self, over: Over) -> None:
        """Say why it is over, and close.

        Raises:
            Over: the client has left.
        """
        if not self._ws.closed:
            await self._send_news()
            if over.sentence:
                await self.send(message(protocol.ERROR, over.sentence.encode()))
            await self._ws.close(code=over.code)

    async def _send_news(self) -> None:
        while self._news:
            await self.send(metadata(self._news.popleft()))


async def _unless_left(sending: Coroutine[Any, Any, None]) -> None:
    try:
        await sending
    except ConnectionError:
        raise Over("left") from None
