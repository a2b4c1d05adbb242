"""moshi's own client talks to this server: its connection code, with a sound card that is none."""

import asyncio
import importlib
import sys
import types

import aiohttp
import numpy as np
import pytest
import sphn

from moshi_ttt.frames import FRAME
from tests.web.served import engine_for, on_loop, served, until


class NoCard:
    """What the client asks of sounddevice."""

    def __init__(self, **options):
        self.callback = options["callback"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


class Listener:
    """A printer of the client's that keeps what it is given."""

    def __init__(self):
        self.text, self.errors = "", []

    def print_token(self, token):
        self.text += token

    def log(self, level, line):
        if level == "error":
            self.errors.append(line)

    def print_pending(self):
        pass

    def print_lag(self):
        pass


@pytest.fixture
def client_module(monkeypatch):
    card = types.ModuleType("sounddevice")
    card.InputStream = card.OutputStream = NoCard
    monkeypatch.setitem(sys.modules, "sounddevice", card)
    monkeypatch.delitem(sys.modules, "moshi.client", raising=False)
    yield importlib.import_module("moshi.client")
    sys.modules.pop("moshi.client", None)


def speech(frames, seed):
    """Tones that come and go, `[frames, 1920]` float32."""
    times = np.arange(frames * FRAME) / 24_000
    tones = sum(np.sin(2 * np.pi * hz * times + seed) for hz in (180, 360, 700, 1900))
    loud = 1 + np.sin(2 * np.pi * 3 * times + seed)
    return (0.08 * tones * loud).astype(np.float32).reshape(-1, FRAME)


def through_opus(frames):
    writer, reader = sphn.OpusStreamWriter(24_000), sphn.OpusStreamReader(24_000)
    return np.stack([reader.append_bytes(writer.append_pcm(frame)) for frame in frames])


async def converse(module, server, row, frames, done):
    """Each frame after the answer to the one before; what the loudspeaker plays, and the text."""
    async with aiohttp.ClientSession() as session:
        await until(lambda: server.host.taken == row)
        async with session.ws_connect(f"{server.url}/api/chat") as ws:
            printer = Listener()
            connection = module.Connection(printer, ws, asyncio.get_running_loop())
            running = asyncio.ensure_future(connection.run())
            voice = np.zeros((len(frames), FRAME, 1), np.float32)
            for frame, out in zip(frames, voice, strict=True):
                connection._on_audio_input(frame[:, None], FRAME, None, None)
                await until(lambda: connection._output_queue.qsize())
                connection._on_audio_output(out, FRAME, None, None)
            done.append(row)
            await until(lambda: len(done) == 2)
            await ws.close()
            await running
            assert not printer.errors
            return voice[..., 0], printer.text


@on_loop
async def test_moshis_own_client_hears_what_the_engine_says(client_module):
    """The microphones' sound reaches the engine bit for bit as Opus leaves it, and the engine's
    voice and text the loudspeakers; of two clients at a time, each its own.
    """
    sounds = [speech(12, seed) for seed in range(2)]
    heard, done = [[], []], []
    async with served(rows=2) as server:
        step = server.host.engine.step

        def tapped(pcm, mask):
            for row in np.flatnonzero(mask):
                heard[row].append(pcm[row].copy())
            return step(pcm, mask)

        server.host.engine.step = tapped
        talks = await asyncio.gather(
            *(converse(client_module, server, row, sounds[row], done) for row in range(2))
        )
    for row, ((voice, text), sound, arrived) in enumerate(zip(talks, sounds, heard, strict=True)):
        assert np.array_equal(np.stack(arrived), through_opus(sound))
        said, words, pcm = [], "", np.zeros((2, FRAME), np.float32)
        with engine_for(2) as engine:
            for frame in arrived:
                pcm[row] = frame
                out = engine.step(pcm)
                said.append(out.pcm[row].numpy().copy())
                words += out.text[row]
        # another engine's last bits may be others, and Opus makes more of them
        assert np.allclose(voice, through_opus(said), atol=2e-3)
        assert voice.std() > 1e-3
        assert words.startswith(text)
        assert len(text) > 3
