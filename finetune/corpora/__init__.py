"""Corpora that a run can fetch or make for itself; one file each."""

from __future__ import annotations

from collections.abc import Callable

from finetune.corpora import daily_talk, embedded, embedded_base
from moshi_ttt.errors import UserError

CORPORA: dict[str, Callable[[], None]] = {
    "embedded": embedded.prepare,
    "embedded_base": embedded_base.prepare,
    "kyutai/DailyTalkContiguous": daily_talk.prepare,
}
"""`data.corpus` -> what makes its manifests be there; quick where they are."""


def prepare_corpus(name: str | None) -> None:
    """Make a corpus be there.

    Raises:
        UserError: unknown name, or it cannot be fetched.
    """
    if name is None:
        return
    if name not in CORPORA:
        raise UserError(f"data.corpus {name!r} is unknown; known: {', '.join(CORPORA)}")
    CORPORA[name]()
