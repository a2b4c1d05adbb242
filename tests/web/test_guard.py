"""Who may ask: tokens, and pages of other sites."""

import asyncio

import aiohttp
import pytest

from moshi_ttt.errors import UserError
from moshi_ttt.kept import Kept
from moshi_ttt.web import guard
from moshi_ttt.web.guard import check_origin, is_loopback, read_token
from tests.web.served import on_loop, served, talking

TOKEN = "0123456789-abcdef"
PATHS = ["/", "/health", "/metrics", "/api/model", "/api/memories/anna"]


async def status(server, path, method="GET", **headers):
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, server.url + path, headers=headers) as answer,
    ):
        return answer.status, await answer.text()


async def shake_hands(server, query="", **headers):
    """The status of a websocket's handshake; 101 if it was let in."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    async with aiohttp.ClientSession() as session:
        try:
            async with session.ws_connect(f"{server.url}/api/chat{query}", headers=headers) as ws:
                await ws.receive()
                return 101
        except aiohttp.WSServerHandshakeError as error:
            return error.status


@on_loop
async def test_without_a_token_only_this_machine_by_its_own_name(tmp_path):
    async with served(rows=2, kept=Kept(tmp_path), origins=["https://moshi.example"]) as server:
        port = server.url.rpartition(":")[2]
        for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}", "moshi.example"):
            assert (await status(server, "/api/model", Host=host))[0] == 200, host
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "10.0.0.1"):
            for path in PATHS:
                assert (await status(server, path, Host=host))[0] == 403, (host, path)
            assert await shake_hands(server, Host=host) == 403
            assert (await status(server, "/api/memories/a", "DELETE", Host=host))[0] == 403
        assert await shake_hands(server) == 101


@pytest.mark.parametrize("token", [None, TOKEN])
@on_loop
async def test_pages_of_other_sites_may_ask_for_nothing(token):
    bearer = {} if token is None else {"Authorization": f"Bearer {token}"}
    async with served(rows=2, token=token, origins=["https://moshi.example"]) as server:
        port = server.url.rpartition(":")[2]
        own = [server.url, "https://moshi.example", "HTTPS://MOSHI.EXAMPLE"]
        for origin in own:
            assert await shake_hands(server, Origin=origin, **bearer) == 101, origin
            assert (await status(server, "/api/model", Origin=origin, **bearer))[0] == 200
        others = ["https://evil.example", "null", "http://127.0.0.1", f"https://127.0.0.1:{port}",
                  "https://moshi.example.evil.example", "http://moshi.example",
                  f"http://127.0.0.1:{port}0", f"http://localhost:{port}"]  # fmt: skip
        for origin in others:
            assert await shake_hands(server, Origin=origin, **bearer) == 403, origin
            for method, path in (("DELETE", "/api/memories/a"), ("GET", "/api/memories/a/export")):
                assert (await status(server, path, method, Origin=origin, **bearer))[0] == 403
        # a picture or a download that another page embeds comes without Origin
        for site in ("cross-site", "same-site"):
            answer = await status(server, "/api/memories/a/export", Sec_Fetch_Site=site, **bearer)
            assert answer[0] == 403
        assert (await status(server, "/health", Sec_Fetch_Site="cross-site", **bearer))[0] == 200
        metrics = server.service.metrics.text().decode()
    assert 'moshi_ttt_refusals_total{reason="origin"} 26.0' in metrics


@on_loop
async def test_with_a_token_everything_but_the_page_and_health_needs_it(caplog):
    async with served(rows=2, token=TOKEN) as server:
        for path in PATHS:
            open_ = path in ("/", "/health")
            code, text = await status(server, path, Host="moshi.example")
            assert code in ((200, 404) if open_ else (401,)), path
            assert open_ or text == '{"error": "a token is needed"}'
        assert (await status(server, "/health"))[1] == '{"ok": true}'
        good = {"Authorization": f"Bearer {TOKEN}"}
        assert (await status(server, "/metrics", **good))[0] == 200
        assert (await status(server, "/api/model", **good))[0] == 200
        assert await shake_hands(server) == 401
        assert await shake_hands(server, **good) == 101
        assert await shake_hands(server, f"?token={TOKEN}") == 101
        for wrong in (TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "%C3%A9" * 9, "%00", "\udce9" * 3):
            assert await shake_hands(server, f"?token={wrong}") == 401, wrong
        # in an address a token would end up in histories and logs
        assert (await status(server, f"/api/model?token={TOKEN}"))[0] == 401
        async with talking(server, token=TOKEN) as client:
            assert not client.over
    assert TOKEN not in caplog.text


@on_loop
async def test_wrong_tokens_are_few(monkeypatch):
    monkeypatch.setattr(guard, "_ATTEMPT_RATE", 5.0)
    bad, good = ({"Authorization": f"Bearer {t}"} for t in ("x" * 16, TOKEN))
    async with served(token=TOKEN) as server:
        for _ in range(20):  # right ones cost nothing
            assert (await status(server, "/api/model", **good))[0] == 200
        codes = [(await status(server, "/api/model", **bad))[0] for _ in range(30)]
        assert codes[:10] == [401] * 10
        assert 429 in codes
        for _ in range(5):
            await status(server, "/api/model", **bad)
        assert (await status(server, "/health"))[0] == 200

        async def let_in():
            return (await status(server, "/api/model", **good))[0] == 200

        for _ in range(100):
            if await let_in():
                break
            await asyncio.sleep(0.05)
        else:
            raise AssertionError("the right token is never let in again")


def test_a_token_is_read_and_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MOSHI_TTT_TOKEN", raising=False)
    assert read_token(None) is None
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    file.chmod(0o600)
    assert read_token(str(file)) == TOKEN
    assert capsys.readouterr().err == ""
    file.chmod(0o644)
    assert read_token(str(file)) == TOKEN
    assert "chmod 600" in capsys.readouterr().err
    for bad in ("", "short", "a token of words here", "é" * 20):
        file.write_text(bad)
        with pytest.raises(UserError, match="--token-file"):
            read_token(str(file))
    with pytest.raises(UserError, match="No such file"):
        read_token(str(tmp_path / "none"))
    for bad in ("", "short"):
        monkeypatch.setenv("MOSHI_TTT_TOKEN", bad)
        with pytest.raises(UserError, match="MOSHI_TTT_TOKEN has"):
            read_token(None)
    monkeypatch.setenv("MOSHI_TTT_TOKEN", TOKEN)
    assert read_token(None) == TOKEN
    with pytest.raises(UserError, match="leave out one"):
        read_token(str(file))


def test_origins_and_loopback_names():
    assert check_origin("HTTPS://Moshi.example:8443") == "https://moshi.example:8443"
    assert check_origin("https://moshi.example:443") == "https://moshi.example"
    for bad in ("moshi.example", "https://moshi.example/", "*", "null", "file://x", "https://"):
        with pytest.raises(UserError, match="--allow-origin"):
            check_origin(bad)
    for name in ("127.0.0.1", "127.3.2.1", "::1", "localhost", "LOCALHOST", "localhost."):
        assert is_loopback(name), name
    for name in ("", "0.0.0.0", "::", "10.0.0.1", "localhost.evil.example", "1", "127.1"):
        assert not is_loopback(name), name


def test_addresses_are_forgotten():
    watch = guard.Guard(TOKEN, (), lambda why: None)
    for n in range(3 * guard._MOST_ADDRESSES):
        watch._attempts[f"10.{n}"] = guard.Bucket(0.001, 10.0)
        watch._attempts[f"10.{n}"].take()
        watch._forget()
    assert len(watch._attempts) <= guard._MOST_ADDRESSES + 1
    assert guard._network_of("2001:db8::1") == guard._network_of("2001:db8::2")
    assert guard._network_of("2001:db8::1") != guard._network_of("2001:db8:0:1::1")
    assert guard._network_of("10.0.0.1") != guard._network_of("10.0.0.2")
