"""Recordings to files of codes, in this process or in several."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import torch
from moshi.models.compression import MimiModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from finetune.data.recording import AudioFile
from finetune.data.stored import digest_of
from moshi_ttt.audio import read_audio
from moshi_ttt.codec import encode_recording
from moshi_ttt.errors import UserError
from moshi_ttt.files import written_whole

FORMAT = "1"
MakeMimi = Callable[[], MimiModel]


@dataclass(frozen=True)
class Job:
    """Audio to encode, each file from a fresh codec, and where its codes go.

    Attributes:
        target: safetensors file to make: `codes`, int16 `[channels, K, T]`.
        files: the audio, in order.
        where: `manifest:line`, for messages.
    """

    target: Path
    files: tuple[AudioFile, ...]
    where: str

    @property
    def seconds(self) -> float:
        """Length of the audio."""
        return sum(f.duration for f in self.files)


def mimi_fingerprint(mimi: MimiModel) -> str:
    """SHA-1 of a codec: its weights with their names, and its number of codebooks."""
    digest = hashlib.sha1(f"format {FORMAT}, codebooks {mimi.num_codebooks}".encode())
    for name, tensor in sorted(mimi.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def encode_jobs(
    jobs: Sequence[Job], mimi: MimiModel, load_mimi: MakeMimi | None = None, workers: int = 1
) -> Iterator[tuple[Job, UserError | None]]:
    """Encode; yields each job as it is done, with what is wrong with its audio, if anything is.

    Args:
        jobs: any.
        mimi: the codec.
        load_mimi: makes the same codec in another process; needed for several. It has to be
            picklable.
        workers: processes, each with one thread and its own codec.

    Raises:
        UserError: a worker was killed.
        ValueError: several workers and no `load_mimi`.
    """
    # longest first: no worker is left alone with a long one at the end
    jobs = sorted(jobs, key=lambda job: -job.seconds)
    if workers == 1 or len(jobs) <= 1:
        for job in jobs:
            yield job, _encode(mimi, job)
        return
    if load_mimi is None:
        raise ValueError(f"{workers} workers need load_mimi, to make the codec in each")
    fingerprint = mimi_fingerprint(mimi)
    with ProcessPoolExecutor(
        min(workers, len(jobs)), get_context("spawn"), _start_worker, (load_mimi,)
    ) as pool:
        futures = {pool.submit(_encode_in_worker, job, fingerprint): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"a process that encodes was killed, for memory most likely; {workers} ran: "
                "let fewer encode (data.encode_workers, --workers)"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def write_codes(file: Path, parts: Sequence[Tensor]) -> None:
    """Write the codes of consecutive files, int64 `[channels, K, T]` each, as one, whole."""
    codes = torch.cat([part.to("cpu", torch.int16) for part in parts], dim=-1).contiguous()
    tensors = {"codes": codes}
    if len(parts) > 1:
        tensors["file_frames"] = torch.tensor([part.shape[-1] for part in parts])
    with written_whole(file) as beside:
        save_file(tensors, beside, {"sha1": digest_of(codes)})


def read_codes(file: Path) -> dict[str, Tensor] | str:
    """The tensors of a file of `write_codes`, or why it is broken."""
    try:
        with safe_open(file, "pt") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}
            said = (stored.metadata() or {}).get("sha1")
    except SafetensorError as error:
        return str(error)
    if "codes" not in tensors or said != digest_of(tensors["codes"]):
        return "its codes are not those that were written"
    return tensors


def _encode(mimi: MimiModel, job: Job) -> UserError | None:
    parts: list[Tensor] = []
    for file in job.files:
        try:
            pcm = read_audio(file.path)
        except UserError as error:
            return UserError(f"{job.where}: {error}")
        parts.append(encode_recording(mimi, pcm))
    write_codes(job.target, parts)
    return None


@dataclass
class _Worker:
    """What a process that encodes keeps between jobs."""

    load: MakeMimi | None = None
    mimi: MimiModel | None = None


_worker = _Worker()


def _start_worker(load_mimi: MakeMimi) -> None:
    torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()
    _worker.load = load_mimi


def _end_with_parent() -> None:
    """A parent that was killed tells nobody, and its workers would wait for jobs for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(job: Job, fingerprint: str) -> UserError | None:
    if _worker.mimi is None:  # here, not at the start: an error there has no message
        assert _worker.load is not None
        _worker.mimi = _worker.load()
        if mimi_fingerprint(_worker.mimi) != fingerprint:
            raise ValueError("load_mimi makes another codec than the one given")
    return _encode(_worker.mimi, job)
