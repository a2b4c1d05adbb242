"""Length generalisation of a trained model: `python -m eval.length --help`.

Perplexity at 20 lengths, 0.5x to 10x of the segment it was trained on, of the stock base and of
the trained model, its memory kept and reset every window. Runs by itself after a training; here
again, alone, with what the run was configured with: its segment, tokenizer, codec, side and
held-out recordings.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from eval.arms import score_arm
from eval.generalisation import (
    LONGEST,
    Generalisation,
    generalisation_metrics,
    generalisation_notes,
    generalisation_table,
    generalise,
)
from eval.length_plot import generalisation_figure
from eval.output import RESULTS, next_folder, save_figure, write_json
from eval.panel import Failed, choose, read_panel, speaker_of
from eval.provenance import provenance
from eval.scores import Scores
from eval.setup import (
    EVAL_RUNS,
    GOES_ON,
    Models,
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
from eval.tables import FRAME_SECONDS, as_text
from eval.trainings import run_of
from eval.verdict import FEWEST_SPEAKERS
from finetune.args import TrainArgs
from finetune.data.manifest import parse_sources
from finetune.data.recording import Recording
from finetune.load_args import load_args
from finetune.metrics import Metrics
from moshi_ttt.errors import Parser, UserError, run_cli

ARMS = ("base", "kept", "reset", "trained")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's options.

    Raises:
        UserError: unknown or malformed ones.
    """
    p = Parser("python -m eval.length", __doc__)
    add_model_options(p)
    add_data_options(p)
    p.set_defaults(side=None, codes_cache=None)  # the run's
    p.add_argument("--segment-seconds", type=positive_float, help="what 1x is (the run's segment)")
    p.add_argument("--frames-per-call", type=positive_int, help="frames of one call (the run's)")
    p.add_argument("--rows", type=positive_int, default=1, help="recordings at a time")
    p.add_argument("--wandb", metavar="PROJECT", help="log there (the run's project, if any)")
    p.add_argument("--out", help="folder to make (runs/eval/<name of the checkpoint>-length)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Score, write and print.

    Raises:
        UserError: what the user has to change, in one line.
        SystemExit: status 1 if a recording could not be read, or an NLL is no number.
    """
    args = parse(argv)
    models = find_models(args)
    run = run_of(models.main.folder)
    config = load_args(run / "config.yaml") if run is not None else None
    if config is None and args.wandb is not None:
        raise UserError(f"--wandb {args.wandb}: {models.main.folder} is not in a run's folder")
    args.side = args.side or (config.data.mono_side if config else "moshi")
    args.codes_cache = args.codes_cache or (config.data.codes_cache if config else "data/codes")
    per_call = args.frames_per_call or (config.eval.frames_per_call if config else 100)
    segment = _segment(models, args.segment_seconds)
    out = next_folder(args.out, EVAL_RUNS / f"{models.name}-length")
    failed: list[Failed] = []
    books = _books(args, config, segment, failed)
    items = read_items(books, models, args, failed)
    arms = [arm for arm in models.arms if arm.name in ARMS or arm.checkpoint != models.main.folder]
    arms = [arm for arm in arms if arm.name != "wide"]
    longest = int(LONGEST * segment)
    items = [replace(item, codes=item.codes[:, :longest]) for item in items]
    say(f"{len(items)} recordings, segments of {segment} frames, {len(arms)} arms")

    scores: dict[str, Scores] = {}
    total = len(arms) * sum(item.frames for item in items)
    with tqdm(total=total, desc="scoring", unit="frame", unit_scale=True) as bar:
        for arm, lm in models.open(arms):
            bar.set_postfix_str(arm.name)
            keep = models.keep(out / "nll", arm, rows=args.rows, frames_per_call=per_call)
            scores[arm.name] = score_arm(
                lm, arm, items, models.window,
                rows=args.rows, frames_per_call=per_call, keep=keep, progress=bar.update,
            )  # fmt: skip
    found = generalise({arm: scores[arm.name] for arm in arms}, items, segment)
    found |= {"checkpoint": str(models.main.folder), "failed": [vars(f) for f in failed]}
    found |= {"window_frames": models.window, "facts": provenance("eval.length", models.device)}
    broken = found["broken"] = [
        f"{arm.label}, {item.name}: {one.broken}"
        for arm in arms
        for item, one in zip(items, scores[arm.name].found, strict=True)
        if one.broken
    ]
    files = save_figure(
        generalisation_figure(found, models.name, models.window), out / f"{models.name}_length"
    )
    write_json(found, out / RESULTS)
    for line in (as_text(generalisation_table(found)), "", *generalisation_notes(found), *broken):
        say(line)
    say("written: " + ", ".join(str(file) for file in (*files, out / RESULTS)))
    _log(found, files[0], config, args.wandb, out, models)
    end(failed, len(broken))


def _segment(models: Models, seconds: float | None) -> int:
    if seconds is not None:
        return max(1, round(seconds / FRAME_SECONDS))
    frames = models.main.about.get("segment_frames")
    if frames is None:
        raise UserError(
            f"{models.main.folder} does not say how long a training segment was: --segment-seconds"
        )
    return int(frames)


def _books(
    args: argparse.Namespace, config: TrainArgs | None, segment: int, failed: list[Failed]
) -> list[Recording]:
    """The recordings named, else the run's own held-out ones, else the embedded.

    One a speaker; only such as have the longest length, if enough speakers have one.
    """
    given = args.data or (config.eval.librilight_data if config else None)
    if given is None and config is not None and config.data.eval_data:
        say(f"recordings: data.eval_data of the run, {config.data.eval_data}")
        manifests = [path for path, _ in parse_sources(config.data.eval_data)]
        books = [book for path in manifests for book in read_panel(path, failed)]
    else:
        if given is not None and not args.data:
            say(f"recordings: eval.librilight_data of the run, {given}")
        books = read_panel(find_data(given), failed)
    longest = LONGEST * segment * FRAME_SECONDS
    enough = len({speaker_of(b) for b in books if b.duration >= longest}) >= FEWEST_SPEAKERS
    books, left_out = choose(books, longest if enough else 0.0, args.max_items)
    for line in left_out:
        say(f"{line}.")
    return books


def _log(
    found: Generalisation,
    picture: Path,
    config: TrainArgs | None,
    project: str | None,
    out: Path,
    models: Models,
) -> None:
    """Numbers and picture to wandb, if the run has a project or one is named."""
    if config is None or (project or config.wandb.project) is None:
        return
    where = replace(
        config.wandb, project=project or config.wandb.project, run_name=f"{models.name}-length"
    )
    step = int(models.main.about.get("step", 0))
    metrics = Metrics(out, replace(config, wandb=where))
    metrics.log("length", step, generalisation_metrics(found))
    metrics.image("length", picture, step)
    metrics.close()


if __name__ == "__main__":
    run_cli(main, GOES_ON)
