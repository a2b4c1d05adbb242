"""A memory outlives its conversation: begun with, saved every minute, on demand and at the end."""

import asyncio

import numpy as np
import pytest

from moshi_ttt.kept import Kept
from moshi_ttt.saved_memory import read_memory, take_memory
from moshi_ttt.states import ttt_blocks
from moshi_ttt.web.limits import Limits
from tests.web.served import hybrid, noise, on_loop, served, talking, until


@pytest.fixture
def kept(tmp_path):
    return Kept(tmp_path / "memories")


async def empty(server):
    await until(lambda: not server.service.guests)


async def one_talk(server, frames=6, **query):
    async with talking(server, **query) as client:
        if client.over:
            return client.over
        await client.talk(noise(frames))
    await empty(server)
    return None


def same(one, other):
    return all(np.array_equal(t, other.tensors[n]) for n, t in one.tensors.items())


@on_loop
async def test_the_next_conversation_begins_with_what_was_kept(kept):
    async with served(kept=kept) as server:
        await one_talk(server, 9, user="Anna")
        saved = read_memory(kept.path("anna"))
        assert saved.frames == 10  # with the step at position 0
        async with talking(server, user="ANNA", readings=1) as client:
            await client.read_until(lambda c: c.last("hello"))
            hello = client.last("hello")
            assert (hello["user"], hello["start"]) == ("anna", "kept")
            assert hello["seconds"] == pytest.approx(0.8)
            await client.talk(noise(2))
            row = next(iter(server.host._conversations))
            assert take_memory(server.host.engine, row).frames > 10
        await empty(server)
        assert read_memory(kept.path("anna")).frames > 10
        async with talking(server, user="anna", start="new", readings=1) as client:
            await client.read_until(lambda c: c.last("hello"))
            assert (client.last("hello")["start"], client.last("hello")["seconds"]) == ("new", 0)
            await client.talk(noise(2))
        await empty(server)
        assert read_memory(kept.path("anna")).frames == 3


@on_loop
async def test_who_says_nothing_loses_nothing(kept):
    async with served(kept=kept) as server:
        await one_talk(server, user="anna")
        before = kept.path("anna").read_bytes()
        assert await one_talk(server, 0, user="anna", start="new") is None
        async with talking(server, user="anna", start="new", readings=1) as client:
            await client.keep()
            await client.read_until(lambda c: c.last("save failed"))
            assert client.last("save failed")["reason"] == "nothing was heard yet"
        await empty(server)
    assert kept.path("anna").read_bytes() == before


@on_loop
async def test_saved_every_minute_and_on_demand(kept):
    async with served(kept=kept, limits=Limits(save=0.3, keep=0.05)) as server:
        async with talking(server, user="anna", readings=1) as client:
            await client.talk(noise(3))
            await client.read_until(lambda c: (c.last("saved") or {"seconds": 0})["seconds"] > 0.3)
            assert client.last("saved")["seconds"] == pytest.approx(4 * 0.08)
            assert client.last("saved")["at"] == pytest.approx(kept.find("anna").saved, abs=2)
            assert read_memory(kept.path("anna")).frames == 4
    async with served(kept=kept, limits=Limits(save=1000)) as server:
        async with talking(server, user="anna", readings=1) as client:
            await client.talk(noise(2))
            await client.keep(user="somebody else")  # it has a name already
            await client.read_until(lambda c: c.last("saved"))
            assert client.last("saved")["seconds"] == pytest.approx(7 * 0.08)
            assert [m.name for m in kept.list()] == ["anna"]
        text = server.service.metrics.text().decode()
    assert "moshi_ttt_saves_total 1.0" in text or "moshi_ttt_saves_total 2.0" in text


@on_loop
async def test_a_name_can_be_given_later_but_takes_nothing_from_another(kept):
    async with served(kept=kept, limits=Limits(keep=0.01)) as server:
        await one_talk(server, user="anna")
        before = kept.path("anna").read_bytes()
        async with talking(server, readings=1) as client:
            await client.talk(noise(2))
            refusals = {
                None: "a name is needed to keep a memory",
                "../x": "has '/' in it",
                "anna": "a memory is kept for 'anna' already",
                "n" * 300: "is too long",
            }
            for n, (name, reason) in enumerate(refusals.items(), 1):
                await client.keep(**({} if name is None else {"user": name}))
                await client.read_until(lambda c, n=n: len(c.news) > n and c.last("save failed"))
                failed = [m["reason"] for m in client.news if m["type"] == "save failed"]
                assert reason in failed[-1]
            await client.keep(user=["a", "list"])
            await client.keep(user="Bert")
            await client.read_until(lambda c: c.last("saved"))
            async with talking(server, user="bert") as other:
                assert (
                    other.over
                    == "bert is in another conversation: end that one, or take another name"
                )
            await client.talk(noise(2))
        await empty(server)
    assert kept.path("anna").read_bytes() == before
    assert read_memory(kept.path("bert")).frames == 5


