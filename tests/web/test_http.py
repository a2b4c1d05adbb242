"""The page, health, metrics, kept memories, and requests that are none."""

import asyncio
import json
import logging
import socket
import stat

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moshi_ttt.kept import Kept
from moshi_ttt.saved_memory import read_memory
from moshi_ttt.web import app as app_module
from moshi_ttt.web.limits import Limits
from tests.web.served import noise, on_loop, served, talking, until


@pytest.fixture
def page(tmp_path, monkeypatch):
    folder = tmp_path / "page"
    folder.mkdir()
    (folder / "index.html").write_text("<!doctype html><title>é</title>")
    (folder / "page.js").write_text("export {}")
    (folder / "look.css").write_text("p {}")
    (folder / ".hidden").write_text("x")
    (folder / "inner").mkdir()
    (folder / "inner" / "x.js").write_text("x")
    (tmp_path / "secret").write_text("a secret")
    monkeypatch.setattr(app_module, "PAGE", folder)


@on_loop
async def test_the_page_is_served_and_nothing_beside_it(page):
    async with served(rows=1) as server, aiohttp.ClientSession() as session:
        kinds = {
            "/": "text/html; charset=utf-8",
            "/page/index.html": "text/html; charset=utf-8",
            "/page/page.js": "text/javascript; charset=utf-8",
            "/page/look.css": "text/css; charset=utf-8",
        }
        for path, kind in kinds.items():
            async with session.get(server.url + path) as answer:
                assert (answer.status, answer.headers["Content-Type"]) == (200, kind)
                csp = answer.headers["Content-Security-Policy"]
                assert "default-src 'self'" in csp
                assert "frame-ancestors 'none'" in csp
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
                assert answer.headers["Referrer-Policy"] == "no-referrer"
                assert answer.headers["Permissions-Policy"].startswith("microphone=(self)")
                assert "Server" not in answer.headers
                etag = answer.headers["ETag"]
            async with session.get(server.url + path, headers={"If-None-Match": etag}) as answer:
                assert answer.status == 304
            async with session.head(server.url + path) as answer:
                assert answer.status == 200
            async with session.post(server.url + path) as answer:
                assert (answer.status, answer.headers["Allow"]) == (405, "GET,HEAD")
        for path in (
            "/page/", "/page/.hidden", "/page/inner/x.js", "/page/../secret", "/../secret",
            "/page/%2e%2e/secret", "/page/..%2fsecret", "/page/%2e%2e%2fsecret", "/page//secret",
            "/page/....//secret", "/page/..%5csecret", "/page/index.html%00", "/etc/passwd", "/x",
        ):  # fmt: skip
            status, head, body = await raw(server, get(path))
            assert status == 404, path
            assert b"secret" not in body
            assert b"nosniff" in head


async def raw(server, request):
    """Send bytes, and wait until the server closes; status, head and body of the answer."""
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request if isinstance(request, bytes) else request.encode("latin-1"))
    data = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else None, head, body


def get(path, method="GET"):
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@on_loop
async def test_what_is_no_request_is_answered_and_not_logged(caplog):
    caplog.set_level(logging.INFO)
    local, big = "Host: localhost\r\n", "a" * 70_000
    upgrade = f"GET /api/chat HTTP/1.1\r\n{local}Upgrade: websocket\r\nConnection: upgrade\r\n"
    requests = [
        b"\0" * 100,
        b"\x16\x03\x01\x02\x00\x01\x00",  # of TLS
        "GET\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n",
        "XYZZY / HTTP/1.1\r\n\r\n",
        f"GET / HTTP/1.1\r\n{local}A: b\nc\r\n\r\n",
        f"GET /{big} HTTP/1.1\r\n\r\n",
        f"GET / HTTP/1.1\r\n{local}A: {big}\r\n\r\n",
        f"GET http://[ HTTP/1.1\r\n{local}\r\n",
        f"GET / HTTP/1.1\r\n{local}Content-Length: -1\r\n\r\n",
        f"GET / HTTP/1.1\r\n{local}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        f"DELETE /api/memories/a HTTP/1.1\r\n{local}Content-Length: 99\r\n\r\nx",
        f"GET /api/chat HTTP/1.1\r\n{local}\r\n",
        f"{upgrade}Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: short\r\n\r\n",
        f"{upgrade}Sec-WebSocket-Version: 99\r\nSec-WebSocket-Key: {'A' * 22}==\r\n\r\n",
        f"{upgrade}Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {chr(233) * 24}\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: [::1\r\n\r\n",
        f"GET / HTTP/1.1\r\n{local}Origin: \xff\xfe\r\n\r\n",
    ]
    async with served(rows=1, limits=Limits(patience=1.0)) as server:
        answers = await asyncio.gather(*(raw(server, r) for r in requests))
        for request, (status, _, body) in zip(requests, answers, strict=True):
            assert status in (None, 400, 403, 404, 405), (request[:200], status)
            assert b"Traceback" not in body
        assert (await raw(server, get("/health")))[0] == 200
    assert [r.getMessage() for r in caplog.records] == []


