"""A server around a small model, in this process, and a client that behaves."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

from moshi_ttt.engine import Engine, Sampling
from moshi_ttt.frames import FRAME
from moshi_ttt.host import Host
from moshi_ttt.monitor import keeps_state, watched_layers
from moshi_ttt.serve import listen
from moshi_ttt.web.app import serving
from moshi_ttt.web.limits import Limits
from moshi_ttt.web.service import Service
from tests.small import small_hybrid, small_mimi, small_tokenizer

CARD = small_tokenizer().vocab_size()


async def goodbyes():
    """Wait until every connection is closed: TLS does it long after its `close` has returned."""
    left = asyncio.get_running_loop()._transports  # weak: what the loop reads and writes
    await until(lambda: all(t._sock is None for t in list(left.values())))


def run(main):
    """`asyncio.run` that leaves no connection for another test to trip over."""

    async def to_the_end():
        value = await main
        await goodbyes()
        return value

    return asyncio.run(to_the_end())


def on_loop(test):
    """Let a test be a coroutine."""

    @functools.wraps(test)
    def runs(*args, **kwargs):
        run(test(*args, **kwargs))

    return runs


def hybrid(**config):
    return small_hybrid(lm={"text_card": CARD}, **config)


@functools.cache
def parts():
    """A closed engine leaves them as they were."""
    return hybrid(), small_mimi(), small_tokenizer()


def engine_for(rows=3, lm=None, **options):
    options = {"sampling": Sampling(greedy=True), "seed": 0} | options
    default, mimi, tokenizer = parts()
    lm = lm or default
    options.setdefault("watch_every", 4 if keeps_state(lm) else None)
    return Engine(lm, mimi, tokenizer, rows=rows, **options)


@dataclass
class Served:
    """A server that is running."""

    service: Service
    url: str

    @property
    def host(self):
        return self.service.host


@asynccontextmanager
async def served(rows=3, *, lm=None, kept=None, limits=None, token=None, origins=(), fails=False):
    """Serve while the body runs; afterwards nothing of it may be left."""
    before = asyncio.all_tasks()
    with engine_for(rows, lm) as engine, Host(engine) as host:
        layers = list(watched_layers(engine.lm)) if keeps_state(engine.lm) else []
        service = Service(
            host=host,
            model="a small one",
            layers=layers,
            kept=kept,
            limits=limits or Limits(),
            token=token,
            origins=origins,
        )
        (sock,) = listen("127.0.0.1", 0, token=token is not None)
        async with serving(service, [sock]):
            yield Served(service, f"http://127.0.0.1:{sock.getsockname()[1]}")
        assert not service.guests
        assert not service.leaving
        assert host.taken == 0
        assert fails == (host.failed is not None)
    await until(lambda: asyncio.all_tasks() == before)


async def until(condition, seconds=20.0):
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it never came"
        await asyncio.sleep(0.002)


def noise(frames, seed=0):
    """int16 as it is sent, `[frames, 1920]`."""
    rng = np.random.default_rng(seed)
    return (3000 * rng.standard_normal((frames, FRAME))).astype("<i2")


@dataclass
class Client:
    """Sends and collects; `over` is the sentence it was told, `code` that of the close."""

    ws: aiohttp.ClientWebSocketResponse
    sound: bytearray = field(default_factory=bytearray)
    text: str = ""
    news: list[dict[str, Any]] = field(default_factory=list)
    pings: int = 0
    over: str = ""
    code: int | None = None

    async def receive(self):
        """One message; False after the last."""
        message = await self.ws.receive(timeout=20)
        if message.type is not aiohttp.WSMsgType.BINARY:
            self.code = self.ws.close_code
            return False
        kind, payload = message.data[0], message.data[1:]
        if kind == 1:
            self.sound += payload
        elif kind == 2:
            self.text += payload.decode()
        elif kind == 4:
            self.news.append(json.loads(payload))
        elif kind == 5:
            self.over = payload.decode()
        elif kind == 6:
            self.pings += 1
        else:
            raise AssertionError(f"a message of kind {kind}")
        return True

    async def read_until(self, condition):
        while not condition(self):
            assert await self.receive(), f"it ended: {self.over}"

    async def read_to_end(self):
        while await self.receive():
            pass

    async def talk(self, frames):
        """Each frame after the answer to the one before; the voice as int16 `[frames, 1920]`."""
        start = len(self.sound)
        for n, frame in enumerate(frames, 1):
            await self.ws.send_bytes(b"\1" + frame.tobytes())
            await self.read_until(lambda c, n=n: len(c.sound) >= start + n * 2 * FRAME)
        return np.frombuffer(bytes(self.sound[start:]), "<i2").reshape(-1, FRAME)

    async def until_answered(self):
        """Read all that was sent until now."""
        await self.ws.send_bytes(b"\6")
        await self.read_until(lambda c, n=self.pings + 1: c.pings == n)

    async def keep(self, **more):
        await self.ws.send_bytes(b"\4" + json.dumps({"type": "keep", **more}).encode())

    def last(self, kind):
        """The last metadata of a type, or None."""
        return next((n for n in reversed(self.news) if n["type"] == kind), None)


@asynccontextmanager
async def talking(server: Served, *, headers=None, **query) -> AsyncIterator[Client]:
    """A conversation that has begun, in plain samples."""
    query = {"format": "pcm"} | {k: str(v) for k, v in query.items()}
    async with aiohttp.ClientSession() as session:
        url = f"{server.url}/api/chat"
        async with session.ws_connect(url, params=query, headers=headers) as ws:
            client = Client(ws)
            first = await ws.receive(timeout=20)
            if first.type is aiohttp.WSMsgType.BINARY and first.data[0] == 5:
                client.over = first.data[1:].decode()
                assert not await client.receive()
            else:
                assert first.data == b"\0", first
            yield client


def alone(frames, rows=3, lm=None):
    """What an engine says, with nobody else in it, as int16."""
    with engine_for(rows, lm) as engine:
        pcm, said, text = np.zeros((rows, FRAME), np.float32), [], ""
        for frame in frames:
            pcm[0] = frame.astype(np.float32) / 32768
            out = engine.step(pcm)
            said.append(out.pcm[0].numpy().copy())
            text += out.text[0]
    return np.round(np.clip(said, -1, 1) * 32767).astype("<i2"), text
