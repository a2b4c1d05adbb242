"""What is recalled of what was heard, by delay: `python -m eval.recall --help`.

Repeat probe: a passage is heard, others speak, and it is heard again: is it predicted better than
after other words of the same speaker? Speaker change A-B-A: a speaker is heard, others speak, and
the first goes on: is that predicted better than after a stranger? Asked of the stock base, of the
trained model with its memory kept, reset every window and not writing, and of any --baseline. A
report, a picture and the numbers are written. Killed and started again, it goes on where it was.
Without options: the newest checkpoint under runs/ and the embedded held-out recordings.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.arms import Arm, score_arm
from eval.keep import Found
from eval.output import next_folder, write_documents
from eval.panel import Failed, choose, read_panel, shorten, speaker_of
from eval.perplexity import FRAMES_PER_CALL
from eval.recall.gains import Heard, compare
from eval.recall.hearings import FRAME_RATE, HEARD, Hearings, Plan, delays, plan, refuse_few
from eval.recall.plot import by_delay
from eval.recall.report import page, render
from eval.scores import Item
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
from eval.tables import as_markdown, as_text
from eval.verdict import Results
from finetune.data.recording import Recording
from moshi_ttt.errors import Parser, UserError, run_cli

KEPT_SCORES = "nll"
"""Folder, in that of the results, for scores as they come."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's options.

    Raises:
        UserError: unknown or malformed ones.
    """
    p = Parser("python -m eval.recall", __doc__)
    add_model_options(p)
    add_data_options(p)
    p.add_argument(
        "--delays", type=delays, default="0.25,0.5,1,2,4,8", metavar="LIST",
        help="between the hearings: windows (0.5,1,2), seconds (30s) or minutes (1min,2min) "
        "(%(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--passage-windows", type=positive_float, default=0.5, help="length of a passage (0.5)"
    )
    p.add_argument(
        "--passages", type=positive_int, default=1, help="of each recording (1); more: less noise"
    )
    p.add_argument("--frames-per-call", type=positive_int, default=FRAMES_PER_CALL)
    p.add_argument("--rows", type=positive_int, default=4, help="sequences at a time (4)")
    p.add_argument("--out", help="folder to make (runs/eval/<name of the checkpoint>-recall)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Score, compare, write and print.

    Raises:
        UserError: what the user has to change, in one line; nothing was written then.
        SystemExit: status 1 if a recording could not be read, or an NLL is no number.
    """
    args = parse(argv)
    models = find_models(args)
    arms = [arm for arm in models.arms if arm.wider == 1 and arm.mode != "shuffled"]
    out = next_folder(args.out, EVAL_RUNS / f"{models.name}-recall")
    lengths = plan(models.window, args.passage_windows, args.delays, args.passages)
    data = find_data(args.data)
    failed: list[Failed] = []
    books, left_out = _choose(read_panel(data, failed), lengths, args.max_items)
    items = [
        replace(item, codes=item.codes[:, : lengths.longest])
        for item in read_items(books, models, args, failed)
    ]
    hearings = Hearings(items, lengths)
    for line in left_out:
        say(f"{line}.")
    say(
        f"{len(hearings.pairs)} passages of {len(items)} recordings, {len(lengths.delays)} delays, "
        f"{len(HEARD)} sequences each: {_frames(hearings)} frames, {len(arms)} arms"
    )
    began = time.monotonic()
    found = _score(models, arms, hearings, out / KEPT_SCORES, args)
    results = compare(found, hearings.pairs, lengths, models.window)
    results |= about(models, arms, args, "eval.recall", time.monotonic() - began)
    results |= {"data": str(data)}
    results |= {"left_out": left_out, "failed": [vars(f) for f in failed]}
    files = _write(results, out, f"{models.name}: recall on {data}")
    say(f"\n{render(results, as_text)}\n")
    say("written: " + ", ".join(str(file) for file in files))
    end(failed, sum(len(arm["broken"]) for arm in results["arms"].values()))


def _choose(
    books: list[Recording], lengths: Plan, most: int | None
) -> tuple[list[Recording], list[str]]:
    """One recording a speaker, and no more of it than is used."""
    seconds = lengths.shortest / FRAME_RATE
    longest = max(books, key=lambda book: book.duration)
    if longest.duration < seconds:
        raise UserError(
            f"no recording is as long as {lengths.passages} x two passages, and the window "
            f"({seconds:g} s); the longest of {len(books)} is {longest.name} with "
            f"{longest.duration:.1f} s"
        )
    chosen, left_out = choose(books, seconds, most)
    refuse_few({speaker_of(book) for book in chosen})
    return [shorten(book, lengths.longest / FRAME_RATE) for book in chosen], left_out


def _frames(hearings: Hearings) -> int:
    lengths = hearings.plan
    return len(hearings.pairs) * len(HEARD) * sum(lengths.frames(d) for d in lengths.delays)


def _score(
    models: Models, arms: list[Arm], hearings: Hearings, kept: Path, args: argparse.Namespace
) -> dict[Arm, Heard]:
    how: dict[str, Any] = {"rows": args.rows, "frames_per_call": args.frames_per_call}
    there = len(list(kept.glob("*.safetensors")))
    if there:
        say(f"going on: {there} scores may be in {kept} already")
    found: dict[Arm, dict[tuple[int, str], list[Found]]] = {}
    total = len(arms) * _frames(hearings)
    with tqdm(total=total, desc="scoring", unit="frame", unit_scale=True) as bar:
        for arm, lm in models.open(arms):
            bar.set_postfix_str(arm.name)
            found[arm] = {}
            keep = models.keep(kept, arm, **how)
            for delay in hearings.plan.delays:
                items: list[Item] = []
                for heard in HEARD:
                    items += hearings.sequences(delay, heard)
                scores = score_arm(
                    lm, arm, items, models.window, keep=keep, progress=bar.update, **how
                ).found
                count = len(hearings.pairs)
                for place, heard in enumerate(HEARD):
                    found[arm][delay, heard] = scores[place * count : (place + 1) * count]
    return {arm: found[arm] for arm in arms}


def _write(results: Results, out: Path, title: str) -> list[Path]:
    text = f"# {title}\n\n![gain by delay](recall.png)\n\n{render(results, as_markdown)}\n"
    return write_documents(
        results, out, {"recall": by_delay(results, title)},
        lambda pictures: page(results, title, pictures["recall"]), text,
    )  # fmt: skip


if __name__ == "__main__":
    run_cli(main, GOES_ON)