@on_loop
async def test_a_request_that_names_no_host_waits_for_no_name_server(monkeypatch):
    def asked():
        raise AssertionError("a name server was asked")

    monkeypatch.setattr(socket, "getfqdn", asked)
    for token, status in ((None, 403), ("0123456789-abcdef", 200)):
        async with served(rows=1, token=token) as server:
            assert (await raw(server, "GET /health HTTP/1.0\r\n\r\n"))[0] == status
            origin = "GET /health HTTP/1.0\r\nOrigin: http://localhost\r\n\r\n"
            assert (await raw(server, origin))[0] == 403


@on_loop
async def test_health_and_metrics():
    async with served(rows=3) as server, aiohttp.ClientSession() as session:
        async with talking(server) as client:
            await client.talk(noise(4))
            async with session.get(f"{server.url}/health") as answer:
                assert answer.status == 200
                assert await answer.json() == {
                    "ok": True, "sessions": 1, "rows": 3, "reason": None
                }  # fmt: skip
            async with session.get(f"{server.url}/metrics") as answer:
                assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
                assert answer.headers["Cache-Control"] == "no-store"
                text = await answer.text()
        await until(lambda: server.host.taken == 0)
        async with session.get(f"{server.url}/api/model") as answer:
            assert await answer.json() == {
                "name": "a small one", "memory": True, "rows": 3, "taken": 0, "frame_ms": 80.0,
                "layers": ["transformer.layers.0", "transformer.layers.1"],
                "sample_rate": 24_000, "keeps": False, "token": False,
            }  # fmt: skip
    samples = {
        (s.name, *s.labels.values()): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }
    assert samples["moshi_ttt_sessions",] == 1
    assert samples["moshi_ttt_sessions_max",] == 3
    assert samples["moshi_ttt_conversations_total",] == 1
    assert samples["moshi_ttt_engine_up",] == 1
    assert samples["moshi_ttt_queue_frames",] == 0
    assert samples["moshi_ttt_dropped_frames_total", "heard"] == 0
    assert samples["moshi_ttt_dropped_frames_total", "said"] == 0
    assert samples["moshi_ttt_frame_seconds_count",] >= 4
    seconds = samples["moshi_ttt_frame_seconds_sum",] / samples["moshi_ttt_frame_seconds_count",]
    assert 0 < seconds < 5
    assert 0 < samples["moshi_ttt_frame_seconds", "0.5"] < 5
    assert samples["moshi_ttt_received_bytes_total",] == 4 * 3841
    assert samples["moshi_ttt_sent_bytes_total",] >= 4 * 3841
    assert samples["moshi_ttt_saves_total",] == 0


@on_loop
async def test_a_failed_engine_is_told_everywhere(tmp_path):
    """Everyone is told, health says it, and nobody is let in; the process lives."""

    def broken(pcm, mask):
        raise RuntimeError("the card is on fire")

    kept = Kept(tmp_path)
    async with served(2, fails=True, kept=kept) as server, talking(server, user="a") as client:
        await client.talk(noise(2))
        server.host.engine.step = broken
        await client.ws.send_bytes(b"\1" + noise(1).tobytes())
        await client.read_to_end()
        assert client.over == "the model has failed: the server's log says why"
        assert client.code == 1011
        async with talking(server) as late:
            assert (late.over, late.code) == (client.over, 1011)
        status, _, body = await raw(server, get("/health"))
        assert (status, json.loads(body)["ok"]) == (503, False)
        _, _, body = await raw(server, get("/metrics"))
        assert b"moshi_ttt_engine_up 0.0" in body
        await until(lambda: not server.service.guests)
        with kept.taken("a"):  # the name is free
            pass


