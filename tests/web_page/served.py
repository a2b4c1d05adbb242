"""The real server around a small real engine, for a browser to talk to."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from moshi_ttt.engine import Engine
from moshi_ttt.host import Host
from moshi_ttt.kept import Kept
from moshi_ttt.monitor import watched_layers
from moshi_ttt.web.app import serving
from moshi_ttt.web.limits import Limits
from moshi_ttt.web.service import Service
from tests.small import small_hybrid, small_lm, small_mimi, small_tokenizer


class Served:
    """A server that is running.

    Attributes:
        url: of its page.
        host: its conversations.
        kept: its memories.
        token: that it wants, or None.
    """

    def __init__(self, port: int, host: Host, kept: Kept, token: str | None) -> None:
        self.url, self._port = f"http://127.0.0.1:{port}/", port
        self.host, self.kept, self.token = host, kept, token

    def put_memory(self, name: str) -> Path:
        """Keep a memory for a name; its file."""
        conversation = self.host.open()
        saved = conversation.take_memory()
        conversation.close()
        with self.kept.taken(name):
            self.kept.write(name, saved.result(10))
        return self.kept.path(name)

    @asynccontextmanager
    async def behind_a_wire(self) -> AsyncIterator[Wire]:
        """The same server, by a connection that can be cut."""
        wire = Wire(self._port)
        server = await asyncio.start_server(wire.joined, "127.0.0.1", 0)
        wire.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        async with server:
            yield wire
            wire.cut()


class Wire:
    """Passes bytes on to a port of this machine, until it is cut.

    Attributes:
        url: of its own end.
    """

    def __init__(self, port: int) -> None:
        self.url, self._port = "", port
        self._ends: list[asyncio.StreamWriter] = []

    async def joined(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Someone has joined."""
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._ends += [writer, far_writer]
        await asyncio.gather(_pass(reader, far_writer), _pass(far_reader, writer))

    def cut(self) -> None:
        """Cut every connection that there is, without a word."""
        for end in self._ends:
            end.transport.abort()
        self._ends.clear()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        writer.transport.abort()
    else:
        writer.close()


@asynccontextmanager
async def served(
    folder: Path, *, rows: int = 2, memory: bool = True, token: str | None = None
) -> AsyncIterator[Served]:
    """A server on a port that was free, of a small model with a memory or without."""
    tokenizer = small_tokenizer()
    sizes: dict[str, Any] = {"text_card": tokenizer.vocab_size()}
    lm = small_hybrid(lm=sizes) if memory else small_lm(**sizes).eval()
    sock = socket.create_server(("127.0.0.1", 0))
    with (
        sock,
        Engine(
            lm, small_mimi(), tokenizer, rows=rows, seed=0, watch_every=12 if memory else None
        ) as engine,
        Host(engine) as h,
    ):
        service = Service(
            host=h,
            model="a small one",
            layers=list(watched_layers(lm)),
            kept=Kept(folder),
            limits=Limits(),
            token=token,
        )
        async with serving(service, [sock]):
            yield Served(sock.getsockname()[1], h, Kept(folder), token)
