"""A folder of codes in the making: a file for each recording, then shards and their index.

While recordings are encoded, by any number of processes, each one's codes are a file of their own
under `.parts/`. When none is missing, the codes move into shards in the manifest's order, and the
index is written. So the result does not depend on who encoded what, or on when it was killed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from finetune.data.encoding import read_codes
from finetune.data.manifest import Line, read_lines
from finetune.data.recording import Recording
from finetune.data.stored import SILENCE, digest_of
from moshi_ttt.errors import UserError
from moshi_ttt.files import written_whole

INDEX = "codes.jsonl"
MIB = 1 << 20
Silence = Callable[[int], Tensor]
"""Codes of so many frames of silence, int64 `[1, K, frames]`."""


class ShardFolder:
    """What a folder of codes has, and what it lacks.

    Args:
        folder: made if missing.
        codec: fingerprint of the Mimi.
        codec_file: fingerprint of its file.
        card: codes of each of its codebooks.

    Raises:
        UserError: the folder cannot be made, its index is broken, or a shard is not there.
    """

    def __init__(self, folder: Path, codec: str, codec_file: str, card: int) -> None:
        self.folder, self.codec, self.codec_file, self.card = folder, codec, codec_file, card
        self.parts = folder / ".parts"
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise UserError(f"{folder}: no folder for codes: {error.strerror}") from error
        self.index = folder / INDEX
        self._known: dict[str, dict[str, Any]] = {}
        self._gone: dict[tuple[str, ...], str] = {}
        self._shards = 0
        self._read_index()

    def _read_index(self) -> None:
        """Key of a recording -> its line, as written last; also by name, if its audio is gone."""
        self._known, self._gone, self._shards = {}, {}, 0
        for line in read_lines(self.index) if self.index.exists() else ():
            recording = line.recording()
            stored = recording.stored
            assert stored is not None
            number = stored.shard.stem.rpartition("-")[2]
            self._shards = max(self._shards, 1 + int(number) if number.isdecimal() else 0)
            if stored.codec == self.codec:
                self._known[stored.key] = line.entry
                self._gone[line.names] = stored.key

    def check_same_manifest(self, lines: Sequence[Line]) -> None:
        """See that a manifest has all that the index has.

        Raises:
            UserError: it lacks some: the codes of another manifest would be lost.
        """
        names = {line.names for line in lines}
        there = read_lines(self.index) if self.index.exists() else ()
        others = [line.names for line in there if line.names not in names]
        if others:
            raise UserError(
                f"{self.index} has {len(others)} recordings that {lines[0].manifest} lacks "
                f"(first {others[0][0]!r}): name another folder for other recordings"
            )

    def key(self, line: Line) -> str:
        """What names a recording's codes: its audio files, as long as nobody changes them.

        Names, sizes and times of change count. Audio that is gone keeps the key of its codes.
        """
        files: list[tuple[str, int, int]] = []
        for name, path in zip(line.names, line.paths, strict=True):
            if not path.exists():
                return self._gone.get(line.names) or _hash(self.codec, line.names)
            status = path.stat()
            files.append((name, status.st_size, status.st_mtime_ns))
        return _hash(self.codec, files)

    def part(self, key: str) -> Path:
        """Where the codes of a recording go."""
        return self.parts / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether the codes of a recording are there."""
        return key in self._known or self.part(key).exists()

    def mark_broken(self, key: str, broken: bool = True) -> None:
        """Note that a recording cannot be encoded, or that it is tried again."""
        if broken:
            self._mark(key).touch()
        else:
            self._mark(key).unlink(missing_ok=True)

    def _mark(self, key: str) -> Path:
        return self.parts / f"{key}.broken"

    def finish(
        self, lines: Sequence[Line], mono_side: str, silence: Silence, shard_bytes: int
    ) -> list[str] | None:
        """Write shards and index, if no recording is missing; until then all stays as it is.

        Args:
            lines: the manifest's.
            mono_side: whose voice mono recordings are.
            silence: makes codes of silence.
            shard_bytes: size of codes from which on a shard takes no more.

        Returns:
            `manifest:line` of the broken ones, or None if some are missing.

        Raises:
            UserError: audio or a transcript was changed meanwhile and is broken now.
        """
        with self._locked():  # several may see at once that nothing is missing
            self._read_index()
            keys = [self.key(line) for line in lines]
            there = [(line, k) for line, k in zip(lines, keys, strict=True) if self.has(k)]
            broken = [line.where for line, k in zip(lines, keys, strict=True) if not self.has(k)]
            if not all(self.has(key) or self._mark(key).exists() for key in keys):
                return None
            bar = tqdm(there, desc="reading headers", unit="recording", delay=1)
            opened = [_open(line) for line, _ in bar]
            self._pack(dict.fromkeys(key for _, key in there), silence, shard_bytes)
            with written_whole(self.index) as beside, beside.open("w", encoding="utf-8") as file:
                for (line, key), recording in zip(there, opened, strict=True):
                    entry = _entry(line, self._known[key], recording)
                    entry["mono_side"] = mono_side
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            self._remove_parts({key for key in keys if not self.has(key)})
            return broken

    def _remove_parts(self, broken: set[str]) -> None:
        """All that is packed, left over or a mark; a late rank may be trying a broken one again."""
        for file in self.parts.iterdir():
            key = file.name.lstrip(".").partition(".")[0]
            if key not in broken or file == self._mark(key):
                file.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # goes with the process, however that ends
            for left in self.folder.glob(".codes*.tmp"):  # by one that was killed
                left.unlink()
            yield

    def _pack(self, keys: Collection[str], silence: Silence, shard_bytes: int) -> None:
        batch: dict[str, Tensor] = {}
        quiet = 0  # frames of silence that the shard needs
        for key in tqdm(keys, desc="packing shards", unit="recording", delay=1):
            if key in self._known:
                continue
            found = read_codes(self.part(key))
            if isinstance(found, str):
                self.part(key).unlink()
                raise UserError(f"{self.part(key)} was broken ({found}) and is removed: run again")
            codes = found["codes"]
            frames = found["file_frames"].tolist() if "file_frames" in found else [codes.shape[-1]]
            if batch and sum(t.nbytes for t in batch.values()) + codes.nbytes > shard_bytes:
                self._write(batch, quiet, silence)
                batch, quiet = {}, 0
            batch[key] = codes
            if len(codes) == 1:
                quiet = max(quiet, *frames)
            self._known[key] = {
                "shard": f"codes-{self._shards:05d}.safetensors",
                "key": key,
                "frames": codes.shape[-1],
                "file_frames": frames,
                "channels": len(codes),
                "codebooks": codes.shape[1],
                "card": self.card,
                "codec": self.codec,
                "codec_file": self.codec_file,
                "sha1": digest_of(codes),
            }
        if batch:
            self._write(batch, quiet, silence)

    def _write(self, batch: dict[str, Tensor], quiet: int, silence: Silence) -> None:
        about = {}
        if quiet:
            quietness = silence(quiet).to("cpu", torch.int16).contiguous()
            batch, about = batch | {SILENCE: quietness}, {SILENCE: digest_of(quietness)}
        with written_whole(self.folder / f"codes-{self._shards:05d}.safetensors") as beside:
            save_file(batch, beside, about)
        self._shards += 1


def _hash(codec: str, files: object) -> str:
    return hashlib.sha1(json.dumps([codec, files]).encode()).hexdigest()[:20]


def _open(line: Line) -> Recording | None:
    """The audio as it is now; None if it is gone, as it may when its codes are there."""
    return line.recording() if all(path.exists() for path in line.paths) else None


def _entry(line: Line, known: dict[str, Any], recording: Recording | None) -> dict[str, Any]:
    entry = {"path": line.entry["path"]} | known
    if recording is None:
        return entry
    words = recording.words(known["file_frames"])
    return entry | {
        "duration": recording.duration,
        "speaker": recording.speaker,
        "alignments": None if words is None else [[w[0], [w[1], w[2]], w[3]] for w in words],
    }