@on_loop
async def test_incognito_begins_with_what_is_kept_and_writes_nothing(kept):
    async with served(kept=kept, limits=Limits(save=0.05, keep=0.01)) as server:
        await one_talk(server, user="anna")
        before = {p: p.read_bytes() for p in kept.folder.iterdir() if p.suffix == ".safetensors"}
        async with talking(server, user="anna", incognito=1, readings=1) as client:
            await client.talk(noise(3))
            hello = client.last("hello")
            assert (hello["start"], hello["incognito"]) == ("kept", True)
            await client.keep()
            await client.keep(user="bert")
            await client.read_until(lambda c: c.last("save failed"))
            assert "incognito" in client.last("save failed")["reason"]
            async with talking(server, user="anna", start="new") as other:  # nobody has the name
                assert not other.over
        await empty(server)
        after = {p: p.read_bytes() for p in kept.folder.iterdir() if p.suffix == ".safetensors"}
    assert after == before


@on_loop
async def test_a_name_is_one_conversations(kept):
    async with served(kept=kept) as server, talking(server, user="anna") as first:
        await first.talk(noise(1))
        async with talking(server, user="Anna") as second:
            assert (
                second.over == "anna is in another conversation: end that one, or take another name"
            )
            assert second.code == 1008
        assert server.host.taken == 1
        await first.ws.close()
        assert await one_talk(server, 1, user="anna") is None  # waits until the first is saved


@on_loop
async def test_names_do_not_fill_the_disk(kept):
    async with served(kept=kept, limits=Limits(memories=2)) as server:
        for name in ("anna", "bert", "anna"):
            assert await one_talk(server, 2, user=name) is None
        refused = "this server keeps 2 memories and has them: go on without a name, or take one"
        assert (await one_talk(server, user="carl")).startswith(refused)
        assert await one_talk(server, 0, user="carl", incognito=1) is None
        async with talking(server, readings=1) as client:
            await client.talk(noise(2))
            await client.keep(user="carl")
            await client.read_until(lambda c: c.last("save failed"))
            assert client.last("save failed")["reason"].startswith(refused)
        await empty(server)
    assert [m.name for m in kept.list()] == ["anna", "bert"]


@on_loop
async def test_a_memory_of_another_model_is_refused_with_the_reason(kept):
    async with served(kept=kept) as server:
        await one_talk(server, user="anna")
    before = kept.path("anna").read_bytes()
    async with served(kept=kept, lm=hybrid(chunk_size=8)) as server:
        reason = await one_talk(server, user="anna")
        assert "chunk_size" in reason
        assert str(kept.folder) not in reason
        assert server.host.taken == 0
        kept.path("bert").write_bytes(b"no memory")
        assert "broken" in await one_talk(server, user="bert")
    assert kept.path("anna").read_bytes() == before


@on_loop
async def test_what_broke_is_not_kept_over_what_was_whole(kept):
    async with served(kept=kept, limits=Limits(save=1000)) as server:
        await one_talk(server, user="anna")
        before = kept.path("anna").read_bytes()
        async with talking(server, user="anna", readings=1) as client:
            await client.talk(noise(2))
            for block in ttt_blocks(server.host.engine.lm).values():
                for now, _ in block.memory.fast_weights(block._streaming_state.memory.fast):
                    now.fill_(float("nan"))
            await client.talk(noise(12))
            assert server.host._conversations[0].diverged > 0
            await client.keep()
            await client.read_until(lambda c: c.last("save failed"))
            assert "broke and started over" in client.last("save failed")["reason"]
        await empty(server)
    assert kept.path("anna").read_bytes() == before


@on_loop
async def test_a_disk_that_is_full_is_said_and_the_conversation_goes_on(kept, monkeypatch):
    async with served(kept=kept, limits=Limits(save=1000, keep=0.01)) as server:
        await one_talk(server, user="anna")
        before = kept.path("anna").read_bytes()
        async with talking(server, user="anna", readings=1) as client:
            await client.talk(noise(2))
            with monkeypatch.context() as patch:
                patch.setattr(Kept, "write", full_disk)
                await client.keep()
                await client.read_until(lambda c: c.last("save failed"))
                assert "no space left" in client.last("save failed")["reason"]
                await client.talk(noise(2))
            assert kept.path("anna").read_bytes() == before
        await empty(server)
        assert "moshi_ttt_save_failures_total 1.0" in server.service.metrics.text().decode()
    assert kept.path("anna").read_bytes() != before


def full_disk(self, name, saved):
    raise OSError(28, "No space left on device")


@on_loop
async def test_all_is_saved_when_the_server_stops(kept):
    async with served(kept=kept, limits=Limits(save=1000)) as server:
        clients = []

        async def one(name):
            async with talking(server, user=name, readings=1) as client:
                await client.talk(noise(3))
                clients.append(client)
                await client.read_to_end()
                return client

        tasks = [asyncio.ensure_future(one(name)) for name in ("anna", "bert")]
        await until(lambda: len(clients) == 2)
    for client in await asyncio.gather(*tasks):
        assert client.over == "the server stops"
        assert client.last("saved")["seconds"] == pytest.approx(4 * 0.08)
    assert [(m.name, m.frames) for m in kept.list()] == [("anna", 4), ("bert", 4)]
