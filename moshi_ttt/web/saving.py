"""A conversation's memory: loaded as it begins, saved every minute, when asked and at the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from moshi_ttt.errors import UserError
from moshi_ttt.host import Conversation
from moshi_ttt.kept import check_name
from moshi_ttt.saved_memory import SavedMemory
from moshi_ttt.web.protocol import RULE, Over
from moshi_ttt.web.remember import Remembered, for_clients
from moshi_ttt.web.service import Service

_LEAVING_SECONDS = 10.0  # for one's own conversation before this one to be saved


class Saving:
    """Of one conversation; without a name, nothing is saved.

    Args:
        service: whose memories.
        incognito: nothing is written.
        tell: told of every save, failed ones too, as a client is.
    """

    def __init__(
        self, service: Service, incognito: bool, tell: Callable[[dict[str, Any]], object]
    ) -> None:
        self._service, self._incognito, self._tell = service, incognito, tell
        self._loop = asyncio.get_running_loop()
        self._wake, self._asked = asyncio.Event(), False
        self._name_asked: object = None
        self._remembered: Remembered | None = None
        self._beginning: asyncio.Future[SavedMemory | None] | None = None

    @property
    def name(self) -> str | None:
        """Whose memory it is."""
        return None if self._remembered is None else self._remembered.name

    @property
    def saves(self) -> bool:
        """Whether anything will be written."""
        return self._remembered is not None and self._remembered.writes

    async def begin(self, user: str, *, load: bool, anew: bool = False) -> SavedMemory | None:
        """Have a name, and what is kept for it.

        Args:
            user: the name.
            load: read what is kept; None comes back if nothing is.
            anew: nothing may be kept yet: what is would be written over.

        Raises:
            Over: why not.
        """
        service, kept = self._service, self._service.kept
        if kept is None or not service.keeps:
            what = "keeps nothing" if service.layers else "talks with a model that has no memory"
            raise Over("name", f"this server {what}: leave out the name", RULE)
        try:
            name = check_name(user)
            until = time.monotonic() + _LEAVING_SECONDS
            while name in service.leaving and time.monotonic() < until:
                await asyncio.sleep(0.05)
            remembered = Remembered(kept, name, writes=not self._incognito, notify=self._notify)
            most = service.limits.memories
            work = asyncio.to_thread(remembered.begin, load=load, most=most, anew=anew)
            beginning = self._beginning = asyncio.ensure_future(work)
            beginning.add_done_callback(lambda done: self._begun(remembered, done))
            return await asyncio.shield(beginning)  # the thread is not cancelled with us
        except UserError as error:
            raise Over("name", for_clients(error, kept), RULE) from error

    def _begun(self, remembered: Remembered, done: asyncio.Future[SavedMemory | None]) -> None:
        if not done.cancelled() and done.exception() is None:
            self._remembered = remembered

    def ask(self, user: object) -> None:
        """The client wants a save now, under a name if it gives one and has none yet."""
        self._asked, self._name_asked = True, user
        self._wake.set()

    async def run(self, conversation: Conversation) -> None:
        """Save in time, and when asked; for ever."""
        limits = self._service.limits
        while True:
            # wait_for would do, but for Python 3.11's, which may swallow a cancel that comes late.
            minute = self._loop.call_later(limits.save, self._wake.set)
            try:
                await self._wake.wait()
            finally:
                minute.cancel()
            self._wake.clear()
            asked, self._asked = self._asked, False
            if asked and not self.saves:
                await self._take_name()
            if asked and self.saves and not conversation.frames:
                self._failed("nothing was heard yet")
            await self._offer(conversation)
            await asyncio.sleep(limits.keep)

    async def last(self, conversation: Conversation) -> None:
        """Take the memory of a conversation that ends, if it is to be saved."""
        if self._remembered is not None and self.saves:
            self._service.leaving.add(self._remembered.name)
            if conversation.over is None:
                await self._offer(conversation)

    async def end(self) -> None:
        """Wait until all is on the disk, and let go of the name."""
        if self._beginning is not None:
            await asyncio.wait([self._beginning])
        if self._remembered is not None:
            try:
                await asyncio.to_thread(self._remembered.end)
            finally:
                if self.saves:
                    self._service.leaving.discard(self._remembered.name)

    async def _offer(self, conversation: Conversation) -> None:
        """A conversation in which nothing was heard has nothing to save."""
        if self._remembered is not None and self.saves and conversation.frames:
            # The engine's thread fulfils the future: no cancelling of ours may reach it.
            try:
                taken = await asyncio.shield(asyncio.wrap_future(conversation.take_memory()))
            except UserError as error:  # the engine has failed
                self._failed(str(error))
                return
            self._remembered.offer(taken, diverged=bool(conversation.diverged))

    async def _take_name(self) -> None:
        name, self._name_asked = self._name_asked, None
        if self._incognito:
            self._failed("this conversation is incognito: nothing of it is kept")
        elif not isinstance(name, str):
            self._failed("a name is needed to keep a memory")
        else:
            try:
                await self.begin(name, load=False, anew=True)
            except Over as refused:
                self._failed(refused.sentence)

    def _failed(self, reason: str) -> None:
        self._service.metrics.failed_saves.inc()
        self._tell({"type": "save failed", "reason": reason})

    def _notify(self) -> None:
        """Called from the keeper's thread."""
        self._loop.call_soon_threadsafe(self._saved)

    def _saved(self) -> None:
        assert self._remembered is not None
        news = self._remembered.news()
        if news["type"] == "saved":
            self._service.metrics.saves.inc()
        else:
            self._service.metrics.failed_saves.inc()
        self._tell(news)
