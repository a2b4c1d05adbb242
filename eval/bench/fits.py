"""`python -m eval.bench.fits`: what of Moshi 7B can be trained on which GPU, computed.

For each card, memory (its family's defaults) and segment: the largest micro-batch that fits, on one
GPU and on several (FSDP), for each LoRA rank. No GPU is needed and none is asked; the estimate is
that of `finetune.memory_use`, which is held against measured bytes on small shapes on the CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from moshi.models.lm import LMModel
from tqdm import tqdm

from eval.bench.gpu_train import largest_batch
from eval.provenance import provenance
from finetune.args import DataArgs, LoraArgs, TrainArgs
from finetune.load_args import load_args
from finetune.memory_use import Need, need_of, planned
from finetune.world import Rows
from moshi_ttt.config import TTTConfig
from moshi_ttt.errors import Parser, UserError, run_cli
from moshi_ttt.memory import MEMORIES

CARDS = {24: 24.0, 40: 39.6, 80: 79.2, 141: 140.4}
"""What a card is called, in GB -> GiB that a program is told it has."""
USABLE = 0.92
"""Part of a card that is counted on: a CUDA context, libraries and an allocator take theirs."""
GIB = 2**30
RESULTS = Path(__file__).parent / "results"
CONFIG = Path(__file__).parents[2] / "configs" / "7b.yaml"


def run_of(memory: str, rank: int, seconds: float, carry_kv: bool) -> TrainArgs:
    """A run with gradient checkpointing and one micro-batch a step.

    Args:
        memory: `"none"`, or a family and its layers, e.g. `"ttt_mlp every:4"`.
        rank: of LoRA.
        seconds: of a segment.
        carry_kv: as in `TrainArgs`.
    """
    family, _, layers = memory.partition(" ")
    return TrainArgs(
        data=DataArgs(train_data="none"),
        run_dir="none",
        lora=LoraArgs(enable=True, rank=rank),
        ttt=None if memory == "none" else TTTConfig(memory=family, layers=layers),
        duration_sec=seconds,
        carry_kv=carry_kv,
        gradient_checkpointing=True,
    )


def needed(plan: tuple[LMModel, int], args: TrainArgs, gpus: int, rows: int) -> int:
    """Bytes of a GPU with micro-batches of so many rows."""
    return need_of(*plan, args, Rows(rows, 1, gpus)).total


def largest(need: Callable[[int], int], card: int, most: int) -> dict[str, Any]:
    """The largest micro-batch on a card, and the bytes it needs; batch 0 where none fits."""
    there = USABLE * CARDS[card] * GIB
    batch = largest_batch(lambda rows: need(rows) <= there, most)
    return {"batch": batch, "bytes": need(max(1, batch))}


def compute(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each memory, LoRA rank, carry_kv, number of GPUs, segment and card."""
    rows: list[dict[str, Any]] = []
    kinds = [(m, r, kv) for m in args.memories for r in args.ranks for kv in (False, True)]
    for memory, rank, carry_kv in tqdm(kinds, desc="kinds of runs", file=sys.stderr):
        make = partial(run_of, memory, rank, carry_kv=carry_kv)
        plan = planned(None, make(seconds=1.0), 2)
        for seconds in args.seconds:
            for gpus in (1, args.gpus):
                need = cache(partial(needed, plan, make(seconds=seconds), gpus))
                for card in args.cards:
                    rows.append(
                        {"card": card, "memory": memory, "seconds": seconds, "rank": rank}
                        | {"gpus": gpus, "carry_kv": carry_kv, "source": "computed"}
                        | largest(need, card, args.most)
                    )
    return rows


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """The rows as Markdown: `a / b` is without and with carry_kv."""
    keys = ("card", "memory", "seconds", "rank", "gpus", "carry_kv")
    found = {tuple(row[key] for key in keys): row["batch"] for row in rows}
    columns = [(rank, gpus) for rank in args.ranks for gpus in (1, args.gpus)]
    heads = [f"rank {r}, {g} GPU{'s' if g > 1 else ''}" for r, g in columns]
    lines = [
        f"| card | memory | segment | {' | '.join(heads)} | |",
        f"| --- | --- | --- | {' | '.join('---' for _ in columns)} | --- |",
    ]

    def size(batch: int) -> str:
        return f"{batch}+" if batch == args.most else str(batch) if batch else "-"

    for card in args.cards:
        for memory in args.memories:
            for seconds in args.seconds:
                cells = []
                for rank, gpus in columns:
                    where = (card, memory, seconds, rank, gpus)
                    off, on = (size(found[(*where, carried)]) for carried in (False, True))
                    cells.append(off if off == on else f"{off} / {on}")
                lines.append(
                    f"| {card} GB | {memory} | {seconds:g} s | {' | '.join(cells)} | computed |"
                )
    return "\n".join(lines) + "\n"


