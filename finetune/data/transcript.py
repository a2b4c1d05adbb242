"""Word alignments beside a recording: `{"alignments": [[word, [start, end], speaker], ...]}`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from moshi_ttt.errors import UserError

MAIN_SPEAKER = "SPEAKER_MAIN"
"""The label of Moshi's side."""
PAST_END = 0.5
"""Seconds that a word may end after its recording: aligners round, and end late."""


class Word(NamedTuple):
    """A word and when it is said, in seconds from the recording's start."""

    text: str
    start: float
    end: float
    speaker: str


def transcript_path(audio: Path) -> Path:
    """Where the transcript of a recording would be: the same name, ending in .json."""
    return audio.with_suffix(".json")


def read_words(audio: Path, duration: float) -> list[Word] | None:
    """Read the alignments of a recording.

    Words of different speakers may overlap and stand in any order; those of one speaker go by
    start time.

    Args:
        audio: the recording.
        duration: its length in seconds.

    Returns:
        All words, or None if there is no .json beside the recording or none with alignments in it
        (Libri-Light keeps other things there).

    Raises:
        UserError: not JSON, an entry that is not `[word, [start, end], speaker]`, times that are
            negative, end before they start, go back or lie past the end; with file and entry.
    """
    path = transcript_path(audio)
    if not path.is_file():
        return None
    content = _read_json(path)
    if not isinstance(content, dict) or "alignments" not in content:
        return None
    entries = content["alignments"]
    if not isinstance(entries, list):
        raise UserError(f"{path}: 'alignments' is not a list: {_short(entries)}")
    words: list[Word] = []
    last: dict[str, float] = {}
    for index, entry in enumerate(entries):
        where = f"{path}: alignment {index} ({_short(entry)})"
        word = _word(entry, where)
        if word.start < last.get(word.speaker, 0.0):
            raise UserError(
                f"{where} is out of order: it starts before {last.get(word.speaker, 0.0)} s"
            )
        if word.end < word.start:
            raise UserError(f"{where} ends before it starts")
        if word.end > duration + PAST_END:
            raise UserError(f"{where} lies past the end of the recording, {duration:.2f} s")
        last[word.speaker] = word.start
        words.append(word)
    return words


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8: {error}") from error


def _word(entry: Any, where: str) -> Word:
    match entry:
        case [str(text), [int() | float() as start, int() | float() as end], str(speaker)]:
            if not (math.isfinite(start) and math.isfinite(end)):
                raise UserError(f"{where} has a time that is no number")
            return Word(text, float(start), float(end), speaker)
    raise UserError(f"{where} is not [word, [start, end], speaker]")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
