"""How much a client may ask for; one that does not read; and a stranger's harm stays his own."""

import asyncio
import socket
import struct
from contextlib import AsyncExitStack

import numpy as np
import pytest
import sphn

from moshi_ttt.web import limits as limits_module
from moshi_ttt.web.hear import Ears
from moshi_ttt.web.limits import Bucket, Limits
from moshi_ttt.web.protocol import Over, Wishes
from moshi_ttt.web.sound import Framer, OpusSound, PcmSound, SoundError, sound_of
from tests.web.served import alone, noise, on_loop, served, talking, until


def test_a_bucket_fills_again():
    now = [0.0]
    bucket = Bucket(2.0, 10.0, lambda: now[0])
    assert bucket.full
    assert all(bucket.take() for _ in range(10))
    assert not bucket.take()
    now[0] = 0.5
    assert bucket.take()
    assert not bucket.take(0.1)
    assert not bucket.full
    now[0] = 100.0
    assert bucket.full
    assert bucket.take(10.0)
    assert not bucket.take()


class Heard:
    """What stands for a conversation here: only what the ears do with one."""

    def __init__(self):
        self.paused, self.frames, self.restarts, self.kept, self.pings = False, [], 0, [], 0

    def hear(self, frame):
        self.frames.append(frame.copy())

    def restart(self):
        self.restarts += 1

    def keep(self, user):
        self.kept.append(user)

    def pinged(self):
        self.pings += 1


def ears_for(**query):
    heard, wishes = Heard(), Wishes.of({"format": "pcm"} | query)
    ears = Ears(
        heard, sound_of(wishes.format, wishes.rate), wishes, Limits(), heard.keep, heard.pinged
    )
    return heard, ears


def test_what_is_too_much_ends_it():
    async def hear(ears, *messages):
        for message in messages:
            await ears.hear(message)

    second = b"\1" + bytes(2 * 24_000)
    heard, ears = ears_for()
    asyncio.run(hear(ears, *[second] * 29))
    assert len(heard.frames) == 29 * 12.5 // 1
    with pytest.raises(Over, match="rate"):
        asyncio.run(hear(ears, *[second] * 29))
    for message in (b"", b"\6", b"\x63", b"\2hello", b"\4{}", b"\3"):
        _, ears = ears_for()
        with pytest.raises(Over, match="rate"):
            asyncio.run(hear(ears, *[message] * 3000))
    heard, ears = ears_for()
    with pytest.raises(Over, match="rate"):
        asyncio.run(hear(ears, *[b"\3\3"] * 9))
    assert heard.restarts == 3
    _, ears = ears_for(format="opus")
    endless = ogg_page([255] * 255, bytes(255 * 255), flags=1)  # a packet that has no last page
    with pytest.raises(Over, match="rate"):
        asyncio.run(hear(ears, *[b"\1" + endless] * 50))


def test_minutes_of_silence_in_a_few_bytes_are_too_much():
    """Opus has packets of one byte, 20 ms each: a message of them is ten minutes."""
    page = ogg_pages()[0]
    head = page[: page.rindex(b"OggS")]
    for packets in (200, 20):  # sphn's reader gives up by itself where a page has too many
        heard, ears = ears_for(format="opus")
        bomb = ogg_page([1] * packets, b"\x08" * packets)
        with pytest.raises(Over, match=r"rate|sound"):
            asyncio.run(ears.hear((b"\1" + head + bomb * 2000)[: 1 << 16]))
        assert len(heard.frames) <= 30 * 12.5


def ogg_page(lacing, body, flags=0):
    """No checksum: sphn's reader does not look at it."""
    head = struct.pack("<4sBBqIII", b"OggS", 0, flags, 0, 42, 2, 0)
    return head + bytes([len(lacing), *lacing]) + body


def ogg_pages(frames=4, seed=0):
    writer, rng = sphn.OpusStreamWriter(24_000), np.random.default_rng(seed)
    pcm = (0.1 * rng.standard_normal((frames, 1920))).astype(np.float32)
    return [writer.append_pcm(frame) for frame in pcm]


def test_sound_in_any_pieces_is_the_same_sound():
    whole = b"".join(ogg_pages(6))
    wanted = np.concatenate(list(OpusSound().heard(whole)))
    assert len(wanted) == 6 * 1920
    for size in (1, 7, 500):
        sound = OpusSound()
        pieces = [
            p for at in range(0, len(whole), size) for p in sound.heard(whole[at : at + size])
        ]
        assert np.array_equal(np.concatenate(pieces), wanted)
    framer, frames = Framer(), []
    for at in range(0, len(wanted), 333):
        frames += [f.copy() for f in framer.cut(wanted[at : at + 333])]
    assert np.array_equal(np.concatenate(frames), wanted)
    list(framer.cut(wanted[:100]))
    framer.drop()
    assert np.array_equal(next(framer.cut(wanted)), wanted[:1920])


