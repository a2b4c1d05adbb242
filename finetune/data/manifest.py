"""Manifests: jsonl of `{"path", "duration"}`, as moshi-finetune has them, or of stored codes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.interleaver import FRAME_RATE
from finetune.data.recording import Recording, name_of, open_audio
from finetune.data.stored import parse_stored, stored_words
from moshi_ttt.errors import UserError

DURATION_TOLERANCE = 0.1
"""Seconds that a manifest's duration may differ from the audio's own."""


@dataclass(frozen=True)
class Source:
    """A manifest's recordings and its weight in the mix; weights count against each other."""

    path: Path
    weight: float
    recordings: tuple[Recording, ...]


@dataclass(frozen=True)
class Line:
    """A line of a manifest, nothing but its JSON checked.

    Attributes:
        manifest: the file.
        where: `manifest:line`.
        offset: byte at which it begins.
        entry: the object.
        names: its audio files as it has them.
    """

    manifest: Path
    where: str
    offset: int
    entry: dict[str, Any]
    names: tuple[str, ...]

    @property
    def paths(self) -> tuple[Path, ...]:
        """The audio files; relative ones start at the manifest's folder."""
        return tuple(self.manifest.parent / name for name in self.names)

    def recording(self) -> Recording:
        """Check all that can be checked without decoding audio or reading codes.

        Raises:
            UserError: see `read_manifest`.
        """
        try:
            speaker = self.entry.get("speaker")
            if not (speaker is None or isinstance(speaker, str)):
                raise UserError(f"speaker must be text, got {speaker!r}")
            if "shard" in self.entry:
                return self._stored(speaker)
            found = open_audio(self.paths, self.where, speaker)
            _check_duration(self.entry.get("duration"), found.duration, " + ".join(self.names))
        except UserError as error:
            raise UserError(f"{self.where}: {error}") from error
        return found

    def _stored(self, speaker: str | None) -> Recording:
        stored = parse_stored(self.entry, self.manifest, self.offset)
        seconds, name = stored.frames / FRAME_RATE, name_of(self.names)
        channels = self.entry.get("channels")
        if channels not in (1, 2):
            raise UserError(f"channels must be 1 or 2, got {channels!r}")
        # each file's last frame may be part zeros
        tolerance = DURATION_TOLERANCE * len(stored.file_frames)
        duration = _check_duration(self.entry.get("duration"), seconds, name, tolerance)
        if not stored.shard.is_file():
            raise UserError(f"{stored.shard}: no such file of codes")
        stored_words(self.entry, seconds, "its transcript")
        return Recording(name, duration, channels, self.where, (), stored, speaker)


def read_sources(text: str) -> list[Source]:
    """Read and check all manifests of `"a.jsonl:weight,b.jsonl"`; see `read_manifest`.

    Args:
        text: manifests with their weights, 1 where none is given. A folder stands for all its
            .jsonl files, each with that weight.

    Raises:
        UserError: nothing named, a weight not above 0, a manifest named twice or not there, and
            whatever is wrong in one.
    """
    return [Source(path, w, tuple(read_manifest(path))) for path, w in parse_sources(text)]


def parse_sources(text: str) -> list[tuple[Path, float]]:
    """The manifests that a text names and their weights, not read; see `read_sources`.

    Raises:
        UserError: nothing named, a weight not above 0, a manifest named twice or not there.
    """
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
    """Read a manifest and check all that can be checked without decoding audio or reading codes.

    Relative paths start at the manifest's folder. Headers of the audio and whole transcripts are
    read; samples are not.

    Raises:
        UserError: naming file and line: not JSON, no path, no such file, a duration that is
            negative, no number or more than 0.1 s off, an audio file or transcript that is broken,
            files of one recording that differ in channels, a manifest without recordings.
    """
    recordings = [line.recording() for line in read_lines(path)]
    if not recordings:
        raise UserError(f"{path}: no recordings in this manifest")
    return recordings


def read_lines(path: str | os.PathLike[str]) -> Iterator[Line]:
    """The lines of a manifest that are not empty, one after another.

    Raises:
        UserError: no such file, or a line that is not a JSON object in UTF-8 with a path.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such manifest")
    with path.open("rb") as file:
        offset = 0
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                where = f"{path}:{number}"
                entry = _parse(raw, where)
                yield Line(path, where, offset, entry, _names(entry, where))
            offset += len(raw)


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    try:
        line = raw.decode().strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not text in UTF-8: {error}") from error
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg}): {line[:60]!r}") from error
    if not isinstance(entry, dict):
        raise UserError(f"{where}: no path in {line[:60]!r}")
    return entry


def _names(entry: dict[str, Any], where: str) -> tuple[str, ...]:
    path = entry.get("path")
    found = path if isinstance(path, list) else [path]
    names = tuple(name for name in found if isinstance(name, str) and name)
    if not names or len(names) < len(found):
        raise UserError(f"{where}: no path in {json.dumps(entry, ensure_ascii=False)[:60]!r}")
    return names


def _check_duration(
    said: Any, real: float, name: str, tolerance: float = DURATION_TOLERANCE
) -> float:
    number = isinstance(said, (int, float)) and not isinstance(said, bool) and math.isfinite(said)
    if not number or said <= 0:
        raise UserError(f"duration of {name!r} must be a positive number of seconds, got {said!r}")
    if abs(said - real) > tolerance:
        raise UserError(f"duration of {name!r} is {said}, but the audio has {real:.3f} s")
    return float(said)
