"""Perplexity far beyond the attention window: `python -m eval.librilight --help`.

Every recording is scored by the stock base, by the trained model with its memory kept, reset every
window, and with writing off, and by any baselines; the numbers, a table and a picture are written.
Without options: the newest checkpoint under runs/ and the embedded held-out recordings.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

from moshi.models.lm import LMModel
from tqdm import tqdm

from eval.arms import MEMORY_ARMS, attention_window, score_arms
from eval.output import memory_in_use, next_folder, write_results
from eval.panel import SIDES, choose, make_items, read_panel, shorten
from eval.perplexity import FRAMES_PER_CALL
from eval.report import FRAME_SECONDS, as_text, render
from eval.scores import Item, Scores, evaluate
from eval.summary import LABELS, summarise
from finetune.data.codes import CodesCache
from finetune.data.recording import Recording
from moshi_ttt import tiny
from moshi_ttt.base import load_base, read_json
from moshi_ttt.checkpoint import TTT_CONFIG_FILE, Loaded, load
from moshi_ttt.errors import Parser, UserError, run_cli
from moshi_ttt.files import newest_checkpoint
from moshi_ttt.models import choose_device

RUNS, EVAL_RUNS = Path("runs"), Path("runs/eval")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's options.

    Raises:
        UserError: unknown or malformed ones.
    """
    p = Parser("python -m eval.librilight", __doc__)
    p.add_argument("--checkpoint", help="a checkpoint folder (the newest under runs/)")
    p.add_argument("--base", help="base folder or hub repository (the checkpoint's)")
    p.add_argument("--data", help="Libri-Light folder, or manifest (embedded held-out)")
    p.add_argument(
        "--baseline", action="append", default=[], metavar="DIR",
        help="another checkpoint of the same base as a further arm; repeatable, commas too",
    )  # fmt: skip
    p.add_argument("--side", choices=SIDES, default="moshi", help="whose stream the recording is")
    p.add_argument("--max-items", type=_positive_int, help="at most so many recordings")
    p.add_argument("--min-seconds", type=_positive_float, help="shortest recording (four windows)")
    p.add_argument("--max-seconds", type=_positive_float, help="score only so much of each (all)")
    p.add_argument(
        "--bin-frames", type=_positive_int, help="of curves (250, at most half a window)"
    )
    p.add_argument("--frames-per-call", type=_positive_int, default=FRAMES_PER_CALL)
    p.add_argument("--out", help="folder to make (runs/eval/<name of the checkpoint>)")
    p.add_argument("--codes-cache", default="data/codes", help="folder for Mimi's codes")
    p.add_argument(
        "--encode-workers", type=_positive_int, help="processes (one per core; one with CUDA)"
    )
    p.add_argument("--device", help="cuda or cpu (cuda if there is one)")
    p.add_argument("--verify-base", action="store_true", help="hash the whole base, not samples")
    return p.parse_args(argv)


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def main(argv: list[str] | None = None) -> None:
    """Score, compare, write and print.

    Raises:
        UserError: what the user has to change, in one line; nothing was written then.
    """
    args = parse(argv)
    device = choose_device(args.device)
    checkpoint = _checkpoint(args.checkpoint)
    out = next_folder(args.out, EVAL_RUNS / _name(checkpoint))
    data = _data(args.data)
    books = read_panel(data)
    loaded = load(checkpoint, base=args.base, device=device, verify_base=args.verify_base)
    baselines = _baselines(args.baseline)
    for path in baselines.values():  # all checks come before the first long piece of work
        _check_same_base(path, loaded)
    window = attention_window(loaded.lm)
    shortest = 4 * window * FRAME_SECONDS if args.min_seconds is None else args.min_seconds
    books, left_out = choose(books, shortest, args.max_items)
    if args.max_seconds is not None:
        books = [shorten(book, args.max_seconds) for book in books]
    items = _items(books, loaded, args)
    for line in left_out:
        say(f"{line}.")
    say(f"{len(items)} recordings, {sum(i.codes.shape[-1] for i in items)} frames")

    before = memory_in_use(device)
    scores = _score(loaded, baselines, items, args)
    results = summarise(
        scores,
        items,
        window,
        training_frames=loaded.about.get("segment_frames"),
        bin_frames=args.bin_frames,
        frames_per_call=args.frames_per_call,
    )
    results |= {
        "checkpoint": str(checkpoint),
        "base": loaded.base.name,
        "baselines": {name: str(path) for name, path in baselines.items()},
        "data": str(data),
        "side": args.side,
        "left_out": left_out,
        "ttt": loaded.ttt.to_dict() if loaded.ttt else None,
        "dtype": str(loaded.lm.dtype).removeprefix("torch."),
        "device": str(device),
        "memory_bytes": {"start": before, "end": memory_in_use(device)},
    }
    files = write_results(results, out, title=f"{_name(checkpoint)} on {data}")
    say(f"\n{render(results, as_text)}\n")
    say("written: " + ", ".join(str(file) for file in files))