@on_loop
async def test_a_kept_memory_is_told_exported_and_deleted(tmp_path):
    kept = Kept(tmp_path / "memories")
    async with served(rows=2, kept=kept) as server, aiohttp.ClientSession() as session:
        url = f"{server.url}/api/memories"
        async with session.get(f"{url}/anna") as answer:
            assert (answer.status, list(await answer.json())) == (404, ["error"])
        async with talking(server, user="Anna") as client:
            await client.talk(noise(6))
            async with session.delete(f"{url}/anna") as answer:
                assert answer.status == 404
        await until(lambda: not server.service.guests)
        async with session.get(f"{url}/ANNA") as answer:
            about = await answer.json()
        assert about["name"] == "anna"
        assert about["seconds"] == pytest.approx(7 * 0.08)  # with the step at position 0
        assert about["size"] == kept.path("anna").stat().st_size
        async with talking(server, user="anna"), session.delete(f"{url}/anna") as answer:
            assert answer.status == 409
            assert "in another conversation" in (await answer.json())["error"]
            assert str(tmp_path) not in await answer.text()
        await until(lambda: not server.service.guests)
        async with session.get(f"{url}/anna/export") as answer:
            assert answer.status == 200
            assert answer.headers["Content-Type"] == "application/octet-stream"
            assert answer.headers["Content-Disposition"] == (
                "attachment; filename*=UTF-8''anna.safetensors"
            )
            copy = tmp_path / "copy.safetensors"
            copy.write_bytes(await answer.read())
        assert read_memory(copy).frames == 7
        async with session.delete(f"{url}/anna") as answer:
            assert answer.status == 204
        for request in (session.get(f"{url}/anna/export"), session.delete(f"{url}/anna")):
            async with request as answer:
                assert answer.status == 404
        assert kept.list() == []
        assert stat.S_IMODE(kept.folder.stat().st_mode) == 0o700


@on_loop
async def test_names_cannot_leave_the_folder(tmp_path):
    (tmp_path / "secret.safetensors").write_text("a secret")
    kept = Kept(tmp_path / "memories")
    kept.folder.mkdir()
    (kept.folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    async with served(rows=1, kept=kept) as server:
        for name in (
            "..%2fsecret", "%2e%2e%2fsecret", "..%5csecret", "%00", "a%0a", ".", "..", "link",
            "%2fetc%2fpasswd", "a" * 300, "%ff%fe", "con%3a", "a%2f..%2fb",
        ):  # fmt: skip
            for method, rest in (("GET", ""), ("GET", "/export"), ("DELETE", "")):
                path = f"/api/memories/{name}{rest}"
                status, _, body = await raw(server, get(path, method))
                assert status in (400, 404), (status, path)
                assert b"a secret" not in body
                assert str(tmp_path).encode() not in body, body
    assert (tmp_path / "secret.safetensors").exists()


@on_loop
async def test_sockets_that_ask_for_nothing_are_closed():
    limits = Limits(patience=2.0, sockets=4)
    async with served(rows=1, limits=limits) as server:
        host, port = server.url.removeprefix("http://").split(":")

        async def opened(first=b""):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(first)
            return reader, writer

        async with talking(server) as client:  # one that talks stays, however long it takes
            idle = [
                await opened(),
                await opened(b"GET / HTTP/1.1\r\nHost: loc"),
                await opened(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"),
            ]
            drip = await opened(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nG")
            await until(lambda: len(server.service.door.server.connections) == 5)
            refused = await opened(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert await gone(refused)
            for connection in (*idle, drip):
                assert await gone(connection)
            await until(lambda: len(server.service.door.server.connections) == 1)
            await client.talk(noise(2))
            assert (await raw(server, get("/health")))[0] == 200
        text = server.service.metrics.text().decode()
        assert 'moshi_ttt_refusals_total{reason="sockets"} 1.0' in text


async def gone(connection):
    reader, writer = connection
    try:
        await asyncio.wait_for(reader.read(), 10)
        return True
    except ConnectionError:
        return True
    finally:
        writer.close()
