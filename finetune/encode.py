"""Mimi's codes of a manifest, once: `python -m finetune.encode manifest.jsonl OUT`.

OUT/codes.jsonl is then what data.train_data (or eval.librilight --data) names: neither audio nor
Mimi is needed any more. Killed at any moment, the same command goes on. Under torchrun each rank
takes its share, and the rank that ends last writes the index.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
from moshi.models.compression import MimiModel
from torch import Tensor
from tqdm import tqdm

from finetune.data.encoding import Job, encode_jobs, mimi_fingerprint
from finetune.data.manifest import Line, read_lines
from finetune.data.shards import INDEX, MIB, ShardFolder
from finetune.model import codec_file, load_mimi
from moshi_ttt.base import Base, find_base
from moshi_ttt.codec import encode_recording
from moshi_ttt.errors import Parser, UserError, run_cli
from moshi_ttt.models import EMBEDDED_BASE, choose_device
from moshi_ttt.tiny import build_base
from moshi_ttt.tiny.model import BASE_WEIGHTS

SHARD_MIB = 256


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's options.

    Raises:
        UserError: unknown or malformed ones.
    """
    p = Parser("python -m finetune.encode", __doc__)
    p.add_argument("manifest", help="jsonl manifest of audio")
    p.add_argument("out", metavar="OUT", help="folder for shards and their index")
    p.add_argument("--base", help="base folder or hub repository (the embedded one)")
    p.add_argument(
        "--mono-side", choices=("moshi", "user"), default="moshi",
        help="whose voice a mono recording is; the other side is silence",
    )  # fmt: skip
    p.add_argument(
        "--workers", type=_positive, help="processes of a rank (one per core; one with CUDA)"
    )
    p.add_argument(
        "--shard-mib", type=_positive, default=SHARD_MIB, help="largest shard of several recordings"
    )
    p.add_argument("--device", help="cuda or cpu (cuda:LOCAL_RANK if there is one)")
    return p.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(argv: list[str] | None = None) -> None:
    """Encode this rank's recordings; write shards and index if nothing is missing then.

    Raises:
        UserError: what the user has to change, or broken audio, after all else was encoded.
    """
    args = parse(argv)
    rank, world = _ranks()
    lines = _lines(args.manifest)
    device = _device(args.device)
    base = _base(args.base)
    mimi = load_mimi(base, device)
    codec, file = mimi_fingerprint(mimi), codec_file(base)
    folder = ShardFolder(Path(args.out).expanduser(), codec, file, mimi.cardinality)
    folder.check_same_manifest(lines)

    # a recording that is named twice is encoded once, by one rank
    mine = list({line.names: line for line in lines}.values())[rank::world]
    jobs = _jobs(mine, folder)
    name = f"rank {rank} of {world}: " if world > 1 else ""
    done = sum(folder.has(folder.key(line)) for line in mine)
    say(f"{name}{len(mine)} recordings, {done} of them there already")
    cores = (os.cpu_count() or 1) // _number("LOCAL_WORLD_SIZE", 1)
    workers = args.workers or (1 if device.type == "cuda" else max(1, cores))
    _encode(jobs, folder, mimi, partial(base.info.get_mimi, device), workers)

    broken = folder.finish(lines, args.mono_side, _Silence(mimi), args.shard_mib * MIB)
    if broken is None:
        if world == 1:
            raise UserError(f"{args.manifest}: audio changed while it was encoded: run it again")
        say(f"{name}done; {folder.index} is written when all ranks are")
        return
    there = len(lines) - len(broken)
    say(f"{folder.index}: {there} of {len(lines)} recordings (data.train_data: {folder.index})")
    if broken:
        shown = ", ".join(broken[:10]) + (", ..." if len(broken) > 10 else "")
        raise UserError(
            f"{len(broken)} of {len(lines)} recordings are broken and not in {INDEX}: {shown}; "
            "the others are; mend them or their lines and run again"
        )


def say(text: str) -> None:
    """A line for a person."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def _ranks() -> tuple[int, int]:
    rank, world = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if not 0 <= rank < world:
        raise UserError(f"RANK is {rank}, but WORLD_SIZE is {world}")
    return rank, world


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment variable {name} must be a number, got {text!r}")
    return int(text)


def _lines(manifest: str) -> list[Line]:
    lines = list(read_lines(manifest))
    if not lines:
        raise UserError(f"{manifest}: no recordings in this manifest")
    for line in lines:
        if "shard" in line.entry:
            raise UserError(f"{line.where}: these are codes already; a manifest of audio is wanted")
    return lines


def _device(given: str | None) -> torch.device:
    if given is None and torch.cuda.is_available():
        given = f"cuda:{_number('LOCAL_RANK', 0)}"
    return choose_device(given)


def _base(given: str | None) -> Base:
    if given is not None:
        return find_base(given)
    say(f"codec: that of the embedded base in {EMBEDDED_BASE} (--base takes another's)")
    return find_base(build_base(EMBEDDED_BASE, weights=BASE_WEIGHTS))


def _jobs(lines: list[Line], folder: ShardFolder) -> list[Job]:
    """What is not there yet and can be read, as far as headers and transcripts say."""
    jobs: list[Job] = []
    for line in tqdm(lines, desc="reading headers", unit="recording", delay=1):
        key = folder.key(line)
        folder.mark_broken(key, False)  # it may have been mended
        if folder.has(key):
            continue
        try:
            jobs.append(Job(folder.part(key), line.recording().files, line.where))
        except UserError as error:
            _name_broken(folder, key, error)
    return jobs


def _name_broken(folder: ShardFolder, key: str, error: UserError) -> None:
    tqdm.write(f"broken: {error}", file=sys.stderr)
    folder.mark_broken(key)


def _encode(
    jobs: list[Job],
    folder: ShardFolder,
    mimi: MimiModel,
    load_mimi: partial[MimiModel],
    workers: int,
) -> None:
    if not jobs:
        return
    began = time.monotonic()
    hours = sum(job.seconds for job in jobs) / 3600
    bar = "{l_bar}{bar}| {n:.2f}/{total:.2f} h [{elapsed}<{remaining}{postfix}]"
    done = 0.0
    with tqdm(total=hours + 1e-6, desc="encoding", bar_format=bar) as progress:
        for job, error in encode_jobs(jobs, mimi, load_mimi, workers):
            if error is not None:
                _name_broken(folder, job.target.stem, error)
            else:
                done += job.seconds / 3600
            progress.update(job.seconds / 3600)
            progress.set_postfix_str(f"{_rate(done, began):.0f} h per hour")
    spent = (time.monotonic() - began) / 60
    say(f"{done:.2f} h of audio in {spent:.1f} min: {_rate(done, began):.0f} hours per hour")


def _rate(hours: float, began: float) -> float:
    return hours / max((time.monotonic() - began) / 3600, 1e-9)


class _Silence:
    """Codes of silence; the codec is causal: a shorter one is the beginning of a longer one."""

    def __init__(self, mimi: MimiModel) -> None:
        self.mimi = mimi
        self.longest = torch.empty(1, 1, 0)

    def __call__(self, frames: int) -> Tensor:
        if frames > self.longest.shape[-1]:
            pcm = torch.zeros(1, frames * self.mimi.frame_size)
            self.longest = encode_recording(self.mimi, pcm)
        return self.longest[..., :frames]


def command() -> None:
    """Command line."""
    try:
        run_cli(main)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: the same command goes on from here\n")
        sys.exit(130)


if __name__ == "__main__":
    command()
