"""Conversations over the websocket: what is said is what the engine says, and how they end."""

import asyncio
import json
import logging
import math

import aiohttp
import numpy as np
import pytest

from moshi_ttt.frames import FRAME
from moshi_ttt.web.limits import Limits
from tests.small import small_lm
from tests.web.served import CARD, alone, noise, on_loop, served, talking, until


@on_loop
async def test_what_is_said_is_what_the_engine_says():
    frames = noise(20)
    wanted, text = alone(frames)
    async with served() as server, talking(server) as client:
        said = await client.talk(frames)
        assert server.host.taken == 1
        await client.talk(noise(1))  # a piece of text may come with the frame after its own
        await client.until_answered()
    assert np.array_equal(said, wanted)
    assert client.text.startswith(text)
    assert len(text) > 3
    assert not client.news  # none were wanted


@on_loop
async def test_several_at_once_are_each_as_if_alone():
    sounds = [noise(12, seed) for seed in range(3)]
    async with served() as server:

        async def one(frames):
            async with talking(server) as client:
                return await client.talk(frames)

        said = await asyncio.gather(*map(one, sounds))
    for frames, voice in zip(sounds, said, strict=True):
        assert np.array_equal(voice, alone(frames)[0])


@on_loop
async def test_when_full_a_sentence_and_a_row_is_free_as_soon_as_one_leaves():
    wanted, _ = alone(noise(3))
    async with served(rows=2) as server:
        async with talking(server), talking(server) as second:
            async with talking(server) as third:
                assert third.over == "all 2 conversations are taken; try again when one ends"
                assert third.code == 1013
            await second.ws.close()
            await until(lambda: server.host.taken == 1)
            async with talking(server) as fourth:
                assert not fourth.over
                assert np.array_equal(await fourth.talk(noise(3)), wanted)


@on_loop
async def test_pause_and_restart():
    frames = noise(12)
    wanted, _ = alone(frames)
    async with served() as server, talking(server) as client:
        first = await client.talk(frames[:5])
        await client.ws.send_bytes(b"\3\2")
        for frame in noise(6, seed=9):  # nobody hears these
            await client.ws.send_bytes(b"\1" + frame.tobytes())
        await client.ws.send_bytes(b"\3\0")
        rest = await client.talk(frames[5:])
        await client.ws.send_bytes(b"\3\3")
        again = await client.talk(frames[:5])
    assert np.array_equal(np.concatenate([first, rest]), wanted)
    assert np.array_equal(again, wanted[:5])


@on_loop
async def test_readings_say_how_it_is_doing():
    async with served() as server, talking(server, readings=1) as client:
        await client.read_until(lambda c: c.news)
        hello = client.news[0]
        assert hello == {
            "type": "hello", "model": "a small one", "user": None, "start": "new", "seconds": 0.0,
            "layers": ["transformer.layers.0", "transformer.layers.1"], "incognito": False,
            "frame_ms": 80.0,
        }  # fmt: skip
        await client.read_until(lambda c: c.last("stats"))
        assert "layers" not in client.last("stats")
        await client.talk(noise(12))
        await client.read_until(
            lambda c: c.last("stats")["frames"] == 12 and "layers" in c.last("stats")
        )
        stats = client.last("stats")
    assert stats["frames"] == 12
    assert (stats["sessions"], stats["rows"]) == (1, 3)
    assert stats["dropped"] == {"heard": 0, "said": 0}
    assert set(stats["ms"]) == {"last", "p50", "p95", "mean"}
    assert all(ms > 0 for ms in stats["ms"].values())
    assert list(stats["layers"]) == hello["layers"]
    for layer in stats["layers"].values():
        assert set(layer) == {
            "update", "loss_before", "loss_after", "moved", "state", "gate_abs"
        }  # fmt: skip
        assert all(isinstance(v, float) and math.isfinite(v) for v in layer.values())


@on_loop
async def test_a_model_without_a_memory_is_talked_to():
    async with served(lm=small_lm(text_card=CARD).eval()) as server:
        async with talking(server, readings=1) as client:
            await client.talk(noise(3))
            assert client.news[0]["layers"] == []
        async with talking(server, user="anna") as client:
            assert "a model that has no memory" in client.over
            assert client.code == 1008


