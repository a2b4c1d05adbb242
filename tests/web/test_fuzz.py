"""10 000 random and mutated messages, and disconnects at every stage, beside a conversation that
does not notice; the process lives, and nothing is left behind."""

import asyncio
import contextlib
import gc
import json
import logging
import socket
import struct

import numpy as np
import pytest

from moshi_ttt.kept import Kept
from moshi_ttt.web.hear import Ears
from moshi_ttt.web.limits import Bucket, Limits
from tests.web.served import alone, noise, run, served, talking, until
from tests.web.test_limits import ogg_page, ogg_pages

ROWS, ATTACKERS = 4, 5
QUERIES = [
    *[""] * 6, *["format=pcm"] * 3, "readings=1", "format=opus&readings=1", "format=pcm&rate=8000",
    "format=pcm&rate=48000&readings=1", "format=xxx", "rate=0", "user=anna", "user=bert&start=new",
    "user=anna&incognito=1&readings=1", "user=..%2F..%2Fetc%2Fpasswd", "user=%00%ff",
    "user=" + "%F0%9F%98%80" * 40, "start=%0d%0a", "text_temperature=0.7", "&&==;%zz",
]  # fmt: skip
NAMES = ["anna", "bert", "", "../x", "a" * 500, None, 7, ["x"], {"a": 1}, "\0", "é", "\ud800"]


