"""The routes, and what is the same for all of them."""

from __future__ import annotations

import asyncio
import logging
import mimetypes
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from socket import socket
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler
from aiohttp.web_protocol import RequestHandler

from moshi_ttt.web.chat import chat
from moshi_ttt.web.memories import delete, export, find
from moshi_ttt.web.metrics import CONTENT_TYPE
from moshi_ttt.web.service import SERVICE, Service

PAGE = Path(__file__).parent / "page"
_GOODBYE_SECONDS = 30.0
_HANDSHAKE_SECONDS = 10.0
_LINGER_SECONDS = 1.0  # for the rest of a body that nobody wants
_BACKLOG = 32
_BODY = 1024  # bytes; no request here has one
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_TYPES = {".js": "text/javascript", ".svg": "image/svg+xml"}  # not what the system's tables say


def make_app(service: Service) -> web.Application:
    """The application of a service."""

    @web.middleware
    async def door(request: web.Request, handler: Handler) -> web.StreamResponse:
        return await service.door.pass_through(request, handler)

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        service.guard.check(request)
        return await handler(request)

    async def goodbye(app: web.Application) -> None:
        service.stop()
        for _ in range(int(_GOODBYE_SECONDS * 20)):
            if not service.guests:
                return
            await asyncio.sleep(0.05)

    app = web.Application(middlewares=[door, _plain_errors, guard], client_max_size=_BODY)
    app[SERVICE] = service
    # aiosignal declares what it would be as a decorator
    app.on_shutdown.append(goodbye)  # pyright: ignore[reportArgumentType]
    app.on_response_prepare.append(_add_headers)  # pyright: ignore[reportArgumentType]
    app.router.add_get("/health", _health)
    app.router.add_get("/metrics", _metrics)
    app.router.add_get("/api/model", _model)
    app.router.add_get("/api/chat", chat)
    app.router.add_get("/api/memories/{name}", find)
    app.router.add_delete("/api/memories/{name}", delete)
    app.router.add_get("/api/memories/{name}/export", export)
    for path, response in _page(PAGE).items():
        app.router.add_get(path, response)
    return app


@asynccontextmanager
async def serving(
    service: Service, sockets: list[socket], tls: ssl.SSLContext | None = None
) -> AsyncIterator[None]:
    """Answer on sockets that are bound, while the body runs; then all conversations end, saved."""
    log = logging.getLogger("moshi_ttt.web.http")
    log.addFilter(_is_ours)
    runner = web.AppRunner(
        make_app(service), access_log=None, logger=log, lingering_time=_LINGER_SECONDS
    )
    await runner.setup()
    service.door.server = runner.server
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_unless_no_request)
    handshake = None if tls is None else _HANDSHAKE_SECONDS
    servers = [
        await loop.create_server(
            service.door, sock=sock, ssl=tls, backlog=_BACKLOG, ssl_handshake_timeout=handshake
        )
        for sock in sockets
    ]
    watch = asyncio.ensure_future(service.door.watch())
    try:
        yield
    finally:
        watch.cancel()
        for server in servers:
            server.close()
        await runner.cleanup()


def _is_ours(record: logging.LogRecord) -> bool:
    """Requests that are no HTTP are answered, and are nothing to log."""
    return record.exc_info is None or not isinstance(record.exc_info[1], HttpProcessingError)


def _unless_no_request(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Aiohttp raises on some addresses that are none (`http://[`); asyncio closes the socket."""
    of_request = isinstance(context.get("protocol"), RequestHandler)
    if not (of_request and isinstance(context.get("exception"), ValueError)):
        loop.default_exception_handler(context)


@web.middleware
async def _plain_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What is refused is said in a sentence, as JSON."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
        return web.json_response({"error": error.text}, status=error.status, headers=headers)


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_HEADERS)
    response.headers.setdefault("Cache-Control", "no-store")
    if "Server" in response.headers:
        del response.headers["Server"]


async def _health(request: web.Request) -> web.Response:
    """`GET /health`: whether conversations can be had; with a token, nothing but that."""
    service = request.app[SERVICE]
    ok = service.host.failed is None and not service.stopping
    said: dict[str, object] = {"ok": ok}
    if not service.guard.wants_token:
        said |= {"sessions": service.host.taken, "rows": service.host.capacity}
        said |= {"reason": service.host.failed}
    return web.json_response(said, status=200 if ok else 503)


async def _metrics(request: web.Request) -> web.Response:
    text = request.app[SERVICE].metrics.text()
    return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE})


async def _model(request: web.Request) -> web.Response:
    return web.json_response(request.app[SERVICE].about())


def _page(folder: Path) -> dict[str, Handler]:
    """A handler for each file of the page, read now: what is not among them is not there."""

    def answer(path: Path) -> Handler:
        body = path.read_bytes()
        kind = _TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0]
        tag = sha256(body).hexdigest()[:16]

        async def handler(request: web.Request) -> web.StreamResponse:
            response = web.Response(body=body, content_type=kind or "application/octet-stream")
            if kind is not None and kind.startswith("text/"):
                response.charset = "utf-8"
            response.etag = tag
            response.headers["Cache-Control"] = "no-cache"
            if request.if_none_match and any(t.value == tag for t in request.if_none_match):
                return web.Response(status=304, headers={"ETag": f'"{tag}"'})
            return response

        return handler

    files = {f"/page/{p.name}": answer(p) for p in sorted(folder.glob("[!.]*")) if p.is_file()}
    if "/page/index.html" in files:
        files["/"] = files["/page/index.html"]
    return files