def parts(need: Need) -> dict[str, int]:
    """Where the bytes go, in the order they are needed; the last is the peak."""
    a = need.activations
    return {
        "weights": need.weights,
        "gradients": need.gradients,
        "float32 masters": need.masters,
        "AdamW's moments": need.moments,
        "lanes, before and after a step": need.lanes,
        "kept: layers' inputs": a.temporal + a.depth,
        "kept: float32 log-probabilities": a.logits,
        "working: one layer made again, or the loss": a.working,
        "peak": need.total,
    }


def parts_table(args: TrainArgs) -> str:
    """The parts of a run on one GPU, without and with carry_kv, as Markdown."""
    columns = []
    for carry_kv in (False, True):
        run = replace(args, carry_kv=carry_kv)
        rows = Rows(run.batch_size, run.num_microbatches, 1)
        columns.append(parts(need_of(*planned(None, run, 2), run, rows)))
    lines = ["| part | GiB | with carry_kv |", "| --- | --- | --- |"]
    for name in columns[0]:
        off, on = (f"{column[name] / GIB:.2f}" for column in columns)
        lines.append(f"| {name} | {off} | {on} |")
    return "\n".join(lines) + "\n"


def write(folder: Path, text: str, rows: list[dict[str, Any]]) -> None:
    """fits.json and fits.md."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = provenance("eval.bench.fits") | {"machine": "none is measured: computed"}
    (folder / "fits.json").write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    listed = "".join(f"- {key}: `{value}`\n" for key, value in facts.items())
    (folder / "fits.md").write_text(f"{text}\n{listed}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute the table, print it and write it down.

    Raises:
        UserError: a value that makes no run.
    """
    parser = Parser("python -m eval.bench.fits", __doc__)
    parser.add_argument("--cards", nargs="+", type=int, default=list(CARDS), choices=list(CARDS))
    families = ["none", *MEMORIES]
    parser.add_argument("--memories", nargs="+", default=families, choices=families)
    parser.add_argument("--layers", nargs="+", default=["every:4"], help="that have the memory")
    parser.add_argument("--seconds", nargs="+", type=float, default=[25.0, 100.0, 240.0])
    parser.add_argument("--ranks", nargs="+", type=int, default=[64, 128], help="of LoRA")
    parser.add_argument("--gpus", type=int, default=8, help="of a run on several")
    parser.add_argument("--most", type=int, default=64, help="rows that are tried at most")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of fits.json, fits.md")
    args = parser.parse_args(arguments)
    if args.gpus < 2 or args.most < 1:
        raise UserError(f"--gpus must be above 1 ({args.gpus}) and --most above 0 ({args.most})")
    args.memories = [
        memory
        for family in args.memories
        for memory in (["none"] if family == "none" else [f"{family} {x}" for x in args.layers])
    ]
    try:
        rows = compute(args)
    except ValueError as error:
        raise UserError(str(error)) from error
    config = load_args(CONFIG)
    text = (
        "# What fits on which GPU\n\n"
        "**Everything here is computed; nothing was measured on a GPU yet.** Moshi 7B in bfloat16, "
        "LoRA, gradient checkpointing, one micro-batch a step; of a memory its family's defaults "
        f"({TTTConfig().chunk_size} frames a chunk). A number is the largest batch of a GPU (a row "
        f"is a lane; up to {args.most} were tried; - is none), "
        "`a / b` without and with `carry_kv` where that changes it. "
        f"{args.gpus} GPUs share weights, gradients and moments (FSDP); the batch is that of each. "
        f"Of a card {USABLE:.0%} is counted on. The estimate is held against bytes measured on "
        "the CPU at small shapes, within -5 % and +25 % (tests/finetune/test_measured.py); what "
        "CUDA kernels allocate inside is not in it.\n\n"
        + table(rows, args)
        + f"\nWhere the bytes go in configs/7b.yaml, {config.batch_size} rows of "
        f"{config.duration_sec:g} s in {config.num_microbatches} slots, on one GPU (computed):\n\n"
        + parts_table(config)
    )
    sys.stdout.write(text)
    write(args.out, text, rows)


if __name__ == "__main__":
    run_cli(main)
