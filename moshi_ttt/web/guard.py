"""Who may ask the server for something: the token, and the pages of other sites.

A browser sends what any page tells it to, to this machine too. So a request that comes from another
site's page is refused, and, where no token protects the server, one whose name for it is not that
of this machine (a site can let its own name point here).
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
import stat
import sys
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web

from moshi_ttt.errors import UserError
from moshi_ttt.web.limits import Bucket

TOKEN_VARIABLE = "MOSHI_TTT_TOKEN"
_SHORTEST = 16
_ATTEMPTS, _ATTEMPT_RATE = 10.0, 0.1  # wrong tokens an address may send at once, and a second
_MOST_ADDRESSES = 4096
_MAKE_ONE = "python -c 'import secrets; print(secrets.token_urlsafe())'"
_OPEN = ("/", "/health", "/favicon.ico")
_HOST = re.compile(r"(?:\[([^\]]*)\]|([^:\[\]]*))(?::\d*)?")
_PORTS = {"http": 80, "https": 443}  # which browsers leave out


def read_token(file: str | None) -> str | None:
    """The token that clients have to send: of a file, or of the environment; None is none.

    Raises:
        UserError: both are given, the file cannot be read, or what is there is no token.
    """
    given = os.environ.get(TOKEN_VARIABLE)
    if file is None:
        return None if given is None else _checked(given, TOKEN_VARIABLE)
    if given is not None:
        raise UserError(f"--token-file and {TOKEN_VARIABLE} are both given: leave out one")
    path = Path(file).expanduser()
    try:
        token, mode = path.read_text("ascii"), path.stat().st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not plain text"
        raise UserError(f"--token-file {file}: {reason}") from error
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        sys.stderr.write(f"{file} can be read by others on this machine: chmod 600 it\n")
    return _checked(token.strip(), f"--token-file {file}")


def _checked(token: str, source: str) -> str:
    if len(token) < _SHORTEST or not all("!" <= c <= "~" for c in token):
        raise UserError(
            f"{source} has {len(token)} characters; a token has at least {_SHORTEST}, letters, "
            f"digits and signs without spaces: {_MAKE_ONE}"
        )
    return token


def check_origin(origin: str) -> str:
    """An origin as browsers send it.

    Raises:
        UserError: it is not `https://name` or `http://name`, with a port or without.
    """
    given = origin.lower()
    wrong = f"--allow-origin {origin}: give https://name, or https://name:port"
    try:
        parts = urlsplit(given)
        port = parts.port
    except ValueError as error:
        raise UserError(wrong) from error
    known = parts.scheme in _PORTS and parts.hostname and "@" not in parts.netloc
    if not known or given != f"{parts.scheme}://{parts.netloc}":
        raise UserError(wrong)
    return given.removesuffix(f":{port}") if port == _PORTS[parts.scheme] else given


class Guard:
    """Refuses what should not be asked.

    Args:
        token: that clients have to send; None is none.
        origins: whose pages may ask, beside the server's own.
        refused: told why, in a word, each time.
    """

    def __init__(
        self, token: str | None, origins: Sequence[str], refused: Callable[[str], object]
    ) -> None:
        self._token = None if token is None else sha256(token.encode()).digest()
        self._origins, self._refused = frozenset(origins), refused
        self._hosts = frozenset(urlsplit(origin).netloc for origin in origins)
        self._attempts: dict[str, Bucket] = {}

    @property
    def wants_token(self) -> bool:
        """Whether a token has to be sent."""
        return self._token is not None

    def check(self, request: web.Request) -> None:
        """Let a request pass.

        Raises:
            HTTPException: 403, it is another site's; 401 or 429, the token is missing or wrong.
        """
        origin = request.headers.get("Origin", "").lower()
        # not aiohttp's, which asks a name server, and waits, where a request names no host
        host = request.headers.get("Host", "").lower()
        if origin and origin not in {*self._origins, f"{request.scheme}://{host}"}:
            raise self._no("origin", web.HTTPForbidden, "pages of other sites may not ask this")
        site = request.headers.get("Sec-Fetch-Site", "none")
        if not origin and site not in ("none", "same-origin") and not _is_open(request):
            raise self._no("origin", web.HTTPForbidden, "pages of other sites may not ask this")
        if self._token is None:
            if not is_loopback(_name_of(host)) and host not in self._hosts:
                raise self._no(
                    "host", web.HTTPForbidden,
                    "this server is for its own machine: open it as http://localhost:PORT, or "
                    "start it with a token",
                )  # fmt: skip
        elif not _is_open(request):
            self._check_token(request)

    def _check_token(self, request: web.Request) -> None:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            # a browser's WebSocket cannot send a header
            given = request.query.get("token", "") if request.path == "/api/chat" else ""
        if not given:
            raise self._no("no token", web.HTTPUnauthorized, "a token is needed")
        attempts = self._attempts.setdefault(
            _network_of(request.remote or ""), Bucket(_ATTEMPT_RATE, _ATTEMPTS)
        )
        if not attempts.take():
            raise self._no(
                "attempts", web.HTTPTooManyRequests,
                f"too many wrong tokens: wait {1 / _ATTEMPT_RATE:.0f} seconds",
            )  # fmt: skip
        digest = sha256(given.strip().encode(errors="surrogatepass")).digest()
        if not hmac.compare_digest(digest, self._token or b""):
            self._forget()
            raise self._no("token", web.HTTPUnauthorized, "the token is wrong")
        attempts.take(-1)

    def _no(self, why: str, kind: type[web.HTTPException], sentence: str) -> web.HTTPException:
        self._refused(why)
        return kind(text=sentence)

    def _forget(self) -> None:
        """Addresses are forgotten once their time is over, or, where too many came, the oldest."""
        if len(self._attempts) > _MOST_ADDRESSES:
            kept = {a: b for a, b in self._attempts.items() if not b.full}
            self._attempts = dict(list(kept.items())[-_MOST_ADDRESSES // 2 :])


def is_loopback(name: str) -> bool:
    """Whether a name or address is that of this machine, seen from itself."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.lower().rstrip(".") in ("localhost", "ip6-localhost")


def _name_of(host: str) -> str:
    """The name in a Host header, without its port; empty if it is none."""
    found = _HOST.fullmatch(host)
    return "" if found is None else found[1] or found[2] or ""


def _network_of(address: str) -> str:
    """An address; of IPv6, the part that one customer has many of is cut off."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    return address if ip.version == 4 else str(ipaddress.ip_network((int(ip) >> 64 << 64, 64)))


def _is_open(request: web.Request) -> bool:
    """What needs no token: the page itself, which asks for one, and whether the server is there."""
    return request.path in _OPEN or request.path.startswith("/page/")
