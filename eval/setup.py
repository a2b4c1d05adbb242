"""What the commands of this room share: options, the models to compare, recordings."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moshi.models.lm import LMModel
from tqdm import tqdm

from eval.arms import BASE, WIDE, Arm, arms_of, baselines, checkpoint_name, open_arms, weights_hash
from eval.keep import Keep
from eval.panel import SIDES, Failed, make_items
from eval.provenance import provenance
from eval.scores import Item
from eval.trainings import training_of, unlike
from finetune.data.codes import CodesCache
from finetune.data.manifest import Source
from finetune.data.recording import Recording
from finetune.model import codec_needed
from moshi_ttt import tiny
from moshi_ttt.checkpoint import Described, describe
from moshi_ttt.errors import Parser, UserError
from moshi_ttt.files import newest_checkpoint
from moshi_ttt.models import choose_device, cpu_threads

RUNS, EVAL_RUNS = Path("runs"), Path("runs/eval")
GOES_ON = "what was scored is kept, the same command goes on from there"
"""Said after Ctrl-C."""


def add_model_options(p: Parser) -> None:
    """Options of every command that compares models."""
    p.add_argument("--checkpoint", help="a checkpoint folder (the newest under runs/)")
    p.add_argument("--base", help="base folder or hub repository (the checkpoint's)")
    p.add_argument(
        "--baseline", action="append", default=[], metavar="DIR",
        help="another checkpoint of the same base as a further arm; repeatable, commas too",
    )  # fmt: skip
    p.add_argument("--device", help="cuda or cpu (cuda if there is one)")
    p.add_argument("--verify-base", action="store_true", help="hash the whole base, not samples")


def add_data_options(
    p: Parser, data: str = "Libri-Light folder, or manifest (embedded held-out)"
) -> None:
    """Options of every command that reads recordings; `data` says which."""
    p.add_argument("--data", help=data)
    p.add_argument("--side", choices=SIDES, default="moshi", help="whose stream the recording is")
    p.add_argument("--max-items", type=positive_int, help="at most so many recordings")
    p.add_argument("--codes-cache", default="data/codes", help="folder for Mimi's codes")
    p.add_argument(
        "--encode-workers", type=positive_int, help="processes (one per core; one with CUDA)"
    )


def positive_int(text: str) -> int:
    """An option's value."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def positive_float(text: str) -> float:
    """An option's value."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


@dataclass(frozen=True)
class Models:
    """A checkpoint, its base, and what they are compared with; nothing is loaded yet.

    Attributes:
        main: the checkpoint.
        arms: all there are, the stock base first.
        device: of all.
        dtype: of all: the checkpoint's.
    """

    main: Described
    arms: list[Arm]
    device: torch.device
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """What a person calls the checkpoint."""
        return checkpoint_name(self.main.folder)

    @property
    def window(self) -> int:
        """Frames that the base's attention sees.

        Raises:
            UserError: its attention has no end.
        """
        window = self.main.base.lm_config.get("context")
        if window is None:
            raise UserError(
                f"base {self.main.base.name}: its attention has no window (context is null)"
            )
        return window

    def facts(self) -> dict[str, Any]:
        """What a results file says of the checkpoint."""
        main = self.main
        return {
            "checkpoint": str(main.folder),
            "base": main.base.name,
            "ttt": main.ttt.to_dict() if main.ttt else None,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
        }

    def open(self, arms: Sequence[Arm] | None = None) -> Iterator[tuple[Arm, LMModel]]:
        """Each arm with its model, one model in memory at a time; see `eval.arms.open_arms`.

        On a CPU the process then has as many threads as the model can use.
        """
        arms = self.arms if arms is None else arms
        for arm, lm in open_arms(arms, self.main.base, device=self.device, dtype=self.dtype):
            if self.device.type == "cpu":
                torch.set_num_threads(cpu_threads(lm))
            yield arm, lm

    def keep(self, folder: Path, arm: Arm, **settings: Any) -> Keep:
        """Where the scores of an arm are kept; `settings` are all else that decides them."""
        facts = {
            "weights": weights_hash(arm.checkpoint, self.main.base),
            "mode": arm.mode,
            "window": self.window if arm.mode in ("reset", "shuffled") else None,
            "wider": arm.wider,
            "dtype": str(self.dtype),
            "device": self.device.type,
        }
        return Keep(folder, facts | settings)


def find_models(args: argparse.Namespace) -> Models:
    """The models that the options name; all that can be checked without loading them is.

    Raises:
        UserError: no or wrong checkpoint, base, baseline or device.
    """
    device = choose_device(args.device)
    main = describe(_checkpoint(args.checkpoint), base=args.base, verify_base=args.verify_base)
    arms = [BASE, WIDE, *baselines(args.baseline, main), *arms_of(main.folder, main.ttt)]
    return Models(main, arms, device, main.dtype)


def _checkpoint(given: str | None) -> Path:
    if given is not None:
        return Path(given)
    newest = newest_checkpoint(RUNS)
    if newest is None:
        raise UserError(f"no checkpoint under {RUNS}/: `make finetune` makes one, or --checkpoint")
    say(f"checkpoint: {newest}, the newest under {RUNS}/ (--checkpoint takes another)")
    return newest


def find_data(given: str | None) -> Path:
    """The manifest or folder that was named, else the embedded held-out recordings.

    Raises:
        UserError: they cannot be made.
    """
    if given is not None:
        return Path(given)
    try:
        found = tiny.ensure().librilight
    except ValueError as error:
        raise UserError(str(error)) from error
    say(f"recordings: the embedded held-out ones in {found} (--data takes others)")
    return found


def read_items(
    books: Sequence[Recording], models: Models, args: argparse.Namespace, failed: list[Failed]
) -> list[Item]:
    """Codes of recordings, encoded where the cache lacks them; says how many it had.

    Args:
        books: chosen ones.
        models: for Mimi and the tokenizer.
        args: of `add_data_options`.
        failed: what cannot be read is added here and left out.

    Raises:
        UserError: none can be read.
    """
    info, device = models.main.base.info, models.device
    needed = codec_needed(models.main.base, [Source(Path(), 1.0, tuple(books))])
    mimi = info.get_mimi(device) if needed else None
    cache = CodesCache(args.codes_cache, mimi, load_mimi=info.get_mimi, mono_side=args.side)
    files = [file for book in books for file in book.files]
    there = sum(cache.file(file.path).exists() for file in files)
    stored = sum(book.stored is not None for book in books)
    if stored:
        say(f"codes: {stored} of {len(books)} recordings were encoded earlier")
    if files:
        say(f"codes: {there} of {len(files)} audio files are in {args.codes_cache} already")
    workers = encode_workers(args, device)
    items = make_items(books, cache, info.get_text_tokenizer(), args.side, workers, failed)
    for f in failed:
        say(f"{f.name} cannot be read: {f.reason}")
    return items


def about(
    models: Models, arms: Sequence[Arm], args: argparse.Namespace, module: str, seconds: float
) -> dict[str, Any]:
    """What a results file says besides its numbers: models, trainings, and how it was made.

    Args:
        models: of the comparison.
        arms: that were scored.
        args: with `add_data_options`.
        module: the command, e.g. `"eval.librilight"`.
        seconds: that scoring took.
    """
    main = models.main
    trainings = {arm.name: training_of(arm, main.base) for arm in arms if arm.mode == "kept"}
    name = next((arm.name for arm in arms if arm.checkpoint == main.folder), "")
    return models.facts() | {
        "side": args.side,
        "trainings": trainings,
        "unlike": unlike(trainings, name),
        "facts": {
            **provenance(module, models.device),
            **side_fact(args.side),
            "seconds of scoring": round(seconds, 1),
        },
    }


def side_fact(side: str) -> dict[str, str]:
    """Whose stream the recordings are, for a report; Moshi's alone is predicted."""
    if side == "moshi":
        return {"the recordings are": "Moshi's side"}
    return {
        "the recordings are": "the user's side; what is scored is Moshi's: of a mono recording, "
        "silence"
    }


def encode_workers(args: argparse.Namespace, device: torch.device) -> int:
    """Processes that encode: as many as were asked for, else one a core, or one on a GPU."""
    return args.encode_workers or (1 if device.type == "cuda" else os.cpu_count() or 1)


def say(text: str) -> None:
    """A line for a person."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def end(failed: Sequence[Failed], broken: int = 0) -> None:
    """Say what is missing, and leave with status 1 if anything is.

    Args:
        failed: recordings that could not be read.
        broken: scores that are no number.

    Raises:
        SystemExit: something is missing.
    """
    if not failed and not broken:
        return
    say(
        f"NOT ALL IS THERE: {len(failed)} recordings could not be read, {broken} scores are no "
        "number (named above); the rest is scored"
    )
    sys.exit(1)
