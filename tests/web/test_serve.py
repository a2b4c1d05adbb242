"""The command itself: what it refuses before anything is loaded, and a whole run of it."""

import io
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import aiohttp
import numpy as np
import pytest

from moshi_ttt import serve
from moshi_ttt.base import find_base
from moshi_ttt.checkpoint import save_checkpoint
from moshi_ttt.errors import UserError
from moshi_ttt.kept import Kept
from moshi_ttt.models import open_talker
from moshi_ttt.serve import address_of, listen, main, parse, tls_of
from tests.small import small_base
from tests.web.served import Client, Served, alone, hybrid, noise, run, talking

TOKEN = "0123456789-abcdef"


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch):
    """Every mistake here is found before the model."""
    monkeypatch.delenv("MOSHI_TTT_TOKEN", raising=False)
    monkeypatch.setattr(serve, "open_talker", None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    base = find_base(small_base(folder / "base"))
    return str(save_checkpoint(hybrid(), folder / "runs/a/checkpoints/checkpoint_000001", base))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--port", "65536"], "--port must be 0 to 65535, got 65536"),
        (["--max-sessions", "0"], "--max-sessions must be 1 to 1024, got 0"),
        (["--max-sessions", "9999"], "--max-sessions must be 1 to 1024, got 9999"),
        (["--max-memories", "-1"], "--max-memories must not be negative, got -1"),
        (["--no-keep", "--max-memories", "3"], "leave out --memories and --max-memories"),
        (["--memories", "/dev/null"], "/dev/null is not a folder that can be written to"),
        (["--memories", "/dev/null/a"], "/dev/null is not a folder that can be written to"),
        (["--idle-seconds", "0"], "--idle-seconds must be 1 to 86400, got 0"),
        (["--idle-seconds", "nan"], "--idle-seconds must be 1 to 86400, got nan"),
        (["--tls-cert", "a"], "--tls-cert and --tls-key go together"),
        (["--no-keep", "--memories", "a"], "leave out --memories"),
        (["--allow-origin", "moshi.example"], "--allow-origin moshi.example"),
        (["--allow-origin", "http://["], "--allow-origin http://["),
        (["--allow-origin", "https://a:99999"], "--allow-origin https://a:99999"),
        (["--seed", str(1 << 63)], f"--seed must be 0 to {(1 << 63) - 1}"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--temp", "-1"], "temp must not be negative"),
        (["--host", "0.0.0.0"], "needs a token"),
        (["--host", ""], "needs a token"),
        (["--host", "::"], "needs a token"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--host", "a..b"], "--host a..b: it is not the name of a host"),
        (["--host", "a" * 80], "it is not the name of a host"),
        (["--token-file", "none"], "--token-file none"),
        (["--tls-cert", "none", "--tls-key", "none"], "--tls-cert none: No such file"),
        (["--token", TOKEN], "unrecognized arguments"),
        (["--device", "tpu"], "device 'tpu' is unknown"),
        (["--device", "meta"], "device 'meta' is unknown"),
    ],
)
def test_mistakes_are_one_line(options, reason, capsys):
    with pytest.raises(SystemExit) as left:
        main(options)
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert reason in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_port_that_is_taken_is_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SystemExit):
            main(["--port", str(port)])
    assert f"127.0.0.1 port {port} cannot be listened on: Address already in use" in (
        capsys.readouterr().err
    )


def test_where_it_listens_and_what_to_open():
    for host in ("localhost", "127.0.0.1", "::1", "[::1]"):
        sockets = listen(host, 0, token=False)
        ports = {sock.getsockname()[1] for sock in sockets}
        assert len(ports) == 1
        for sock in sockets:
            assert sock.getsockname()[0] in ("127.0.0.1", "::1")
            sock.close()
    (sock,) = listen("127.0.0.1", 0, token=False)
    port = sock.getsockname()[1]
    assert address_of("127.0.0.1", sock, tls=False) == f"http://127.0.0.1:{port}/"
    assert address_of("::1", sock, tls=True) == f"https://[::1]:{port}/"
    assert address_of("[::1]", sock, tls=True) == f"https://[::1]:{port}/"
    sock.close()
    assert parse([]).port == 8998
    assert parse([]).host == "127.0.0.1"


