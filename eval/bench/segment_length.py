"""`python -m eval.bench.segment_length`: bytes and time of a training segment against its length.

One row of random codes, forward and backward, LoRA everywhere, nothing else that learns but the
memory: the base alone and with each memory, with and without gradient checkpointing. What the
memory adds must not grow faster with the length than the base's own bytes; else the status is 1.

On the CPU a small width in float32, every tensor counted; a segment of 32768 frames takes 16 GB and
minutes for each of its runs, all of it attention, so ask for it with `--frames`. With
`--device cuda` Moshi 7B's shape in bfloat16 with random weights, as the GPU's allocator counts; a
length that does not fit is a row that says so.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("NO_TORCH_COMPILE", "1")  # before moshi is imported: compiling takes minutes

import torch
from moshi.models import loaders
from moshi.models.lm import LMModel
from torch import Tensor
from tqdm import tqdm

from eval.bench.gpu_model import MOSHI_7B, Shape, add_memory, build, clean, synchronise
from eval.bench.gpu_train import out_of_memory
from eval.bench.segment_table import holds, judge, page
from eval.provenance import provenance
from finetune.activations import Pass, activations
from finetune.args import DataArgs, LoraArgs, TrainArgs
from finetune.live_bytes import LiveBytes
from finetune.loss import LossWeights, TeacherForced, loss_sums
from finetune.optim import parameter_groups
from moshi_ttt.config import TTTConfig
from moshi_ttt.errors import Parser, UserError, run_cli
from moshi_ttt.hybrid import HybridLMModel, unsplice
from moshi_ttt.lora import add_lora
from moshi_ttt.memory import MEMORIES
from moshi_ttt.models import choose_device

RESULTS = Path(__file__).parent / "results"
_NARROW = {
    "dim": 64, "num_heads": 1, "num_layers": 1, "text_card": 64, "card": 64,
    "depformer_dim": 16, "depformer_dim_feedforward": 32, "depformer_num_heads": 2,
    "depformer_num_layers": 1,
}  # fmt: skip
NARROW = Shape(
    "width 64, 1 layer with a memory, window 3000",
    {**loaders._lm_kwargs, **_NARROW},
    torch.float32,
    TTTConfig(layers="all"),
    rank=8,
)


@dataclass(frozen=True)
class Variant:
    """What is run: a family or None for the base alone, and whether layers keep inputs only."""

    memory: str | None
    checkpointing: bool


def dress(lm: LMModel, shape: Shape, variant: Variant) -> None:
    """Put a variant's memory, and no other, into a model with LoRA; free what is trained."""
    if isinstance(lm, HybridLMModel):
        unsplice(lm)
    ttt = None
    if variant.memory is not None:
        ttt = TTTConfig(memory=variant.memory, layers=shape.ttt.layers)
        add_memory(lm, replace(shape, ttt=ttt))
    lora = LoraArgs(enable=True, rank=shape.rank)
    run = TrainArgs(data=DataArgs(train_data="random"), run_dir="none", lora=lora, ttt=ttt)
    parameter_groups(lm, run)
    assert lm.depformer is not None
    lm.transformer.checkpointing = lm.depformer.checkpointing = variant.checkpointing
    lm.train()


def loss_of(lm: LMModel, frames: int) -> Tensor:
    """Loss of a row of random codes."""
    codes = torch.randint(min(lm.card, lm.text_card), (1, lm.num_codebooks, frames + 1))
    known = torch.ones(1, frames, dtype=torch.bool)
    device, weights = lm.device, LossWeights()
    text, audio, _ = loss_sums(TeacherForced(lm), codes.to(device), known.to(device), weights)
    return text + audio


def clear(lm: LMModel) -> None:
    """Drop all gradients."""
    for parameter in lm.parameters():
        parameter.grad = None


def count(lm: LMModel, frames: int) -> dict[str, int]:
    """Bytes kept when a forward is done, and the most until its backward is; gradients in it."""
    clear(lm)
    clean(lm.device)
    if lm.device.type == "cuda":
        before = torch.cuda.memory_allocated(lm.device)
        loss = loss_of(lm, frames)
        kept = torch.cuda.memory_allocated(lm.device) - before
        loss.backward()
        peak = torch.cuda.max_memory_allocated(lm.device) - before
    else:
        with LiveBytes() as live:
            loss = loss_of(lm, frames)
            kept = live.now
            loss.backward()
        peak = live.peak
    return {"kept": kept, "peak": peak}


def seconds(lm: LMModel, frames: int) -> float:
    """Seconds of a forward and backward: wall time of a GPU, CPU time of a CPU."""
    clear(lm)
    synchronise(lm.device)
    clock = time.perf_counter if lm.device.type == "cuda" else time.process_time
    begin = clock()
    loss_of(lm, frames).backward()
    synchronise(lm.device)
    return clock() - begin


