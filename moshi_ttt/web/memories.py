"""`/api/memories/NAME`: what is kept for a name, told, given away and deleted."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import quote

from aiohttp import web

from moshi_ttt.errors import UserError
from moshi_ttt.kept import Kept, KeptMemory
from moshi_ttt.web.remember import for_clients
from moshi_ttt.web.service import SERVICE

_PIECE, _PIECE_SECONDS = 1 << 18, 60.0  # bytes, and how long a client may take for them
_NOTHING = "nothing is kept for that name"

T = TypeVar("T")


async def find(request: web.Request) -> web.Response:
    """`GET`: when it was saved and how long it has lived."""
    found = await _found(request)
    return web.json_response(
        {"name": found.name, "saved": found.saved, "seconds": found.seconds, "size": found.size}
    )


async def delete(request: web.Request) -> web.Response:
    """`DELETE`: remove it, unless a conversation has the name."""
    kept, found = _kept(request), await _found(request)
    await _in_thread(kept, lambda: kept.delete(found.name), web.HTTPConflict)
    return web.Response(status=204)


async def export(request: web.Request) -> web.StreamResponse:
    """`GET .../export`: its file, as it is now: a save that comes meanwhile makes another."""
    found = await _found(request)
    name = quote(f"{found.name}{found.path.suffix}", safe="")
    response = web.StreamResponse(
        headers={
            "Content-Type": "application/octet-stream",
            "Content-Disposition": f"attachment; filename*=UTF-8''{name}",
        }
    )
    try:
        file = await asyncio.to_thread(found.path.open, "rb")
    except FileNotFoundError as error:
        raise web.HTTPNotFound(text=_NOTHING) from error
    with file:
        response.content_length = os.fstat(file.fileno()).st_size
        try:
            await response.prepare(request)
            while piece := await asyncio.to_thread(file.read, _PIECE):
                await asyncio.wait_for(response.write(piece), _PIECE_SECONDS)
        except (ConnectionError, asyncio.TimeoutError):
            if request.transport is not None:
                request.transport.abort()
    return response


async def _found(request: web.Request) -> KeptMemory:
    kept, name = _kept(request), request.match_info["name"]
    found = await _in_thread(kept, lambda: kept.find(name), web.HTTPBadRequest)
    if found is None:
        raise web.HTTPNotFound(text=_NOTHING)
    return found


def _kept(request: web.Request) -> Kept:
    kept = request.app[SERVICE].kept
    if kept is None:
        raise web.HTTPNotFound(text="this server keeps nothing")
    return kept


async def _in_thread(kept: Kept, do: Callable[[], T], kind: type[web.HTTPException]) -> T:
    """Do what waits for a disk; the user's mistake is the answer."""
    try:
        return await asyncio.to_thread(do)
    except UserError as error:
        raise kind(text=for_clients(error, kept)) from error
