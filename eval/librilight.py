"""Perplexity far beyond the attention window: `python -m eval.librilight --help`.

Every recording is scored by all arms: (a) the stock base and (g) the same with a wider window, the
trained model with its memory (c) kept, (e) reset every window, (f) filled by another recording
and (h) with writing off, and any --baseline: (b) LoRA only, (d) trained with writing off. A report,
pictures and the numbers are written. Killed and started again, it goes on where it was.
Without options: the newest checkpoint under runs/ and the embedded held-out recordings.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from eval.arms import Arm, score_arm
from eval.generalisation import generalise
from eval.length_plot import generalisation_figure
from eval.output import memory_in_use, next_folder, write_results
from eval.panel import Failed, choose, read_panel, shorten
from eval.perplexity import FRAMES_PER_CALL
from eval.report import render
from eval.scores import Item, Scores
from eval.setup import (
    EVAL_RUNS,
    GOES_ON,
    Models,
    about,
    add_data_options,
    add_model_options,
    end,
    find_data,
    find_models,
    positive_float,
    positive_int,
    read_items,
    say,
)
from eval.summary import summarise
from eval.tables import FRAME_SECONDS
from eval.trainings import heard_before
from moshi_ttt.errors import Parser, UserError, run_cli

KEPT_SCORES = "nll"
"""Folder, in that of the results, for scores as they come."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's options.

    Raises:
        UserError: unknown or malformed ones.
    """
    p = Parser("python -m eval.librilight", __doc__)
    add_model_options(p)
    add_data_options(p)
    p.add_argument("--min-minutes", type=positive_float, help="shortest recording (four windows)")
    p.add_argument("--max-minutes", type=positive_float, help="score only so much of each (all)")
    p.add_argument("--arms", help="only these, e.g. base,kept,reset (all)")
    p.add_argument("--bin-frames", type=positive_int, help="of curves (250, at most half a window)")
    p.add_argument("--frames-per-call", type=positive_int, default=FRAMES_PER_CALL)
    p.add_argument("--rows", type=positive_int, default=1, help="recordings at a time")
    p.add_argument("--out", help="folder to make (runs/eval/<name of the checkpoint>)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Score, compare, write and print.

    Raises:
        UserError: what the user has to change, in one line; nothing was written then.
        SystemExit: status 1 if a recording could not be read, or an NLL is no number.
    """
    args = parse(argv)
    models = find_models(args)
    arms = _wanted(models.arms, args.arms)
    out = next_folder(args.out, EVAL_RUNS / models.name)
    data = find_data(args.data)
    failed: list[Failed] = []
    books = read_panel(data, failed)
    window = models.window
    minutes = args.min_minutes
    shortest = 4 * window * FRAME_SECONDS if minutes is None else minutes * 60
    books, left_out = choose(books, shortest, args.max_items)
    if args.max_minutes is not None:
        books = [shorten(book, args.max_minutes * 60) for book in books]
    items = read_items(books, models, args, failed)
    if args.max_minutes is not None:
        frames = math.ceil(args.max_minutes * 60 / FRAME_SECONDS)
        items = [replace(item, codes=item.codes[:, :frames]) for item in items]
    for line in left_out:
        say(f"{line}.")
    say(f"{len(items)} recordings, {sum(item.frames for item in items)} frames, {len(arms)} arms")

    before, began = memory_in_use(models.device), time.monotonic()
    scores = _score(models, arms, items, out / KEPT_SCORES, args)
    training_frames = models.main.about.get("segment_frames")
    results = summarise(
        scores,
        items,
        window,
        training_frames=training_frames,
        bin_frames=args.bin_frames,
        frames_per_call=args.frames_per_call,
        rows=args.rows,
    )
    results |= about(models, arms, args, "eval.librilight", time.monotonic() - began)
    results["unlike"] += heard_before(arms, books)
    results |= {"data": str(data)}
    results |= {
        "left_out": left_out,
        "failed": [vars(f) for f in failed],
        "memory_bytes": {"start": before, "end": memory_in_use(models.device)},
    }
    more = _generalisation(results, scores, items, models)
    files = write_results(results, out, title=f"{models.name} on {data}", more=more)
    say(f"\n{render(results)}\n")
    say("written: " + ", ".join(str(file) for file in files))
    end(failed, sum(len(arm["broken"]) for arm in results["arms"].values()))


def _wanted(arms: list[Arm], given: str | None) -> list[Arm]:
    if given is None:
        return arms
    names = [name.strip() for name in given.split(",") if name.strip()]
    known = {arm.name: arm for arm in arms}
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise UserError(f"--arms {given}: no arm {unknown or names}; there are {', '.join(known)}")
    return [arm for name, arm in known.items() if name in names]


def _score(
    models: Models, arms: list[Arm], items: list[Item], kept: Path, args: argparse.Namespace
) -> dict[Arm, Scores]:
    how: dict[str, Any] = {"rows": args.rows, "frames_per_call": args.frames_per_call}
    total = len(arms) * sum(item.frames for item in items)
    scores: dict[Arm, Scores] = {}
    with tqdm(total=total, desc="scoring", unit="frame", unit_scale=True) as bar:
        for arm, lm in models.open(arms):
            bar.set_postfix_str(arm.name)
            scores[arm] = score_arm(
                lm, arm, items, models.window,
                keep=models.keep(kept, arm, **how), progress=bar.update, **how,
            )  # fmt: skip
    if there := sum(found.kept for found in scores.values()):
        say(f"{there} of {len(arms) * len(items)} scores were in {kept} already")
    return {arm: scores[arm] for arm in arms}


def _generalisation(
    results: dict[str, Any], scores: dict[Arm, Scores], items: list[Item], models: Models
) -> dict[str, Figure]:
    """Put the numbers of length generalisation into the results; returns its picture."""
    segment = models.main.about.get("segment_frames")
    if segment is None:
        return {}
    shown = {arm: s for arm, s in scores.items() if arm.mode == "kept" and arm.wider == 1}
    results["length"] = generalise(shown, items, segment)
    figure = generalisation_figure(results["length"], models.name, models.window)
    return {f"{models.name}_length": figure}


if __name__ == "__main__":
    run_cli(main, GOES_ON)
