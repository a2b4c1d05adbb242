"""What a kept memory can be called: nothing that leaves its folder, and one form for one name."""

from __future__ import annotations

import unicodedata

from moshi_ttt.errors import UserError

MOST_CHARACTERS, MOST_BYTES = 64, 200
_ALSO = "-_. "


def check_name(name: str) -> str:
    """The form of a name that its file has: NFC, without case, single spaces.

    Raises:
        UserError: it is no name that a memory can have, and why.
    """
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())
    folded = " ".join(part for part in folded.split(" ") if part)
    shown = repr(name if len(name) <= MOST_CHARACTERS else f"{name[:MOST_CHARACTERS]}...")
    if not folded:
        raise UserError("a name must not be empty")
    if bad := [c for c in folded if not (_of_a_word(c) or c in _ALSO)]:
        raise UserError(
            f"the name {shown} has {bad[0]!r} in it; letters, digits, '-', '_', '.' and spaces "
            "are allowed"
        )
    if not folded[0].isalnum():
        raise UserError(f"the name {shown} must begin with a letter or a digit")
    if len(folded) > MOST_CHARACTERS or len(folded.encode()) > MOST_BYTES:
        raise UserError(
            f"the name {shown} is too long: {len(folded)} characters, {len(folded.encode())} bytes "
            f"of UTF-8; at most {MOST_CHARACTERS} and {MOST_BYTES} are allowed"
        )
    return folded


def _of_a_word(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] in "LM" or category == "Nd"  # many scripts write vowels as marks
