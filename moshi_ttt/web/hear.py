"""What a client sends, message by message, and how much of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from moshi_ttt.audio import SAMPLE_RATE
from moshi_ttt.host import Conversation
from moshi_ttt.web import protocol
from moshi_ttt.web.limits import Bucket, Limits
from moshi_ttt.web.protocol import RULE, Over, Wishes
from moshi_ttt.web.sound import Framer, Sound, SoundError

_RESTARTS = (0.5, 3.0)  # a second, and at once
_LONG = 1024  # bytes of sound; Moshi's clients send a third of it


class Ears:
    """Hears one client for one conversation.

    Kinds of messages that are not known, or have no use here, are passed over as moshi's own server
    does; what is broken ends the conversation.

    Args:
        conversation: that hears.
        sound: of the client.
        wishes: of the client.
        limits: of the client.
        keep: called with a name, or what was given for one, when the client wants a save now.
        pinged: called when it wants an answer.

    Attributes:
        heard_at: when (`time.monotonic`) a frame was last heard; a paused conversation hears none.
    """

    def __init__(
        self,
        conversation: Conversation,
        sound: Sound,
        wishes: Wishes,
        limits: Limits,
        keep: Callable[[object], object],
        pinged: Callable[[], object],
    ) -> None:
        self._conversation, self._sound = conversation, sound
        self._keep, self._pinged = keep, pinged
        self._framer = Framer()
        self._messages = Bucket(limits.messages, limits.message_burst)
        second = 2 * wishes.rate  # bytes; no Opus has more than samples have
        self._bytes = Bucket(second * limits.faster, second * limits.burst)
        self._seconds = Bucket(limits.faster, limits.burst)
        self._restarts = Bucket(*_RESTARTS)
        self.heard_at = time.monotonic()

    async def hear(self, data: bytes) -> None:
        """Take one message.

        Raises:
            Over: it is broken, or too much.
        """
        if not (self._messages.take() and self._bytes.take(len(data))):
            raise Over("rate", "too many messages came in too short a time", RULE)
        if not data:
            return
        kind, payload = data[0], data[1:]
        if kind == protocol.SOUND:
            await self._hear_sound(payload)
        elif kind == protocol.CONTROL:
            await self._hear_control(payload)
        elif kind == protocol.METADATA:
            content = protocol.read_metadata(payload)
            if content.get("type") == "keep":
                self._keep(content.get("user"))
        elif kind == protocol.PING:
            self._pinged()

    async def _hear_sound(self, payload: bytes) -> None:
        try:
            for pcm in self._sound.heard(payload):
                if not self._seconds.take(len(pcm) / SAMPLE_RATE):
                    raise Over("rate", "sound came faster than it can be heard", RULE)
                for frame in self._framer.cut(pcm):
                    if not self._conversation.paused:
                        self._conversation.hear(frame)
                        self.heard_at = time.monotonic()
                if len(payload) > _LONG:
                    await asyncio.sleep(0)  # others have something to say
        except SoundError as error:
            raise Over("sound", str(error), RULE) from error

    async def _hear_control(self, payload: bytes) -> None:
        what = payload[0] if payload else None
        if what in (protocol.START, protocol.PAUSE):
            self._conversation.paused = what == protocol.PAUSE
            self._framer.drop()
        elif what == protocol.RESTART:
            if not self._restarts.take():
                raise Over("rate", "it was started anew too often", RULE)
            self._framer.drop()
            self._conversation.restart()