def available() -> float:
    """Bytes that may be taken of the machine's memory: 90 % of what is left."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        left = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        if left is not None:
            return 0.9 * 1024 * int(left[1])
    return 0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def needs(lm: LMModel, shape: Shape, frames: int, variant: Variant) -> dict[str, int]:
    """Bytes of a segment as estimated: the peak; and what temporal layers keep without masks."""
    run = Pass(1, frames, shape.dtype, shape.rank, False, False, variant.checkpointing, False)
    need, masks = activations(lm, run), mask_bytes(lm, frames)
    masks = 0 if variant.checkpointing else masks
    layers = need.temporal - masks
    return {"estimated": need.kept + need.working, "mask": masks, "layers": layers}


def measure(
    shape: Shape,
    device: torch.device,
    memories: Sequence[str],
    lengths: Sequence[int],
    rounds: int,
) -> list[dict[str, Any]]:
    """A row for each length and variant; the variants take turns in every round of timing.

    From the second length on the rounds are fewer, as a round takes longer; one at least, and in
    turns: times of one round are comparable, those of different rounds only roughly.
    """
    torch.manual_seed(0)
    lm = build(shape, device)
    with torch.device(device):
        add_lora(lm, shape.rank, 2.0)
    variants = [Variant(m, c) for c in (False, True) for m in (None, *memories)]
    rows = []
    shares = [max(1, round(rounds * lengths[0] / frames)) for frames in lengths]
    bar = tqdm(total=len(variants) * sum(1 + s for s in shares), file=sys.stderr, unit="run")
    for frames, share in zip(lengths, shares, strict=True):
        here = []
        for variant in variants:
            row = {"frames": frames, "memory": variant.memory, "rounds": share}
            row |= {"checkpointing": variant.checkpointing, "kept": None, "peak": None}
            dress(lm, shape, variant)
            row |= needs(lm, shape, frames, variant)
            if device.type == "cuda" or row["estimated"] < available():
                try:
                    row |= count(lm, frames)
                except RuntimeError as error:
                    if not out_of_memory(error):
                        raise
            here.append(row)
            bar.update()
        times: list[list[float]] = [[] for _ in variants]
        for _ in range(share):
            for variant, row, taken in zip(variants, here, times, strict=True):
                if row["kept"] is not None:
                    dress(lm, shape, variant)
                    taken.append(seconds(lm, frames))
                bar.update()
        for row, taken in zip(here, times, strict=True):
            base = times[variants.index(Variant(None, row["checkpointing"]))]
            both = taken and base
            row["seconds"] = statistics.median(taken) if taken else None
            ratios = [a / b for a, b in zip(taken, base, strict=True)] if both else []
            row["ratio"] = statistics.median(ratios) if ratios else None
        rows += here
    bar.close()
    judge(rows)
    return rows


def mask_bytes(lm: LMModel, frames: int) -> int:
    """What attention's masks take of the bytes kept without checkpointing: T x T a layer."""
    return len(lm.transformer.layers) * lm.dtype.itemsize * frames * -(-frames // 16) * 16


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write it down.

    Raises:
        UserError: lengths that do not grow, or no such device.
        SystemExit: status 1, a memory grows faster than the base.
    """
    parser = Parser("python -m eval.bench.segment_length", __doc__)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for the 7B's shape")
    parser.add_argument("--frames", nargs="+", type=int, default=[2048, 4096, 8192, 16384])
    families = list(MEMORIES)
    parser.add_argument("--memories", nargs="+", default=families, choices=families)
    parser.add_argument("--rounds", type=int, default=5, help="of timing, at the first length")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the results")
    args = parser.parse_args(arguments)
    if args.rounds < 1 or args.frames[0] < 1 or any(b <= a for a, b in pairwise(args.frames)):
        raise UserError(f"--frames must grow ({args.frames}), --rounds be above 0 ({args.rounds})")
    device = choose_device(args.device)
    gpu = device.type == "cuda"
    shape = MOSHI_7B if gpu else NARROW
    torch.set_num_threads(1)
    rows = measure(shape, device, args.memories, args.frames, args.rounds)
    text = page(shape, gpu, rows)
    sys.stdout.write(text)
    facts = provenance("eval.bench.segment_length", device)
    args.out.mkdir(parents=True, exist_ok=True)
    name = "segment_length_gpu" if gpu else "segment_length"
    (args.out / f"{name}.json").write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    listed = "".join(f"- {key}: `{value}`\n" for key, value in facts.items())
    (args.out / f"{name}.md").write_text(text + listed)
    if any(holds(row) is False for row in rows):
        sys.stderr.write("a memory's bytes grow faster than the base's\n")
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