def test_broken_sound_is_said_to_be():
    with pytest.raises(SoundError, match="Ogg/Opus"):
        list(OpusSound().heard(b"RIFF" * 20))
    with pytest.raises(SoundError, match="2 bytes each: a message of 3"):
        list(PcmSound(24_000).heard(b"abc"))
    loud = np.array([2.0, -2.0, 1.0, np.float32(0.5)], np.float32)
    assert list(np.frombuffer(PcmSound(24_000).said(loud), "<i2")) == [32767, -32767, 32767, 16384]


@on_loop
async def test_what_is_broken_ends_the_conversation_and_no_other():
    json, frames = "a message of metadata was not a JSON object", noise(7)
    broken = [
        (b"\1" + b"RIFF" * 8, "the sound is not Ogg/Opus, or is broken", 1008),
        (b"\4{", json, 1008),
        (b"\4[]", json, 1008),
        (b"\4" + b"[" * 60_000, json, 1008),
        (b"\4" + b"9" * 60_000, json, 1008),
        (b"\4\xff\xfe", json, 1008),
        (b"\1" + bytes(1 << 16), "", 1009),
    ]
    wanted, _ = alone(frames)
    async with served(rows=2) as server, talking(server) as good:
        for (message, sentence, code), frame, voice in zip(broken, frames, wanted, strict=True):
            async with talking(server, format="opus") as bad:
                await bad.ws.send_bytes(message)
                await bad.read_to_end()
                assert (bad.over, bad.code) == (sentence, code)
            assert np.array_equal((await good.talk([frame]))[0], voice)


@on_loop
async def test_what_is_not_known_is_passed_over():
    frames = noise(4)
    async with served(rows=1) as server, talking(server) as client:
        for message in (
            b"",
            b"\x63",
            b"\0",
            b"\2hello",
            b"\5oh",
            b"\3",
            b"\3\1",
            b"\3\x63",
            b"\4{}",
        ):
            await client.ws.send_bytes(message)
        await client.ws.send_str("text")
        said = await client.talk(frames)
    assert np.array_equal(said, alone(frames)[0])


class Silent:
    """A client that opens a conversation, sends what it is told to and reads nothing."""

    def __init__(self, server, query="", buffer=4096):
        host, port = server.url.removeprefix("http://").split(":")
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.connect((host, int(port)))
        self.socket.sendall(
            f"GET /api/chat?{query} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            "Connection: upgrade\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: {'A' * 22}==\r\n\r\n".encode()
        )

    def close(self):
        self.socket.close()

    def send(self, data):
        size = struct.pack("!BBH", 0x82, 0x80 | 126, len(data))
        self.socket.sendall(size + bytes(4) + data)  # masked with zeros


@on_loop
async def test_who_does_not_read_is_dropped_and_holds_up_nobody():
    """What it does not take is dropped as frames; nothing grows; then it is given up."""
    frames = noise(6)
    wanted, _ = alone(frames, rows=2)
    async with served(rows=2, limits=Limits(slow=4.0)) as server:
        async with talking(server) as good, AsyncExitStack() as stack:
            first = await good.talk(frames[:2])
            silent = await asyncio.to_thread(Silent, server, "format=pcm&rate=192000")
            stack.callback(silent.close)
            begun = lambda: {v._conversation: v for v in server.service.guests}  # noqa: E731
            await until(lambda: None not in begun() and len(begun()) == 2)
            (chat,) = [c for c in begun() if c.row == 1]
            transport = begun()[chat]._request.transport
            most = 0
            for n in range(200):
                if chat.over is not None or chat.dropped_said:
                    break
                await asyncio.to_thread(silent.send, b"\1" + bytes(2 * 192_00))
                await until(lambda n=n: chat.frames > n or chat.over is not None)
                await good.until_answered()  # who reads, and so answers the server's pings too
                most = max(most, transport.get_write_buffer_size())
            assert chat.dropped_said
            assert most < 100_000
            assert np.array_equal(await good.talk(frames[2:4]), wanted[2:4])
            while chat.over is None:
                await good.until_answered()
                await asyncio.sleep(0.05)
            assert server.host.taken == 1
            await until(lambda: len(server.service.guests) == 1)
            rest = await good.talk(frames[4:])
        assert np.array_equal(np.concatenate([first, rest]), wanted[[0, 1, 4, 5]])
        text = server.service.metrics.text().decode()
        assert 'moshi_ttt_conversations_ended_total{reason="slow"} 1.0' in text


@on_loop
async def test_a_flood_of_arrivals_is_slowed(monkeypatch):
    async with served(rows=2) as server:
        server.service.arrivals = limits_module.Bucket(0.001, 3.0)
        overs = []
        for _ in range(5):
            async with talking(server) as client:
                overs.append(client.over)
            await until(lambda: not server.service.guests)
        assert overs[:3] == [""] * 3
        assert overs[3:] == ["too many conversations begin at once; try again soon"] * 2
