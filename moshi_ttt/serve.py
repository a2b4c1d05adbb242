"""Moshi for many, in the browser: `python -m moshi_ttt.serve`, then open what it prints.

It is there for this machine alone (127.0.0.1) unless `--host` says otherwise, which takes a token
(`--token-file FILE`, or the environment variable MOSHI_TTT_TOKEN). Browsers give a page of another
machine the microphone only over https: `--tls-cert` and `--tls-key`. moshi's own client connects as
to moshi's own server: `python -m moshi.client --url http://127.0.0.1:8998`.

Ctrl-C, or SIGTERM, ends all conversations and saves their memories.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import logging
import os
import signal
import socket
import ssl
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from moshi_ttt.engine import Engine
from moshi_ttt.errors import Parser, UserError, run_cli
from moshi_ttt.host import Host
from moshi_ttt.kept import Kept
from moshi_ttt.models import (
    add_model_options,
    check_model_options,
    choose_device,
    cpu_threads,
    open_talker,
    sampling_of,
)
from moshi_ttt.monitor import keeps_state, watched_layers
from moshi_ttt.web.app import serving
from moshi_ttt.web.guard import TOKEN_VARIABLE, check_origin, is_loopback, read_token
from moshi_ttt.web.limits import Limits
from moshi_ttt.web.service import Service

_LOG = logging.getLogger("moshi_ttt.serve")
INTERRUPTED = 130
PORT = 8998
_SEND_BUFFER = 1 << 16  # bytes
_MOST_SESSIONS = 1024
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_WATCH_EVERY = 12  # frames, about a second, of a row's memories


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's options.

    Raises:
        UserError: unknown, contradictory or malformed ones.
    """
    p = Parser("python -m moshi_ttt.serve", __doc__)
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    p.add_argument("--port", type=int, default=PORT, help=f"({PORT}; 0: any that is free)")
    p.add_argument("--max-sessions", type=int, default=8, help="conversations at a time (8)")
    p.add_argument("--token-file", metavar="FILE", help=f"with the token (or: {TOKEN_VARIABLE})")
    p.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL",
        help="a site whose pages may connect, beside the server's own; may be repeated",
    )  # fmt: skip
    p.add_argument("--tls-cert", metavar="FILE", help="certificate chain, PEM: serve https")
    p.add_argument("--tls-key", metavar="FILE", help="its private key, PEM")
    p.add_argument(
        "--idle-seconds", type=float, default=60.0, help="without sound until the end (60)"
    )
    p.add_argument("--memories", metavar="FOLDER", help="where memories are kept by name")
    p.add_argument(
        "--max-memories", type=int, metavar="N",
        help=f"memories to keep; beyond them no new name can be taken ({Limits().memories})",
    )  # fmt: skip
    p.add_argument("--no-keep", action="store_true", help="keep nothing, for anyone")
    add_model_options(p)
    args = p.parse_args(argv)
    check_model_options(args)
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port must be 0 to 65535, got {args.port}")
    if not 1 <= args.max_sessions <= _MOST_SESSIONS:
        most = _MOST_SESSIONS
        raise UserError(f"--max-sessions must be 1 to {most}, got {args.max_sessions}")
    if not 1 <= args.idle_seconds <= 86_400:
        raise UserError(f"--idle-seconds must be 1 to 86400, got {args.idle_seconds:g}")
    if (args.tls_cert is None) != (args.tls_key is None):
        raise UserError("--tls-cert and --tls-key go together")
    if args.no_keep and (args.memories is not None or args.max_memories is not None):
        raise UserError("--no-keep keeps nothing: leave out --memories and --max-memories")
    if args.max_memories is None:
        args.max_memories = Limits().memories
    if args.max_memories < 0:
        raise UserError(f"--max-memories must not be negative, got {args.max_memories}")
    args.allow_origin = [check_origin(origin) for origin in args.allow_origin]
    return args


def tls_of(cert: str | None, key: str | None) -> ssl.SSLContext | None:
    """What https needs; None without a certificate.

    Raises:
        UserError: a file cannot be read, or they do not belong together.
    """
    if cert is None or key is None:
        return None

    def encrypted() -> str:
        raise UserError(f"--tls-key {key} is encrypted: give one that is not")

    for option, file in (("--tls-cert", cert), ("--tls-key", key)):
        try:
            Path(file).expanduser().read_bytes()
        except OSError as error:
            raise UserError(f"{option} {file}: {error.strerror}") from error
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(Path(cert).expanduser(), Path(key).expanduser(), encrypted)
    except ssl.SSLError as error:
        reason = (error.reason or "").replace("_", " ").lower() or "they cannot be read"
        raise UserError(f"--tls-cert {cert}, --tls-key {key}: {reason}") from error
    return context


