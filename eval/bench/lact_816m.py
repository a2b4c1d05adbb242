"""`python -m eval.bench.lact_816m`: what a step of configs/lact_816m.yaml takes, by its length.

The bytes are computed for every length; with a CUDA device (or `--device`) two optimizer steps of
the real trainer, one row of random codes, are run at each, all weights trained, and the most that
was allocated is written beside. A length that does not fit is a row that says so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from eval.bench.gpu_model import Shape
from eval.bench.gpu_train import steps
from eval.provenance import provenance
from finetune.args import TrainArgs
from finetune.load_args import load_args
from finetune.memory_use import Need, need_of, planned
from finetune.model import build_model, find_base_of
from finetune.sizes import SIZES
from finetune.world import Rows
from moshi_ttt.errors import Parser, UserError, run_cli
from moshi_ttt.models import choose_device

RESULTS = Path(__file__).parent / "results"
CONFIG = Path(__file__).parents[2] / "configs/lact_816m.yaml"
LENGTHS = (4096, 8192, 16384, 32768)
GIB = 2**30
CARD = 80 * 10**9
"""Bytes of the card that is asked about."""
STEPS = 2
"""From the second on AdamW's moments are there when the backward is at its peak."""


def compute(args: TrainArgs, size: str, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Bytes of a step at each length, with gradient checkpointing and without."""
    width = 2 if args.param_dtype == "bfloat16" else 4
    lm, kv = planned(SIZES[size], args, width)
    rows = []
    for frames in lengths:
        for again in (True, False):
            run = replace(args, duration_sec=frames / 12.5, gradient_checkpointing=again)
            need = need_of(lm, kv, run, Rows(1, 1, 1))
            row = {"frames": frames, "checkpointing": again} | _parts(need)
            row |= {"parameters": need.parameters, "allocated": None, "step_seconds": None}
            row["mask"] = 10 * frames * -(-frames // 16) * 16
            rows.append(row)
    return rows


def _parts(need: Need) -> dict[str, int]:
    acts = need.activations
    return {
        "estimated": need.total,
        "resident": need.resident,
        "kept": acts.temporal + acts.depth,
        "logits": acts.logits,
        "working": acts.working,
    }


def run(args: TrainArgs, rows: list[dict[str, Any]], device: torch.device) -> None:
    """Run steps at the lengths of the rows with checkpointing; adds peak and seconds to them."""
    lm, _ = build_model(find_base_of(args), args, device)
    for row in tqdm([r for r in rows if r["checkpointing"]], file=sys.stderr, unit="length"):
        seconds = row["frames"] / 12.5
        now = replace(args, duration_sec=seconds, batch_size=1, num_microbatches=1)
        assert args.ttt is not None
        shape = Shape("lact_816m", {}, lm.dtype, args.ttt, seconds=seconds)
        done = steps(lm, now, shape, 1, STEPS)
        row["ran"] = done is not None
        if done is not None:
            row |= {k: done[k] for k in ("allocated", "step_seconds")}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""

    def gib(value: int | None) -> str:
        return "" if value is None else f"{value / GIB:.1f}"

    lines = [
        "| frames | minutes | checkpointing | computed GiB | weights, gradients, AdamW, lanes "
        "| kept by layers | log-probabilities | working | one layer's mask, for a moment "
        "| fits 80 GB | measured peak GiB | s a step |",
        "| " + " | ".join(["---"] * 12) + " |",
    ]
    for r in rows:
        parts = [gib(r[k]) for k in ("resident", "kept", "logits", "working", "mask")]
        fits = "yes" if r["estimated"] < CARD else "NO"
        if "ran" in r:
            measured = gib(r["allocated"]) if r["ran"] else "did not fit"
        else:
            measured = "not yet run on a GPU" if r["checkpointing"] else ""
        spent = "" if r["step_seconds"] is None else f"{r['step_seconds']:.2f}"
        lines.append(
            f"| {r['frames']} | {r['frames'] / 750:.1f} | {'yes' if r['checkpointing'] else 'no'} "
            f"| {gib(r['estimated'])} | {' | '.join(parts)} | {fits} (computed) | {measured} "
            f"| {spent} |"
        )
    return "\n".join(lines) + "\n"


def page(args: TrainArgs, rows: list[dict[str, Any]]) -> str:
    """The results as a page."""
    millions, dtype = rows[0]["parameters"] / 1e6, args.param_dtype
    measured = any("ran" in row for row in rows)
    note = (
        ""
        if measured
        else "**Computed; not yet run on a GPU.** With a CUDA device the same command runs two "
        "steps at each length with checkpointing and writes their peak beside.\n\n"
    )
    return (
        "# What a step of configs/lact_816m.yaml takes, by its length\n\n"
        f"{millions:.1f} M parameters in {dtype}, all trained (embeddings, depformer and memory "
        "among them), float32 masters and moments, one row of random codes, one micro-batch. The "
        "estimate is held against bytes measured on the CPU at small shapes, within -5 % and +25 % "
        "(tests/finetune/test_measured.py); what CUDA kernels allocate inside is not in it. "
        "`working` is what the backward needs beyond what is kept; a layer's mask takes the place "
        "of the log-probabilities and the depformer's part, which are gone by then.\n\n"
        + note
        + table(rows)
        + "\nWhat grows with the square of the length is stock attention: each layer makes a mask "
        "of T x T whatever its window, 8 T^2 bytes of int64 distances and about 2 T^2 of booleans "
        "for a moment, and one of the compute dtype that without checkpointing every one of the "
        "layers keeps until its backward. Everything else, the memory with it, grows with the "
        "length itself. A recording of 32768 frames does not have to be one segment: lanes pass "
        "the memory's state on, so `duration_sec: 327.68` reads it in eight segments of 4096 "
        "frames at the bytes of a segment of 4096 (gradients do not flow from one segment to the "
        "next, and attention starts empty in each unless `carry_kv` is set).\n\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute, run where there is a GPU, print and write down.

    Raises:
        UserError: lengths below 1, no such device, or a config with a base.
    """
    parser = Parser("python -m eval.bench.lact_816m", __doc__)
    parser.add_argument("--config", type=Path, default=CONFIG, help="another size's config")
    parser.add_argument("--device", help="where steps are run (cuda if there is one, else none)")
    parser.add_argument("--frames", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the results")
    given = parser.parse_args(arguments)
    args = load_args(given.config)
    size = args.moshi_paths.size
    if size is None or args.ttt is None:
        raise UserError(f"{given.config}: a memory in a model of a moshi_paths.size is wanted")
    if min(given.frames) < 1:
        raise UserError(f"--frames must be above 0, got {given.frames}")
    device = None
    if given.device or torch.cuda.is_available():
        device = choose_device(given.device)
    rows = compute(args, size, given.frames)
    if device is not None:
        run(args, rows, device)
    text = page(args, rows)
    sys.stdout.write(text)
    facts = provenance("eval.bench.lact_816m", device)
    if device is None:
        facts["machine"] = "none is measured: computed"
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "lact_816m.json").write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    listed = "".join(f"- {key}: `{value}`\n" for key, value in facts.items())
    (given.out / "lact_816m.md").write_text(text + listed)


if __name__ == "__main__":
    run_cli(main)
