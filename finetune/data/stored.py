"""Codes that `finetune.encode` made: a line of its index, and what it says."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.data.transcript import Word, parse_words
from moshi_ttt.errors import UserError

SILENCE = "silence"
"""The key of a shard's codes of silence, int16 `[1, K, frames of its longest mono file]`."""


@dataclass(frozen=True)
class StoredCodes:
    """Where the codes of a recording are, and what they are.

    Attributes:
        shard: safetensors file; `key` in it is int16 `[channels, codebooks, frames]`.
        key: of the recording, and of its audio.
        file_frames: frames of each of its audio files, in order.
        codebooks: of one side.
        card: codes of a codebook.
        sha1: of the codes.
        codec: fingerprint of the Mimi that made them.
        codec_file: fingerprint of its file, which can be told without loading it.
        mono_side: whose voice it is, where it is mono.
        index: the manifest of codes.
        offset: byte at which the recording's line begins there.
    """

    shard: Path
    key: str
    file_frames: tuple[int, ...]
    codebooks: int
    card: int
    sha1: str
    codec: str
    codec_file: str
    mono_side: str
    index: Path
    offset: int

    @property
    def frames(self) -> int:
        """Length in frames of 80 ms."""
        return sum(self.file_frames)

    def words(self, seconds: float) -> list[Word] | None:
        """The words of its line, read again: an index of thousands of hours is not kept.

        Args:
            seconds: length of the recording.

        Raises:
            UserError: a broken alignment, or the index is another one by now.
        """
        with self.index.open("rb") as file:
            file.seek(self.offset)
            line = file.readline()
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or entry.get("key") != self.key:
            raise UserError(f"{self.index}: it was written anew while it was in use: start again")
        return stored_words(entry, seconds, self.index)


def digest_of(codes: Tensor) -> str:
    """SHA-1 of codes as they are stored."""
    return hashlib.sha1(codes.contiguous().numpy().tobytes()).hexdigest()


def parse_stored(entry: dict[str, Any], index: Path, offset: int) -> StoredCodes:
    """What a line of a manifest of codes says.

    Raises:
        UserError: a value is missing or of another kind.
    """

    def text(name: str) -> str:
        value = entry.get(name)
        if not isinstance(value, str) or not value:
            raise UserError(f"{name} must be text, got {value!r}")
        return value

    def count(name: str) -> int:
        return _positive(name, entry.get(name))

    parts = entry.get("file_frames")
    if not isinstance(parts, list) or not parts:
        raise UserError(f"file_frames must be a list of numbers, got {parts!r}")
    frames = tuple(_positive("file_frames", part) for part in parts)
    if sum(frames) != count("frames"):
        raise UserError(f"frames is {entry['frames']}, but file_frames are {sum(frames)} together")
    if entry.get("mono_side") not in ("moshi", "user"):
        raise UserError(f"mono_side must be 'moshi' or 'user', got {entry.get('mono_side')!r}")
    return StoredCodes(
        index.parent / text("shard"), text("key"), frames, count("codebooks"), count("card"),
        text("sha1"), text("codec"), text("codec_file"), text("mono_side"), index, offset,
    )  # fmt: skip


def stored_words(entry: dict[str, Any], seconds: float, where: object) -> list[Word] | None:
    """The words of a line of a manifest of codes, None where it has no transcript.

    Raises:
        UserError: a broken alignment.
    """
    found = entry.get("alignments")
    return None if found is None else parse_words(found, seconds, where)


def _positive(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} must be a positive whole number, got {value!r}")
    return value
