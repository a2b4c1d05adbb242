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


class Beside(NamedTuple):
    """What the json beside an audio file says; None is nothing."""

    words: list[Word] | None
    speaker: str | None


def read_words(audio: Path, duration: float) -> list[Word] | None:
    """The words of `read_beside`."""
    return read_beside(audio, duration).words


def read_beside(audio: Path, duration: float) -> Beside:
    """Read the json beside an audio file: its `alignments` and its `speaker`, where it has them.

    Words of different speakers may overlap and stand in any order; those of one speaker go by
    start time.

    Args:
        audio: the recording.
        duration: its length in seconds.

    Returns:
        All words, or None if there is no .json beside the recording or none with alignments in it
        (Libri-Light keeps other things there); and who speaks.

    Raises:
        UserError: not JSON, an entry that is not `[word, [start, end], speaker]`, times that are
            negative, end before they start, go back or lie past the end; with file and entry.
    """
    content = _beside(audio)
    words = None
    if "alignments" in content:
        words = parse_words(content["alignments"], duration, transcript_path(audio))
    return Beside(words, _speaker(content))


def read_speaker(audio: Path) -> str | None:
    """The `speaker` of the json beside an audio file, if there is one and it says.

    Raises:
        UserError: it is not JSON.
    """
    return _speaker(_beside(audio))


def parse_words(entries: Any, duration: float, file: object) -> list[Word]:
    """Check alignments as they stand in JSON; `file` says where that was.

    Raises:
        UserError: as `read_beside`.
    """
    if not isinstance(entries, list):
        raise UserError(f"{file}: 'alignments' is not a list: {_short(entries)}")
    words: list[Word] = []
    last: dict[str, float] = {}
    for index, entry in enumerate(entries):
        where = f"{file}: alignment {index} ({_short(entry)})"
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


def _beside(audio: Path) -> dict[str, Any]:
    path = transcript_path(audio)
    content = _read_json(path) if path.is_file() else None
    return content if isinstance(content, dict) else {}


def _speaker(content: dict[str, Any]) -> str | None:
    speaker = content.get("speaker")
    return None if speaker is None else str(speaker)


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