def test_an_address_that_this_machine_has_not_is_left_out(monkeypatch):
    """As `localhost` is ::1 too, where there is no IPv6."""
    here, elsewhere = ("127.0.0.1", 0), ("192.0.2.1", 0)  # the latter is nobody's
    for found in ([here, elsewhere], [elsewhere, here], [elsewhere]):
        answer = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", address) for address in found]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, answer=answer, **k: answer)
        if here in found:
            (sock,) = listen("localhost", 0, token=True)
            assert sock.getsockname()[0] == "127.0.0.1"
            sock.close()
        else:
            with pytest.raises(UserError, match="localhost port 0 cannot be listened on"):
                listen("localhost", 0, token=True)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """cert and key, PEM, self-signed."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert,
         "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("openssl, which makes a certificate, is missing")
    return str(cert), str(key)


def test_certificates_are_looked_at_before_the_model(certificate, tmp_path):
    cert, key = certificate
    assert tls_of(None, None) is None
    assert isinstance(tls_of(cert, key), ssl.SSLContext)
    junk = tmp_path / "junk.pem"
    junk.write_text("no certificate")
    locked = tmp_path / "locked.pem"
    subprocess.run(
        ["openssl", "rsa", "-aes128", "-passout", "pass:secret", "-in", key, "-out", locked],
        capture_output=True, check=True,
    )  # fmt: skip
    for cert_, key_, reason in (
        (str(junk), key, "--tls-cert"),
        (cert, str(junk), "--tls-key"),
        (key, cert, "--tls-cert"),
        (cert, str(locked), "is encrypted"),
        (cert, str(tmp_path), "Is a directory"),
    ):
        with pytest.raises(UserError, match=reason):
            tls_of(cert_, key_)


def started(options, **environ):
    """The command in a process of its own, and the address it says to open."""
    process = subprocess.Popen(
        [sys.executable, "-m", "moshi_ttt.serve", "--port", "0", "--device", "cpu", *options],
        stderr=subprocess.PIPE, text=True, env=os.environ | environ,
    )  # fmt: skip
    lines, deadline = [], time.monotonic() + 120
    assert process.stderr is not None
    while time.monotonic() < deadline and (line := process.stderr.readline()):
        lines.append(line)
        if match := re.match(r"open (https?://[^ ]*)/ \(Ctrl-C ends\)", line):
            return process, match[1], lines
    process.kill()
    raise AssertionError("".join(lines))


def test_a_whole_run(checkpoint, tmp_path):
    """Started, talked to, ended by SIGTERM while somebody talks: told, saved, and status 0."""
    options = ["--checkpoint", checkpoint, "--max-sessions", "2", "--greedy"]
    process, url, lines = started([*options, "--memories", str(tmp_path)])
    try:
        assert f"talking to checkpoint {checkpoint}, on cpu, 2 conversations" in "".join(lines)
        frames = noise(8)
        client = run(talk_until(url, frames, process.terminate))
        assert client.over == "the server stops"
        assert client.last("saved")["seconds"] == pytest.approx(9 * 0.08)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "why=stopped" in err
    assert "Traceback" not in err
    said = np.frombuffer(bytes(client.sound), "<i2").reshape(-1, 1920)
    assert np.array_equal(said, alone(frames)[0])
    assert [(m.name, m.frames) for m in Kept(tmp_path).list()] == [("anna", 9)]


async def talk_until(url, frames, end):
    async with talking(Served(None, url), user="anna", readings=1) as client:
        assert not client.over
        await client.talk(frames)
        end()
        await client.read_to_end()
        return client


def test_a_run_with_https_and_a_token_ended_by_ctrl_c(checkpoint, certificate, monkeypatch):
    """In this process, which has loaded all that takes long."""
    cert, key = certificate
    options = ["--checkpoint", checkpoint, "--max-sessions", "1", "--no-keep", "--host", "0.0.0.0"]
    err = io.StringIO()
    monkeypatch.setenv("MOSHI_TTT_TOKEN", TOKEN)
    monkeypatch.setattr(serve, "open_talker", open_talker)
    monkeypatch.setattr(sys, "stderr", err)

    def talk_and_interrupt():
        try:
            deadline = time.monotonic() + 60
            while not (found := re.search(r"open https://.*:(\d+)/", err.getvalue())):
                assert time.monotonic() < deadline, err.getvalue()
                time.sleep(0.02)
            trusting = ssl.create_default_context(cafile=cert)
            run(over_https(f"https://127.0.0.1:{found[1]}", trusting))
        finally:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with ThreadPoolExecutor(1) as client:
        talked = client.submit(talk_and_interrupt)
        with pytest.raises(SystemExit) as left:
            main(["--port", "0", "--device", "cpu", "--tls-cert", cert, "--tls-key", key, *options])
        talked.result(60)
    assert left.value.code == 130, err.getvalue()
    assert "stopping: conversations are ended and saved" in err.getvalue()
    assert TOKEN not in err.getvalue()


async def over_https(url, context):
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
        async with session.get(f"{url}/api/model") as answer:
            assert answer.status == 401
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        async with session.get(f"{url}/api/model", headers=bearer) as answer:
            assert (await answer.json())["keeps"] is False
        async with session.ws_connect(f"{url}/api/chat?format=pcm&token={TOKEN}") as ws:
            client = Client(ws)
            assert (await ws.receive()).data == b"\0"
            assert len(await client.talk(noise(3))) == 3