def say(text: str) -> None:
    """A line for a person."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def _checkpoint(given: str | None) -> Path:
    if given is not None:
        return Path(given)
    newest = newest_checkpoint(RUNS)
    if newest is None:
        raise UserError(f"no checkpoint under {RUNS}/: `make finetune` makes one, or --checkpoint")
    say(f"checkpoint: {newest}, the newest under {RUNS}/ (--checkpoint takes another)")
    return newest


def _data(given: str | None) -> Path:
    if given is not None:
        return Path(given)
    try:
        found = tiny.ensure().librilight
    except ValueError as error:
        raise UserError(str(error)) from error
    say(f"recordings: the embedded held-out ones in {found} (--data takes others)")
    return found


def _name(checkpoint: Path) -> str:
    folder = checkpoint.expanduser().resolve()
    folder = folder.parent if folder.name == "consolidated" else folder
    if folder.parent.name == "checkpoints":
        return f"{folder.parent.parent.name}-{folder.name}"
    return folder.name


def _baselines(given: list[str]) -> dict[str, Path]:
    paths = [Path(part.strip()) for text in given for part in text.split(",") if part.strip()]
    named = {_name(path): path for path in paths}
    if len(named) < len(paths) or set(named) & set(LABELS):
        raise UserError(f"--baseline: {', '.join(map(str, paths))}: names must differ")
    return named


def _check_same_base(path: Path, loaded: Loaded) -> None:
    folder = path.expanduser()
    folder = folder / "consolidated" if (folder / "consolidated").is_dir() else folder
    about = folder / TTT_CONFIG_FILE
    if not about.is_file():
        raise UserError(f"--baseline {path} is not a checkpoint: it has no {TTT_CONFIG_FILE}")
    theirs, ours = (read_json(about)["base"], loaded.about["base"])
    if theirs["fingerprint"] != ours["fingerprint"]:
        raise UserError(
            f"--baseline {path} belongs to another base ({theirs['name']}) than the checkpoint "
            f"({ours['name']}): their numbers cannot be compared"
        )


def _items(books: list[Recording], loaded: Loaded, args: argparse.Namespace) -> list[Item]:
    info, device = loaded.base.info, loaded.lm.device
    cache = CodesCache(
        args.codes_cache, info.get_mimi(device), load_mimi=info.get_mimi, mono_side=args.side
    )
    cores = 1 if device.type == "cuda" else os.cpu_count() or 1
    workers = args.encode_workers or cores
    items = make_items(books, cache, info.get_text_tokenizer(), args.side, workers)
    if args.max_seconds is None:
        return items
    frames = math.ceil(args.max_seconds / FRAME_SECONDS)
    return [replace(item, codes=item.codes[:, :frames]) for item in items]


def _score(
    loaded: Loaded, baselines: dict[str, Path], items: list[Item], args: argparse.Namespace
) -> dict[str, Scores]:
    lm, per_call = loaded.lm, args.frames_per_call
    window = attention_window(lm)
    arms = 1 + len(baselines) + (len(MEMORY_ARMS) if loaded.ttt else 1)
    total = arms * sum(item.codes.shape[-1] for item in items)
    scores: dict[str, Scores] = {}
    with tqdm(total=total, desc="scoring", unit="frame", unit_scale=True) as bar:

        def run(lm: LMModel, name: str) -> None:
            bar.set_postfix_str(name)
            scores[name] = evaluate(lm, items, frames_per_call=per_call, progress=bar.update)

        try:
            run(load_base(loaded.base, device=lm.device, dtype=lm.dtype), "base")
            bar.set_postfix_str("trained model")
            scores |= score_arms(lm, items, window, frames_per_call=per_call, progress=bar.update)
            for name, path in baselines.items():
                run(load(path, base=loaded.base, device=lm.device, dtype=lm.dtype).lm, name)
        except FloatingPointError as error:
            raise UserError(f"the model's output is broken: {error}") from error
    return scores


if __name__ == "__main__":
    run_cli(main)
