"""Mimi's codes of whole recordings, made once and kept on disk."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from moshi.models.compression import MimiModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from finetune.data.manifest import Recording
from moshi_ttt.audio import read_audio
from moshi_ttt.codec import encode_recording
from moshi_ttt.errors import UserError, no_space_left
from moshi_ttt.files import written_whole

FORMAT = "1"
log = logging.getLogger(__name__)


def mimi_fingerprint(mimi: MimiModel) -> str:
    """SHA-1 of a codec: its weights with their names, and its number of codebooks."""
    digest = hashlib.sha1(f"format {FORMAT}, codebooks {mimi.num_codebooks}".encode())
    for name, tensor in sorted(mimi.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class CodesCache:
    """A folder with one safetensors file for the codes of each recording.

    A file's name is the SHA-1 of the audio file and the fingerprint of the codec: audio may move,
    and another Mimi never finds this one's codes. It holds `codes`, int16 `[channels, K, T]`, and
    their SHA-1. Files are written beside and renamed, so one with a cache's name is whole.

    Args:
        folder: made if missing.
        mimi: the codec, K codebooks a side.
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
        mimi: MimiModel,
        *,
        load_mimi: Callable[[], MimiModel] | None = None,
        mono_side: str = "moshi",
    ) -> None:
        if mono_side not in ("moshi", "user"):
            raise ValueError(f"mono_side must be 'moshi' or 'user', got {mono_side!r}")
        self.folder = Path(folder)
        self.mimi = mimi
        self.load_mimi = load_mimi
        self.mono_side = mono_side
        self.fingerprint = mimi_fingerprint(mimi)
        self._files: dict[Path, Path] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if no_space_left(error):
                raise
            raise UserError(f"{self.folder}: no folder for codes: {error.strerror}") from error

    def file(self, audio: Path) -> Path:
        """Where the codes of an audio file are or will be; reads the audio once to hash it."""
        if audio not in self._files:
            digest = hashlib.sha1()
            with audio.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
            name = f"{digest.hexdigest()}-{self.fingerprint[:12]}.safetensors"
            self._files[audio] = self.folder / name
        return self._files[audio]

    def prepare(self, recordings: Sequence[Recording], workers: int = 1) -> int:
        """Encode what is not there yet; a broken file is made again, and that is said.

        Args:
            recordings: any; each different audio file is encoded once.
            workers: processes, each with one thread and its own codec.

        Returns:
            How many were encoded.

        Raises:
            UserError: broken audio, named with its line in the manifest, or a worker that was
                killed. What was encoded before stays.
            ValueError: several workers and no `load_mimi`.
        """
        missing: dict[Path, Recording] = {}
        for recording in recordings:
            file = self.file(recording.path)
            if file not in missing and _read_frames(file) is None:
                missing[file] = recording
        # longest first: no worker is left alone with a long one at the end
        jobs = sorted(missing.items(), key=lambda job: -job[1].duration)
        # tqdm warns when rounding carries the sum past the total
        total = sum(r.duration for r in missing.values()) / 60 + 1e-6
        if jobs:
            bar = "{l_bar}{bar}| {n:.1f}/{total:.1f} min [{elapsed}<{remaining}]"
            with tqdm(total=total, desc="encoding", bar_format=bar) as progress:
                for done in self._encode_all(jobs, workers):
                    progress.update(done.duration / 60)
        self._prepare_silence([r for r in recordings if r.channels == 1])
        return len(jobs)

    def _encode_all(self, jobs: list[tuple[Path, Recording]], workers: int) -> Iterator[Recording]:
        if workers == 1 or len(jobs) == 1:
            for file, recording in jobs:
                yield _encode(self.mimi, file, recording)
            return
        if self.load_mimi is None:
            raise ValueError(f"{workers} workers need load_mimi, to make the codec in each")
        with ProcessPoolExecutor(
            min(workers, len(jobs)), get_context("spawn"), _start_worker, (self.load_mimi,)
        ) as pool:
            futures = [pool.submit(_encode_in_worker, *job, self.fingerprint) for job in jobs]
            try:
                for future in as_completed(futures):
                    yield future.result()
            except BrokenProcessPool as error:
                raise UserError(
                    f"a process that encodes was killed, for memory most likely; {workers} ran: "
                    "lower data.encode_workers"
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)

    def _silence_file(self) -> Path:
        return self.folder / f"silence-{self.fingerprint[:12]}.safetensors"

    def _prepare_silence(self, mono: list[Recording]) -> None:
        # the codec is causal: the codes of a shorter silence are the beginning of a longer one's
        needed = max((self.frames(r) for r in mono), default=0)
        if needed > (_read_frames(self._silence_file()) or 0):
            pcm = torch.zeros(1, needed * self.mimi.frame_size)
            _write(self._silence_file(), encode_recording(self.mimi, pcm))

    def frames(self, recording: Recording) -> int:
        """Length of a prepared recording in frames of 80 ms; the last may be filled with zeros."""
        with safe_open(self.file(recording.path), "pt") as stored:
            return stored.get_slice("codes").get_shape()[-1]

    def load(self, recording: Recording, start: int = 0, stop: int | None = None) -> Tensor:
        """Codes of frames `start` to `stop` of a prepared recording.

        Returns:
            int16 `[2K, stop - start]`: K rows of Moshi's side (left), K of the user's (right).
        """
        stop = self.frames(recording) if stop is None else stop
        sides = list(_read(self.file(recording.path), start, stop))
        if len(sides) == 1:
            sides += _read(self._silence_file(), start, stop)
            if self.mono_side == "user":
                sides.reverse()
        return torch.cat(sides)


def _read(file: Path, start: int, stop: int) -> Tensor:
    with safe_open(file, "pt") as stored:
        return stored.get_slice("codes")[:, :, start:stop]


def _digest(codes: Tensor) -> str:
    return hashlib.sha1(codes.contiguous().numpy().tobytes()).hexdigest()


def _read_frames(file: Path) -> int | None:
    """Frames in a cache file that is whole, else None."""
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as stored:
            codes = stored.get_tensor("codes")
            if (stored.metadata() or {}).get("sha1") == _digest(codes):
                return codes.shape[-1]
        reason = "its codes are not those that were written"
    except SafetensorError as error:
        reason = str(error)
    log.warning("%s is broken (%s): made again", file, reason)
    return None


def _write(file: Path, codes: Tensor) -> None:
    small = codes.to("cpu", torch.int16).contiguous()
    with written_whole(file) as beside:
        save_file({"codes": small}, beside, {"sha1": _digest(small)})


def _encode(mimi: MimiModel, file: Path, recording: Recording) -> Recording:
    try:
        pcm = read_audio(recording.path)
    except UserError as error:
        raise UserError(f"{recording.where}: {error}") from error
    _write(file, encode_recording(mimi, pcm))
    return recording


@dataclass
class _Worker:
    """What a process that encodes keeps between jobs."""

    load: Callable[[], MimiModel] | None = None
    mimi: MimiModel | None = None


_worker = _Worker()


def _start_worker(load_mimi: Callable[[], MimiModel]) -> None:
    torch.set_num_threads(1)
    _worker.load = load_mimi


def _encode_in_worker(file: Path, recording: Recording, fingerprint: str) -> Recording:
    if _worker.mimi is None:  # here, not at the start: an error there has no message
        assert _worker.load is not None
        _worker.mimi = _worker.load()
        if mimi_fingerprint(_worker.mimi) != fingerprint:
            raise ValueError("load_mimi makes another codec than the one given")
    return _encode(_worker.mimi, file, recording)
