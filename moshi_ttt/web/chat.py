"""A conversation over a websocket.

Tasks: one hears what the client sends, one says all that it is sent, one looks at the clock, one
saves. Whichever finds that it is over ends all.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from aiohttp import WebSocketError, WSMessage, WSMsgType, web

from moshi_ttt.errors import UserError
from moshi_ttt.frame_times import FRAME_MS
from moshi_ttt.host import Conversation, Full
from moshi_ttt.saved_memory import SavedMemory
from moshi_ttt.web import protocol
from moshi_ttt.web.hear import Ears
from moshi_ttt.web.protocol import FAILED, FULL, RULE, Over, Wishes, message
from moshi_ttt.web.remember import for_clients
from moshi_ttt.web.saving import Saving
from moshi_ttt.web.say import Mouth
from moshi_ttt.web.service import SERVICE, Service, stops
from moshi_ttt.web.sound import Sound, sound_of

_LOG = logging.getLogger("moshi_ttt.web")
_UNTAKEN = 1 << 14  # bytes that wait for the network; what is beyond is dropped as frames


async def chat(request: web.Request) -> web.StreamResponse:
    """`GET /api/chat`: see `moshi_ttt.web.protocol`."""
    service = request.app[SERVICE]
    ws = web.WebSocketResponse(
        max_msg_size=service.limits.message,
        compress=False,  # Opus has nothing left to compress, and a bomb nowhere to hide
        autoping=False,
        timeout=service.limits.close,
        writer_limit=_UNTAKEN,
    )
    if request.transport is None:  # gone already
        return web.Response()
    request.transport.set_write_buffer_limits(high=_UNTAKEN)
    try:
        await ws.prepare(request)
    except ConnectionError:
        return web.Response()
    except ValueError as error:  # aiohttp expects headers to be ASCII
        raise web.HTTPBadRequest(text="this is no handshake of a websocket") from error
    await Visit(service, request, ws).run()
    return ws


class Visit:
    """One client, from its handshake to its end."""

    def __init__(self, service: Service, request: web.Request, ws: web.WebSocketResponse) -> None:
        self._service, self._limits = service, service.limits
        self._request, self._ws = request, ws
        self._number = next(service.numbers)
        self._conversation: Conversation | None = None
        self._saving: Saving | None = None
        self._mouth = Mouth(ws, service.metrics, readings=False)
        self._ended: asyncio.Future[Over] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Begin, talk and end."""
        began = time.monotonic()
        over = Over("broken", "something went wrong in the server; its log says what", FAILED)
        self._service.guests.add(self)
        try:
            wishes = Wishes.of(self._request.query)
            conversation, saving = await self._begin(wishes)
            await self._talk(conversation, saving, wishes)
        except Over as reason:
            over = reason
        finally:
            try:
                await self._leave(over)
            finally:
                self._service.guests.discard(self)
                self._account(over, (time.monotonic() - began) / 60)

    def end(self, over: Over) -> None:
        """End it, soon."""
        if not self._ended.done():
            self._ended.set_result(over)

    # -- beginning -------------------------------------------------------------------------------

    async def _begin(self, wishes: Wishes) -> tuple[Conversation, Saving]:
        service, host = self._service, self._service.host
        mouth = self._mouth = Mouth(self._ws, service.metrics, readings=wishes.readings)
        if service.stopping:
            raise stops()
        if host.failed is not None:
            raise _failed()
        if host.taken >= host.capacity:
            raise self._full()
        if not service.arrivals.take():
            raise Over("arrivals", "too many conversations begin at once; try again soon", FULL)
        saved, saving = None, Saving(service, wishes.incognito, mouth.tell)
        self._saving = saving
        if wishes.user is not None:
            saved = await saving.begin(wishes.user, load=wishes.kept)
        try:
            conversation = self._conversation = await asyncio.to_thread(
                host.open, memory=saved, notify=mouth.notify
            )
        except Full:
            raise self._full() from None
        except UserError as error:
            sentence = str(error) if service.kept is None else for_clients(error, service.kept)
            raise Over("memory", sentence, RULE) from error
        service.metrics.begun.inc()
        _LOG.info(
            "conversation=%d event=start format=%s rate=%d start=%s keeps=%s",
            self._number, wishes.format, wishes.rate, "new" if saved is None else "kept",
            "yes" if saving.saves else "no",
        )  # fmt: skip
        await mouth.send(message(protocol.HANDSHAKE))
        mouth.tell(self._hello(wishes, saved, saving.name))
        return conversation, saving

    def _hello(self, wishes: Wishes, saved: SavedMemory | None, name: str | None) -> dict[str, Any]:
        return {
            "type": "hello",
            "model": self._service.model,
            "layers": list(self._service.layers),
            "user": name,
            "start": "new" if saved is None else "kept",
            "seconds": 0.0 if saved is None else saved.frames * FRAME_MS / 1000,
            "incognito": wishes.incognito,
            "frame_ms": FRAME_MS,
        }

    def _full(self) -> Over:
        many = self._service.host.capacity
        return Over("full", f"all {many} conversations are taken; try again when one ends", FULL)

    # -- going on --------------------------------------------------------------------------------

    async def _talk(self, conversation: Conversation, saving: Saving, wishes: Wishes) -> None:
        """Until it is over, which is raised."""
        mouth, sound = self._mouth, sound_of(wishes.format, wishes.rate)
        ears = Ears(conversation, sound, wishes, self._limits, saving.ask, mouth.pinged)
        mouth.answered_at = time.monotonic()
        tasks = [
            asyncio.ensure_future(task)
            for task in (
                self._hear(ears), self._say(conversation, sound), self._watch(ears),
                saving.run(conversation),
            )
        ]  # fmt: skip
        try:
            await asyncio.wait([self._ended, *tasks], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        if self._ended.done():
            raise self._ended.result()
        raise next(e for e in ends if e is not None and not isinstance(e, asyncio.CancelledError))

    async def _hear(self, ears: Ears) -> None:
        while True:
            data = self._data(await self._ws.receive())
            self._service.metrics.received.inc(len(data))
            await ears.hear(data)

    def _data(self, received: WSMessage) -> bytes:
        """What is in a message; nothing, if it is none of the protocol's.

        Raises:
            Over: it is the last.
        """
        kind = received.type
        if kind is WSMsgType.BINARY:
            return received.data
        if kind is WSMsgType.PING:
            self._mouth.asked(received.data)
        elif kind is WSMsgType.PONG:
            self._mouth.answered_at = time.monotonic()
        elif kind is WSMsgType.ERROR:
            if isinstance(received.data, WebSocketError):
                raise Over("websocket", code=received.data.code)  # aiohttp has closed it with that
            raise Over("left")
        elif kind is not WSMsgType.TEXT:
            raise Over("left")
        return b""

    async def _say(self, conversation: Conversation, sound: Sound) -> None:
        await self._mouth.run(conversation, sound, lambda: self._service.stats(conversation))
        raise stops() if self._service.stopping else _failed()

    async def _watch(self, ears: Ears) -> None:
        limits = self._limits
        while True:
            await asyncio.sleep(min(1.0, limits.idle / 4, limits.slow / 4))
            now = time.monotonic()
            if now - ears.heard_at > limits.idle:
                raise Over("idle", f"no sound came for {limits.idle:.0f} seconds")
            if now - self._mouth.answered_at > limits.slow:
                raise Over("slow")
            self._mouth.tick()

    # -- ending ----------------------------------------------------------------------------------

    async def _leave(self, over: Over) -> None:
        """Free the row, save, and say why it is over."""
        conversation, saving = self._conversation, self._saving
        try:
            if conversation is not None and saving is not None:
                await saving.last(conversation)
        finally:
            if conversation is not None:
                conversation.close()
            if over.why == "slow":  # it reads nothing: no more need be said
                self._abort()
            if saving is not None:
                await saving.end()
        try:
            await asyncio.wait_for(self._mouth.say_goodbye(over), 2 * self._limits.close)
        except (asyncio.TimeoutError, Over):
            self._abort()

    def _abort(self) -> None:
        if self._request.transport is not None:
            self._request.transport.abort()

    def _account(self, over: Over, minutes: float) -> None:
        conversation, metrics = self._conversation, self._service.metrics
        if conversation is None:
            metrics.refuse(over.why)
            return
        metrics.ended.labels(over.why).inc()
        _LOG.info(
            "conversation=%d event=end minutes=%.1f frames=%d dropped_heard=%d dropped_said=%d "
            "why=%s",
            self._number, minutes, conversation.frames, conversation.dropped_heard,
            conversation.dropped_said, over.why,
        )  # fmt: skip


def _failed() -> Over:
    return Over("engine", "the model has failed: the server's log says why", FAILED)
