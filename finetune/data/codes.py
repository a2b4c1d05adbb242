"""Codes of whole recordings: Mimi's, made once and kept on disk, or stored by `finetune.encode`."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from moshi.models.compression import MimiModel
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from finetune.data.encoding import (
    Job,
    MakeMimi,
    encode_jobs,
    mimi_fingerprint,
    read_codes,
    write_codes,
)
from finetune.data.recording import AudioFile, Recording
from finetune.data.stored import SILENCE
from finetune.data.stored_checks import Broken, verify_codes
from moshi_ttt.codec import encode_recording
from moshi_ttt.errors import UserError, no_space_left

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Part:
    """Where the codes of one audio file are: `key` in `file`, from frame `offset` on."""

    file: Path
    key: str
    offset: int
    frames: int
    silence: Path
    silence_key: str


class CodesCache:
    """A folder with one safetensors file for the codes of each audio file; serves stored ones too.

    A file's name is the SHA-1 of the audio file and the fingerprint of the codec: audio may move,
    and another Mimi never finds this one's codes. It holds `codes`, int16 `[channels, K, T]`, and
    their SHA-1. Files are written beside and renamed, so one with a cache's name is whole. The
    codes of a manifest of codes are read from its shards; nothing of them goes into the folder.

    Args:
        folder: made if missing, unless `mimi` is None.
        mimi: the codec, K codebooks a side; None if all recordings are stored codes.
        load_mimi: makes the same codec in another process, e.g. `CheckpointInfo.get_mimi`; needed
            for more than one worker. It has to be picklable.
        mono_side: whose voice a mono recording is, `"moshi"` or `"user"`; the other side is the
            codes of silence.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        mimi: MimiModel | None,
        *,
        load_mimi: MakeMimi | None = None,
        mono_side: str = "moshi",
    ) -> None:
        if mono_side not in ("moshi", "user"):
            raise ValueError(f"mono_side must be 'moshi' or 'user', got {mono_side!r}")
        self.folder = Path(folder)
        self.mimi = mimi
        self.load_mimi = load_mimi
        self.mono_side = mono_side
        self.fingerprint = None if mimi is None else mimi_fingerprint(mimi)
        self._files: dict[Path, Path] = {}
        if mimi is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if no_space_left(error):
                raise
            raise UserError(f"{self.folder}: no folder for codes: {error.strerror}") from error

    def file(self, audio: Path) -> Path:
        """Where the codes of an audio file are or will be; reads the audio once to hash it.

        Raises:
            ValueError: there is no codec.
        """
        if self.fingerprint is None:
            raise ValueError(f"{audio} is audio, and its codes need a codec: mimi is None")
        if audio not in self._files:
            digest = hashlib.sha1()
            with audio.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
            name = f"{digest.hexdigest()}-{self.fingerprint[:12]}.safetensors"
            self._files[audio] = self.folder / name
        return self._files[audio]

    def prepare(
        self, recordings: Sequence[Recording], workers: int = 1, broken: Broken | None = None
    ) -> int:
        """Encode what is not there yet; a broken file is made again, and that is said.

        Stored codes are read once and compared with their SHA-1.

        Args:
            recordings: any; each different audio file is encoded once.
            workers: processes, each with one thread and its own codec.
            broken: called with every recording that cannot be read, and why; the others are
                prepared. None raises at the first.

        Returns:
            How many files were encoded.

        Raises:
            UserError: broken audio, named with its line in the manifest, or a worker that was
                killed; what was encoded before stays. Stored codes that are broken, of another
                codec, or whose mono side is another.
            ValueError: several workers and no `load_mimi`; audio and no codec.
        """
        verify_codes(recordings, self.fingerprint, self.mono_side, broken)
        missing: dict[Path, Job] = {}
        readers: dict[Path, list[Recording]] = {}
        for recording in recordings:
            for audio in recording.files:
                file = self.file(audio.path)
                readers.setdefault(file, []).append(recording)
                if file not in missing and _read_frames(file) is None:
                    missing[file] = Job(file, (audio,), recording.where)
        lost: set[Path] = set()
        if missing:
            assert self.mimi is not None
            jobs = list(missing.values())
            # tqdm warns when rounding carries the sum past the total
            total = sum(job.seconds for job in jobs) / 60 + 1e-6
            bar = "{l_bar}{bar}| {n:.1f}/{total:.1f} min [{elapsed}<{remaining}]"
            with tqdm(total=total, desc="encoding", bar_format=bar) as progress:
                for job, error in encode_jobs(jobs, self.mimi, self.load_mimi, workers):
                    if error is not None:
                        if broken is None:
                            raise error
                        lost.add(job.target)
                        for recording in readers[job.target]:
                            broken(recording, error)
                    progress.update(job.seconds / 60)
        mono = [file for r in recordings if r.channels == 1 for file in r.files]
        self._prepare_silence([file for file in mono if self.file(file.path) not in lost])
        return len(missing) - len(lost)

    def _silence_file(self) -> Path:
        return self.folder / f"silence-{str(self.fingerprint)[:12]}.safetensors"

    def _prepare_silence(self, mono: Sequence[AudioFile]) -> None:
        # the codec is causal: the codes of a shorter silence are the beginning of a longer one's
        needed = max((_frames(self.file(file.path)) for file in mono), default=0)
        if needed > (_read_frames(self._silence_file()) or 0):
            assert self.mimi is not None
            pcm = torch.zeros(1, needed * self.mimi.frame_size)
            write_codes(self._silence_file(), [encode_recording(self.mimi, pcm)])

    def file_frames(self, recording: Recording) -> tuple[int, ...]:
        """Frames of 80 ms of each file of a prepared recording; a last one may be part zeros."""
        if recording.stored is not None:
            return recording.stored.file_frames
        return tuple(_frames(self.file(file.path)) for file in recording.files)

    def identity(self, recording: Recording) -> str:
        """What tells a prepared recording's codes from others', wherever its files lie."""
        if recording.stored is not None:
            return recording.stored.sha1
        return " ".join(self.file(audio.path).stem for audio in recording.files)

    def frames(self, recording: Recording) -> int:
        """Length of a prepared recording in frames of 80 ms."""
        return sum(self.file_frames(recording))

    def load(self, recording: Recording, start: int = 0, stop: int | None = None) -> Tensor:
        """Codes of frames `start` to `stop` of a prepared recording.

        The files of a recording follow each other; each was encoded, as its silence is, from a
        fresh codec.

        Returns:
            int16 `[2K, stop - start]`: K rows of Moshi's side (left), K of the user's (right).
        """
        spans: list[tuple[_Part, int, int]] = []
        before = 0
        for part in self._parts(recording):
            end = part.frames if stop is None else min(stop - before, part.frames)
            spans.append((part, max(start - before, 0), end))
            before += part.frames
        wanted = [span for span in spans if span[1] < span[2]] or [(spans[0][0], 0, 0)]
        return torch.cat([self._sides(*span) for span in wanted], dim=-1)

    def _parts(self, recording: Recording) -> Iterator[_Part]:
        offset = 0
        if (stored := recording.stored) is not None:
            for frames in stored.file_frames:
                yield _Part(stored.shard, stored.key, offset, frames, stored.shard, SILENCE)
                offset += frames
            return
        for file, frames in zip(recording.files, self.file_frames(recording), strict=True):
            yield _Part(self.file(file.path), "codes", 0, frames, self._silence_file(), "codes")

    def _sides(self, part: _Part, begin: int, end: int) -> Tensor:
        sides = list(_read(part.file, part.key, part.offset + begin, part.offset + end))
        if len(sides) == 1:
            sides += _read(part.silence, part.silence_key, begin, end)
            if self.mono_side == "user":
                sides.reverse()
        return torch.cat(sides)


def _read(file: Path, key: str, start: int, stop: int) -> Tensor:
    with safe_open(file, "pt") as stored:
        return stored.get_slice(key)[:, :, start:stop]


def _frames(file: Path) -> int:
    with safe_open(file, "pt") as stored:
        return stored.get_slice("codes").get_shape()[-1]


def _read_frames(file: Path) -> int | None:
    """Frames in a cache file that is whole, else None."""
    if not file.exists():
        return None
    found = read_codes(file)
    if isinstance(found, str):
        log.warning("%s is broken (%s): made again", file, found)
        return None
    return found["codes"].shape[-1]