@on_loop
async def test_a_ping_is_answered_both_ways():
    async with served() as server, talking(server) as client:
        await client.ws.send_bytes(b"\6")
        await client.read_until(lambda c: c.pings == 1)
        client.ws._autoping = False
        await client.ws.ping(b"hello")
        while (message := await client.ws.receive(timeout=5)).type is not aiohttp.WSMsgType.PONG:
            assert message.type is aiohttp.WSMsgType.PING
        assert message.data == b"hello"


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ({"format": "mp3"}, "format must be opus or pcm"),
        ({"rate": "7999"}, "rate must be 8000 to 192000 Hz"),
        ({"rate": "-1"}, "rate must be a whole number of Hz"),
        ({"rate": "9" * 5000}, "rate must be a whole number of Hz"),
        ({"rate": "٤٨٠٠٠"}, "rate must be a whole number of Hz"),
        ({"format": "opus", "rate": "48000"}, "rate goes with format=pcm; opus is 24000 Hz"),
        ({"start": "old"}, "start must be kept or new"),
        ({"readings": "2"}, "readings must be nothing or 0 or 1"),
        ({"user": "anna"}, "this server keeps nothing: leave out the name"),
    ],
)
@on_loop
async def test_what_cannot_be_wished_for_is_refused_in_a_sentence(query, sentence):
    async with served(rows=1) as server:
        async with talking(server, **query) as client:
            assert client.over == sentence
            assert client.code == 1008
        async with talking(server, text_temperature="0.7", audio_topk="x") as client:
            assert not client.over


@on_loop
async def test_who_is_silent_is_asked_to_leave():
    limits = Limits(idle=2.5)
    async with served(rows=2, limits=limits) as server:
        async with talking(server) as client, talking(server) as paused:
            await client.talk(noise(2))
            await paused.ws.send_bytes(b"\3\2")
            for one in (client, paused):
                await one.read_to_end()
                assert one.over.startswith("no sound came for")
                assert one.code == 1000
        await until(lambda: server.host.taken == 0)


@on_loop
async def test_the_server_says_that_it_stops():
    async with served() as server:
        async with talking(server) as client:
            await client.talk(noise(2))
            server.service.stop()
            await client.read_to_end()
            assert (client.over, client.code) == ("the server stops", 1001)
        async with talking(server) as client:
            assert (client.over, client.code) == ("the server stops", 1001)


@on_loop
async def test_it_ends_by_itself_when_the_server_goes():
    async with served() as server:
        session = aiohttp.ClientSession()
        ws = await session.ws_connect(f"{server.url}/api/chat?format=pcm")
        assert (await ws.receive()).data == b"\0"

        async def last_words():
            return [m.data async for m in ws], ws.close_code

        words = asyncio.ensure_future(last_words())
        await asyncio.sleep(0)
    assert await words == ([b"\5the server stops"], 1001)
    await session.close()


def test_the_log_has_a_line_for_each_end_and_no_names(caplog, tmp_path):
    from moshi_ttt.kept import Kept

    caplog.set_level(logging.INFO)

    @on_loop
    async def talk():
        async with served(kept=Kept(tmp_path), token="a" * 20) as server:
            async with talking(server, user="annabel", token="a" * 20) as client:
                await client.talk(noise(3))
            await until(lambda: not server.service.guests)

    talk()
    lines = [r.getMessage() for r in caplog.records]
    assert lines == [
        "conversation=1 event=start format=pcm rate=24000 start=new keeps=yes",
        "conversation=1 event=end minutes=0.0 frames=3 dropped_heard=0 dropped_said=0 why=left",
    ]


@pytest.mark.parametrize("rate", [8_000, 44_100])
@on_loop
async def test_samples_of_any_rate(rate):
    """A tone comes in at 24 kHz as the same tone, without seams, and goes out at its rate."""
    heard = []
    seconds = 1.6
    tone = (8000 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)).astype("<i2")
    async with served(rows=1) as server, talking(server, rate=rate) as client:
        step, engine = server.host.engine.step, server.host.engine
        engine.step = lambda pcm, mask: heard.append(pcm[0].copy()) or step(pcm, mask)
        for at in range(0, len(tone), rate // 50):  # messages that are no frames
            await client.ws.send_bytes(b"\1" + tone[at : at + rate // 50].tobytes())
            await client.read_until(lambda c, at=at: len(c.sound) >= 2 * (at - rate // 2))
        await client.read_until(lambda c: len(c.sound) >= 2 * rate * (seconds - 0.2))
        assert server.host.dropped_heard == 0
    pcm = np.concatenate([h for h in heard if h.any()])[FRAME : 17 * FRAME]
    times = np.arange(len(pcm)) / 24_000
    wave = np.stack([np.sin(2 * np.pi * 440 * times), np.cos(2 * np.pi * 440 * times)])
    fit = np.linalg.lstsq(wave.T, pcm, rcond=None)[0]
    assert np.hypot(*fit) == pytest.approx(8000 / 32768, rel=0.01)
    assert np.abs(pcm - fit @ wave).max() < 2e-3


def test_metadata_is_json_without_nan():
    from moshi_ttt.web.protocol import metadata

    assert json.loads(metadata({"a": None})[1:]) == {"a": None}
    with pytest.raises(ValueError, match="JSON"):
        metadata({"a": math.nan})