class Fuzzer:
    """Makes messages; all randomness is that of one seed."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.pages = ogg_pages(12, seed)

    def chance(self, share):
        return self.rng.random() < share

    def bytes(self, most):
        return self.rng.bytes(int(self.rng.integers(0, most + 1)))

    def pick(self, choices):
        return choices[int(self.rng.integers(len(choices)))]

    def mutated(self, data):
        data = bytearray(data)
        for _ in range(int(self.rng.integers(1, 6))):
            at = int(self.rng.integers(0, max(1, len(data))))
            what = int(self.rng.integers(5))
            if what == 0:
                data[at : at + 1] = self.rng.bytes(1)
            elif what == 1:
                del data[at : at + int(self.rng.integers(1, 50))]
            elif what == 2:
                data[at:at] = self.bytes(50)
            elif what == 3:
                data[at:at] = data[at : at + 100]
            else:
                del data[at:]
        return bytes(data)

    def harmless(self):
        """What a conversation survives."""
        kind = int(self.rng.integers(9))
        if kind == 0:
            return frame(b"")
        if kind == 1:
            return frame(bytes([int(self.rng.integers(7, 256))]) + self.bytes(200))
        if kind == 2:
            return frame(self.pick([b"hello", "grüße".encode(), b""]), opcode=1)
        if kind == 3:
            return frame(b"\6" + self.bytes(20))
        if kind == 4:
            return frame(self.bytes(125), opcode=self.pick([9, 10]))
        if kind == 5:
            return frame(b"\3" + self.bytes(1).replace(b"\3", b"\2") + b"\0")
        if kind == 6:
            keep = {"type": self.pick(["keep", "x", None]), "user": self.pick(NAMES)}
            return frame(b"\4" + json.dumps(keep).encode())
        if kind == 7:
            return frame(bytes([self.pick([0, 2, 5])]) + self.bytes(300))
        whole = b"\6" + self.bytes(300)
        cut = int(self.rng.integers(0, len(whole)))
        ping = frame(b"in between", opcode=9) if self.chance(0.5) else b""
        return frame(whole[:cut], fin=False) + ping + frame(whole[cut:], opcode=0)

    def sound(self, sent):
        """The next page of a stream of Opus, which plain samples can be taken for, too."""
        page = self.pages[sent % len(self.pages)]
        return frame(b"\1" + page + b"\0" * (len(page) % 2))

    def harmful(self):
        """What may end a conversation, and should end no more."""
        kind = int(self.rng.integers(15))
        page = self.pick(self.pages)
        first = self.pages[0]
        if kind < 4:
            return frame(b"\1" + self.mutated(page))
        if kind == 4:
            return frame(b"\1" + self.bytes(2000))
        if kind == 5:
            return frame(b"\4" + self.mutated(b'{"type": "keep", "user": "anna"}'))
        if kind == 6:
            return frame(b"\4" + self.pick([b"[" * 50_000, b"1" * 50_000, b'"', b"\xff", b"null"]))
        if kind == 7:  # two headers, another version, stereo, other rates and gains
            head = bytearray(first[28:47])
            head[int(self.rng.integers(8, len(head)))] = int(self.rng.integers(256))
            return frame(b"\1" + first[:28] + bytes(head) + first[47:] + first)
        if kind == 8:
            lacing = list(self.rng.bytes(int(self.rng.integers(0, 256))))
            return frame(b"\1" + ogg_page(lacing, self.bytes(sum(lacing)), self.pick([0, 1, 2, 4])))
        if kind == 9:
            return frame(b"\1" + ogg_page([255] * 255, self.bytes(60_000), 1))
        if kind == 10:
            return frame(b"\1" + bytes(1 << 16) + self.bytes(1 << 16))
        if kind == 11:
            return self.rng.bytes(2) + self.bytes(60)
        if kind == 12:
            return frame(self.bytes(200), opcode=int(self.rng.integers(16)), rsv=self.pick([0, 4]))
        if kind == 13:
            return frame(self.bytes(300), masked=self.chance(0.5), length=self.pick([0, 5, 2**63]))
        return frame(self.pick([b"\xff\xfe", b"\xc3"]), opcode=1)

    def handshake(self):
        head = (
            f"GET /api/chat?{self.pick(QUERIES)} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket"
            f"\r\nConnection: upgrade\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: {'A' * 22}==\r\n"
        ).encode()
        if self.chance(0.3):
            head += b"Sec-WebSocket-Extensions: permessage-deflate\r\n"
        return head + b"\r\n"


def frame(payload, *, opcode=2, fin=True, rsv=0, masked=True, length=None):
    """A websocket frame as a client sends it, or as none should."""
    size = len(payload) if length is None else length
    head = bytes([fin << 7 | rsv << 4 | opcode])
    if size < 126:
        head += bytes([masked << 7 | size])
    elif size < 1 << 16:
        head += struct.pack("!BH", masked << 7 | 126, size)
    else:
        head += struct.pack("!BQ", masked << 7 | 127, size)
    return head + (bytes(4) if masked else b"") + payload  # a mask of zeros changes nothing


async def attack(fuzzer, port, enough):
    """One connection after another."""
    reading = []  # a stream's reader is nobody's but its task's, which is nobody's but ours
    while not enough():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            await one_connection(fuzzer, reader, writer, reading)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # it was shown the door
        finally:
            await leave(fuzzer, writer)
    await asyncio.gather(*reading)


async def one_connection(fuzzer, reader, writer, reading):
    handshake = fuzzer.handshake()
    stage = fuzzer.rng.random()
    if stage < 0.03:
        return  # before a word was said
    if stage < 0.08:
        writer.write(handshake[: int(fuzzer.rng.integers(len(handshake)))])
        return
    if stage < 0.11:
        writer.write(fuzzer.mutated(handshake))
        return
    writer.write(handshake)
    if stage < 0.16:
        return  # before the answer
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101")
    if stage < 0.2:
        return  # before the row
    await reader.readexactly(3)  # the handshake, or that it is full
    gone = asyncio.ensure_future(swallow(reader))
    reading.append(gone)
    for n in range(int(fuzzer.rng.integers(1, 100))):
        if gone.done() or writer.transport.is_closing():
            return
        if fuzzer.chance(0.02):
            data = fuzzer.harmful()
        else:
            data = fuzzer.sound(n) if fuzzer.chance(0.3) else fuzzer.harmless()
        if fuzzer.chance(0.01):
            writer.write(data[: len(data) // 2])
            return  # in the middle of a frame
        writer.write(data)
        if fuzzer.chance(0.3):
            await writer.drain()
            await asyncio.sleep(0)


async def swallow(reader):
    """Read what comes, until the end."""
    try:
        while await reader.read(1 << 16):
            pass
    except ConnectionError:
        return


async def leave(fuzzer, writer):
    how = int(fuzzer.rng.integers(5))
    if writer.transport.is_closing():
        return
    if how == 0:
        writer.transport.abort()
        return
    if how == 1:  # a reset, not a goodbye
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    elif how == 2:
        writer.write(frame(struct.pack("!H", 1000), opcode=8))
        await asyncio.sleep(0.01)  # and gone, while the server still says goodbye
    elif how == 3:
        with contextlib.suppress(OSError):
            writer.write_eof()
    writer.close()


@pytest.mark.parametrize(
    ("messages", "seed"), [(10_000, 0), pytest.param(100_000, 1, marks=pytest.mark.slow)]
)
def test_nothing_that_is_sent_ends_the_process_or_touches_another(
    messages, seed, tmp_path, caplog, monkeypatch
):
    caplog.set_level(logging.INFO)
    heard, hear = [0], Ears.hear

    async def counted(self, data):
        heard[0] += 1
        await hear(self, data)

    monkeypatch.setattr(Ears, "hear", counted)
    frames = noise(messages // 400)
    wanted, _ = alone(frames, rows=ROWS)
    session = attacked(lambda: heard[0] >= messages, seed, frames, Kept(tmp_path / "kept"))
    said, ended, refused = run(session)
    assert np.array_equal(said, wanted)
    assert heard[0] >= messages
    problems = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert not problems, logging.Formatter().format(problems[0])
    assert all(r.name == "moshi_ttt.web" for r in caplog.records)
    assert {"left", "sound", "metadata", "websocket"} <= ended, ended
    assert {"full", "name", "query"} <= refused, refused


async def attacked(enough, seed, frames, kept):
    limits = Limits(save=0.2, keep=0.05, close=0.5, patience=2.0)
    async with served(ROWS, kept=kept, limits=limits) as server:
        server.service.arrivals = Bucket(1e9, 1e9)
        port = int(server.url.rpartition(":")[2])
        async with talking(server) as good:
            fuzzers = [Fuzzer([seed, n]) for n in range(ATTACKERS)]
            attacks = [asyncio.ensure_future(attack(f, port, enough)) for f in fuzzers]
            said = []
            while len(said) < len(frames):
                said.append(await good.talk(frames[len(said)][None]))
            while not all(a.done() for a in attacks):
                await asyncio.wait(attacks, timeout=0.2)
                await good.ws.send_bytes(b"\1" + noise(1).tobytes())
                await good.until_answered()
            await asyncio.gather(*attacks)
            await until(lambda: len(server.service.guests) == 1, 60)
            assert server.host.taken == 1
            async with talking(server, user="anna") as later:  # the names are free again
                assert not later.over
                await later.talk(noise(2))
        await until(lambda: not server.service.guests, 60)
        for name in ("anna", "bert"):
            with kept.taken(name):
                pass
        metrics = server.service.metrics
        ended = {s.labels["reason"] for s in samples(metrics.ended)}
        refused = {s.labels["reason"] for s in samples(metrics.refused)}
        gc.collect()  # a task whose error nobody asked for says so now
    gc.collect()
    return np.concatenate(said), ended, refused


def samples(counter):
    return [s for family in counter.collect() for s in family.samples if s.name.endswith("_total")]
