"""Minutes of free running: does a model that talks by itself decay? `python -m eval.generate -h`.

The stock base, the trained model with its memory kept, reset every window and with writing off,
and any --baseline, sample text and voice from one seed, hearing silence. By minute: entropy of
codebook 0, repetition, level, silence, and how far the memory has moved; the last quarter is
compared with the first, against the model without memory. Voices (flac) and texts are kept, and
are there while they are sampled; a run that was killed starts from the beginning.
Without options: the newest checkpoint under runs/, 6 streams (the fewest for a verdict) of 16
minutes.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import fields
from typing import Any

import torch
from moshi.models.compression import MimiModel
from sentencepiece import SentencePieceProcessor
from tqdm import tqdm

from eval.arms import BASE, Arm
from eval.generate.measures import measured, summarise
from eval.generate.report import render, write
from eval.generate.running import MODES, Plan, run_free
from eval.output import memory_in_use, next_folder
from eval.provenance import provenance
from eval.setup import (
    EVAL_RUNS,
    Models,
    add_model_options,
    find_models,
    positive_float,
    positive_int,
    say,
)
from eval.tables import FRAME_SECONDS, as_text
from eval.trainings import training_of
from eval.verdict import FEWEST_SPEAKERS as FEWEST_STREAMS
from moshi_ttt.engine import Sampling
from moshi_ttt.errors import Parser, UserError, run_cli
from moshi_ttt.loops import user_channel
from moshi_ttt.sound import FRAME

VOICES = "voices"
"""Folder, in that of the results, for audio and text."""
SAMPLING = tuple(f.name for f in fields(Sampling) if f.name != "greedy")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's options.

    Raises:
        UserError: unknown or malformed ones.
    """
    p = Parser("python -m eval.generate", __doc__)
    add_model_options(p)
    p.add_argument("--minutes", type=positive_float, default=16.0, help="of sampling (16)")
    p.add_argument(
        "--bin-seconds", type=positive_float, default=60.0, help="of curves and tables (60)"
    )
    p.add_argument(
        "--streams", type=positive_int, default=FEWEST_STREAMS, help="at once, from one seed (6)"
    )
    p.add_argument("--prompt", help="a recording that the user says first; then silence")
    p.add_argument("--seed", type=int, default=0, help="of the draws, for every arm (0)")
    p.add_argument("--temp", type=positive_float, help="temperature of the voice (0.8)")
    p.add_argument("--temp-text", type=positive_float, help="temperature of the text (0.7)")
    p.add_argument("--top-k", type=int, help="most likely codes to draw from (250; 0: all)")
    p.add_argument("--top-k-text", type=int, help="most likely text tokens (25; 0: all)")
    p.add_argument("--out", help="folder to make (runs/eval/<name of the checkpoint>-generate)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Sample, measure, compare, write and print.

    Raises:
        UserError: what the user has to change, in one line; nothing was written then.
        SystemExit: status 1 if a model's output was no number.
    """
    args = parse(argv)
    models = find_models(args)
    arms = [arm for arm in models.arms if arm.mode in MODES and arm.wider == 1]
    plan = _plan(args, models)
    out = next_folder(args.out, EVAL_RUNS / f"{models.name}-generate")
    mimi, tokenizer = _codec(models)
    say(f"{len(arms)} arms, {plan.streams} streams of {plan.frames} frames")

    before, began = memory_in_use(models.device), time.monotonic()
    found: dict[str, dict[str, Any]] = {}
    with tqdm(total=len(arms) * plan.frames, desc="sampling", unit="frame") as bar:
        for arm, lm in models.open(arms):
            bar.set_postfix_str(arm.name)
            stem = out / VOICES / arm.name
            run = run_free(lm, mimi, tokenizer, arm.mode, plan, stem, bar.update)
            p50, p95, p99 = run.times.percentiles()
            found[arm.name] = {
                "label": arm.label,
                "letter": arm.letter,
                "mode": arm.mode,
                "checkpoint": str(arm.checkpoint) if arm.checkpoint else None,
                "training": training_of(arm, models.main.base),
                "broken": run.broken,
                "files": run.files,
                "ms_per_frame": {"p50": p50, "p95": p95, "p99": p99},
                "late_frames": run.times.late,
                **measured(run, plan),
            }
            if run.broken:
                say(f"{arm.label}: {run.broken}; it ends there")
    results = summarise({arm.name: found[arm.name] for arm in arms}, plan, _reference(arms))
    seconds = round(time.monotonic() - began, 1)
    made = provenance("eval.generate", models.device) | {"seconds of sampling": seconds}
    results |= models.facts() | {"prompt": args.prompt, "facts": made}
    results["memory_bytes"] = {"start": before, "end": memory_in_use(models.device)}
    files = write(results, out, f"{models.name}, {args.minutes:g} minutes of free running")
    say(f"\n{render(results, as_text, by_bin=False)}\n")
    say("written: " + ", ".join(str(file) for file in (*files, out / VOICES)))
    if any(arm["broken"] for arm in found.values()):
        sys.exit(1)


def _plan(args: argparse.Namespace, models: Models) -> Plan:
    frames = round(args.minutes * 60 / FRAME_SECONDS)
    bin_frames = max(1, math.floor(args.bin_seconds / FRAME_SECONDS + 1e-6))
    if frames < bin_frames:
        raise UserError(
            f"--minutes {args.minutes:g} is shorter than a bin of {args.bin_seconds:g} s "
            "(--bin-seconds takes shorter ones)"
        )
    heard = torch.zeros(0) if args.prompt is None else user_channel(args.prompt, None)
    if len(heard) >= frames * FRAME:
        raise UserError(f"--prompt {args.prompt} is as long as --minutes {args.minutes:g}")
    start = models.main.base.info.lm_gen_config
    values = {k: v for k, v in start.items() if k in SAMPLING}
    values |= {k: getattr(args, k) for k in SAMPLING if getattr(args, k) is not None}
    try:
        sampling = Sampling(**values)
    except ValueError as error:
        raise UserError(str(error)) from error
    return Plan(frames, bin_frames, models.window, args.streams, args.seed, sampling, heard)


def _codec(models: Models) -> tuple[MimiModel, SentencePieceProcessor]:
    base = models.main.base
    try:
        return base.info.get_mimi(models.device), base.info.get_text_tokenizer()
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"base {base.name}: its codec or tokenizer is broken: {reason}") from error


def _reference(arms: list[Arm]) -> str:
    """The model without memory: trained on the same data if one was given, else the base."""
    return next((arm.name for arm in arms if arm.letter == "b"), BASE.name)


if __name__ == "__main__":
    run_cli(main, "it starts from the beginning")