def listen(host: str, port: int, *, token: bool) -> list[socket.socket]:
    """Sockets bound to all addresses of a host; connections are refused until they are served.

    Raises:
        UserError: no such host, the port is taken, or others could connect without a token.
    """
    name = host.removeprefix("[").removesuffix("]")
    try:
        found = socket.getaddrinfo(
            name or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:  # the latter where it can be no name at all
        reason = getattr(error, "strerror", None) or "it is not the name of a host"
        raise UserError(f"--host {host}: {reason}") from error
    addresses = dict.fromkeys((family, address) for family, _, _, _, address in found)
    if not token and not all(is_loopback(str(address[0])) for _, address in addresses):
        raise UserError(
            f"--host {host}: others can connect there, which needs a token: --token-file FILE or "
            f"{TOKEN_VARIABLE}"
        )
    bound: list[socket.socket] = []
    with ExitStack() as stack:
        for family, address in addresses:
            here = port or (bound[0].getsockname()[1] if bound else 0)
            try:
                sock = _bound(family, (address[0], here, *address[2:]))
            except OSError as error:
                # localhost is an address of IPv6 too, on a machine that has none as well
                if error.errno in _NOT_HERE and (bound or address != list(addresses)[-1][1]):
                    continue
                reason = error.strerror
                raise UserError(f"{host} port {here} cannot be listened on: {reason}") from error
            bound.append(stack.enter_context(closing(sock)))
        stack.pop_all()
    return bound


def _bound(family: int, address: tuple[object, ...]) -> socket.socket:
    with ExitStack() as stack:
        sock = stack.enter_context(closing(socket.socket(family, socket.SOCK_STREAM)))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Left alone it grows to megabytes, and a slow client would hear what was said long ago.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        stack.pop_all()
    return sock


def _check_folder(kept: Kept) -> None:
    """See that memories can be kept, before the model is loaded; the folder is made later."""
    there = next(p for p in (kept.folder, *kept.folder.parents) if p.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise UserError(
            f"{there} is not a folder that can be written to, and memories are kept there: choose "
            "another one with --memories, or --no-keep"
        )


def address_of(host: str, sock: socket.socket, *, tls: bool) -> str:
    """What to open in a browser."""
    name = sock.getsockname()[0] if host in ("", "[]") else host
    if name in ("0.0.0.0", "::"):
        name = socket.gethostname()
    bracketed = f"[{name}]" if ":" in name and not name.startswith("[") else name
    return f"http{'s' if tls else ''}://{bracketed}:{sock.getsockname()[1]}/"


async def _serve(
    service: Service, sockets: list[socket.socket], tls: ssl.SSLContext | None, address: str
) -> signal.Signals:
    """Serve until a signal comes; a second one insists.

    Raises:
        KeyboardInterrupt: the second.
    """
    loop = asyncio.get_running_loop()
    came: asyncio.Future[signal.Signals] = loop.create_future()

    def asked(signum: signal.Signals) -> None:
        if came.done():
            raise KeyboardInterrupt
        came.set_result(signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, asked, signum)
    async with serving(service, sockets, tls):
        sys.stderr.write(f"open {address} (Ctrl-C ends)\n")
        signum = await came
        sys.stderr.write("stopping: conversations are ended and saved\n")
    return signum


def _say_failure(host: Host) -> None:
    _LOG.critical("the engine has failed: no conversation goes on", exc_info=host.error)


def run(args: argparse.Namespace) -> int:
    """Do what the command line says.

    Returns:
        The exit status.

    Raises:
        UserError: a mistake of the user's.
    """
    device = choose_device(args.device)
    token = read_token(args.token_file)
    tls = tls_of(args.tls_cert, args.tls_key)
    kept = None if args.no_keep else Kept(args.memories)
    if kept is not None:
        _check_folder(kept)
    with ExitStack() as stack:
        sockets = listen(args.host, args.port, token=token is not None)
        for sock in sockets:
            stack.enter_context(closing(sock))
        talker = open_talker(args.checkpoint, args.base, device)
        torch.set_num_threads(args.threads or cpu_threads(talker.lm))
        layers = list(watched_layers(talker.lm)) if keeps_state(talker.lm) else []
        engine = stack.enter_context(
            Engine(
                talker.lm, talker.mimi, talker.tokenizer,
                sampling=sampling_of(args, talker.gen_config), rows=args.max_sessions,
                seed=args.seed or 0, watch_every=_WATCH_EVERY if layers else None,
            )
        )  # fmt: skip
        host = stack.enter_context(Host(engine, on_failure=lambda: _say_failure(host)))
        service = Service(
            host=host,
            model=talker.name,
            layers=layers,
            kept=kept,
            limits=Limits(idle=args.idle_seconds, memories=args.max_memories),
            token=token,
            origins=args.allow_origin,
        )
        sys.stderr.write(
            f"talking to {talker.name}, on {device}, {args.max_sessions} conversations at a time\n"
        )
        address = address_of(args.host, sockets[0], tls=tls is not None)
        signum = asyncio.run(_serve(service, sockets, tls, address))
    return INTERRUPTED if signum == signal.SIGINT else 0


def main(argv: list[str] | None = None) -> None:
    """The command line.

    Raises:
        SystemExit: status 0 after SIGTERM, 130 after Ctrl-C, 2 after a mistake of the user's.
    """
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    logging.getLogger("moshi_ttt").setLevel(logging.INFO)
    status = 0

    def body() -> None:
        nonlocal status
        status = run(parse(argv))

    try:
        run_cli(body)
    except KeyboardInterrupt:
        status = INTERRUPTED
    sys.exit(status)


if __name__ == "__main__":
    try:
        main()
    finally:  # all is in order: one more Ctrl-C has nothing left to break off
        signal.signal(signal.SIGINT, signal.SIG_IGN)
