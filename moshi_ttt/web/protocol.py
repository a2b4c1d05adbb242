"""Moshi's websocket protocol: the first byte of a message is its kind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moshi_ttt.audio import SAMPLE_RATE

HANDSHAKE, SOUND, TEXT, CONTROL, METADATA, ERROR, PING = range(7)
START, END_TURN, PAUSE, RESTART = range(4)  # of a CONTROL message: the second byte
LEAVING, RULE, TOO_BIG, FAILED, FULL = 1001, 1008, 1009, 1011, 1013  # RFC 6455, section 7.4
RATES = (8_000, 192_000)


class Over(Exception):
    """A conversation ends, or does not begin.

    Args:
        why: a word or two, for the log and the metrics: nothing of what a client sent.
        sentence: for the person; empty where nobody is there to read it.
        code: of the websocket's close.
    """

    def __init__(self, why: str, sentence: str = "", code: int = 1000) -> None:
        super().__init__(why)
        self.why, self.sentence, self.code = why, sentence, code


@dataclass(frozen=True)
class Wishes:
    """What a client asks for in the query of `/api/chat`.

    Attributes:
        format: `"opus"` (Ogg/Opus, 24 kHz, mono) or `"pcm"` (int16, little endian, mono).
        rate: Hz, of the pcm, both ways.
        user: a name, or None.
        kept: start with what is kept for that name, if there is anything.
        incognito: nothing is written.
        readings: metadata messages are wanted.
    """

    format: str = "opus"
    rate: int = SAMPLE_RATE
    user: str | None = None
    kept: bool = True
    incognito: bool = False
    readings: bool = False

    @classmethod
    def of(cls, query: Mapping[str, str]) -> Wishes:
        """Read a query; what moshi's own web client adds (`text_temperature`, ...) is passed over.

        Raises:
            Over: a value that is not one of those possible.
        """

        def one_of(name: str, *choices: str) -> str:
            value = query.get(name, choices[0])
            if value not in choices:
                raise _wrong(f"{name} must be {' or '.join(c or 'nothing' for c in choices)}")
            return value

        form, rate = one_of("format", "opus", "pcm"), query.get("rate", str(SAMPLE_RATE))
        if not (rate.isascii() and rate.isdecimal() and len(rate) < 7):
            raise _wrong("rate must be a whole number of Hz")
        if not RATES[0] <= int(rate) <= RATES[1]:
            raise _wrong(f"rate must be {RATES[0]} to {RATES[1]} Hz")
        if form == "opus" and int(rate) != SAMPLE_RATE:
            raise _wrong(f"rate goes with format=pcm; opus is {SAMPLE_RATE} Hz")
        return cls(
            format=form,
            rate=int(rate),
            user=query.get("user") or None,
            kept=one_of("start", "kept", "new") == "kept",
            incognito=one_of("incognito", "", "0", "1") == "1",
            readings=one_of("readings", "", "0", "1") == "1",
        )


def _wrong(sentence: str) -> Over:
    return Over("query", sentence, RULE)


def message(kind: int, payload: bytes = b"") -> bytes:
    """A message to a client."""
    return bytes([kind]) + payload


def metadata(content: Mapping[str, Any]) -> bytes:
    """A message of metadata; NaN is no JSON, and an error here."""
    return message(METADATA, json.dumps(content, allow_nan=False).encode())


def read_metadata(payload: bytes) -> dict[str, Any]:
    """What a client says in a message of metadata.

    Raises:
        Over: it is not a JSON object.
    """
    try:
        content = json.loads(payload)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        content = None
    if not isinstance(content, dict):
        raise Over("metadata", "a message of metadata was not a JSON object", RULE)
    return content
