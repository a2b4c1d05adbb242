"""Manifests: jsonl files of `{"path", "duration"}`, as moshi-finetune has them."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.transcript import read_words
from moshi_ttt.audio import audio_info
from moshi_ttt.errors import UserError

DURATION_TOLERANCE = 0.1
"""Seconds that a manifest's duration may differ from the audio's own."""


@dataclass(frozen=True)
class Recording:
    """One line of a manifest, its audio's header checked.

    Attributes:
        path: the audio file.
        duration: seconds, from the audio's header.
        channels: 1 or 2 (left Moshi, right user).
        where: `manifest:line`, for messages.
    """

    path: Path
    duration: float
    channels: int
    where: str


@dataclass(frozen=True)
class Source:
    """A manifest's recordings and its weight in the mix; weights count against each other."""

    path: Path
    weight: float
    recordings: tuple[Recording, ...]


def read_sources(text: str) -> list[Source]:
    """Read and check all manifests of `"a.jsonl:weight,b.jsonl"`; see `read_manifest`.

    Args:
        text: manifests with their weights, 1 where none is given. A folder stands for all its
            .jsonl files, each with that weight.

    Raises:
        UserError: nothing named, a weight not above 0, a manifest named twice or not there, and
            whatever is wrong in one.
    """
    return [Source(path, w, tuple(read_manifest(path))) for path, w in _parse_sources(text)]


def _parse_sources(text: str) -> list[tuple[Path, float]]:
    sources: list[tuple[Path, float]] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, colon, tail = item.rpartition(":")
        if not colon:
            name, tail = item, "1"
        try:
            weight = float(tail)
        except ValueError:  # the colon belongs to the path
            name, weight = item, 1.0
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"data source {item!r}: the weight must be positive, got {tail}")
        path = Path(name)
        found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not found:
            raise UserError(f"data source {item!r}: the folder {path} has no .jsonl file")
        for manifest in found:
            if not manifest.is_file():
                raise UserError(f"data source {item!r}: no such manifest: {manifest}")
            if manifest in [path for path, _ in sources]:
                raise UserError(f"data source {item!r}: {manifest} is named twice")
            sources.append((manifest, weight))
    if not sources:
        raise UserError(f"no data source in {text!r}: name a manifest (jsonl)")
    return sources


def read_manifest(path: str | os.PathLike[str]) -> list[Recording]:
    """Read a manifest and check all that can be checked without decoding audio.

    Relative paths start at the manifest's folder. Headers of the audio and whole transcripts are
    read; samples are not.

    Raises:
        UserError: naming file and line: not JSON, no path, no such file, a duration that is
            negative, no number or more than 0.1 s off, an audio file or transcript that is broken,
            a manifest without recordings.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such manifest")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8: {error}") from error
    recordings = [
        _recording(line, f"{path}:{number}", path.parent)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not recordings:
        raise UserError(f"{path}: no recordings in this manifest")
    return recordings


def _recording(line: str, where: str, folder: Path) -> Recording:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg}): {line.strip()[:60]!r}") from error
    name = entry.get("path") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: no path in {line.strip()[:60]!r}")
    audio = folder / name
    try:
        info = audio_info(audio)
        _check_duration(entry.get("duration"), info.duration, name)
        read_words(audio, info.duration)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return Recording(audio, info.duration, info.channels, where)


def _check_duration(said: Any, real: float, name: str) -> None:
    number = isinstance(said, (int, float)) and not isinstance(said, bool) and math.isfinite(said)
    if not number or said <= 0:
        raise UserError(f"duration of {name!r} must be a positive number of seconds, got {said!r}")
    if abs(said - real) > DURATION_TOLERANCE:
        raise UserError(f"duration of {name!r} is {said}, but the audio has {real:.3f} s")
