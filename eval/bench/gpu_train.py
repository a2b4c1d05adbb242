"""Training for `eval.bench.gpu_check`: the largest batch that fits, its speed and its memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from moshi.models.lm import LMModel

from eval.bench.gpu_model import Shape, clean, peaks, synchronise
from finetune.args import DataArgs, LoraArgs, TrainArgs
from finetune.data.loader import Batch
from finetune.loss import LossWeights, TeacherForced
from finetune.optim import MasterAdamW, parameter_groups
from finetune.step import train_step
from moshi_ttt.lanes import attach_lanes, detach_lanes


def largest_batch(fits: Callable[[int], bool], most: int) -> int:
    """The largest size in 1..most that fits, by doubling and then halving the gap; 0 if none."""
    good, size = 0, 1
    while good < most and fits(size):
        good, size = size, min(2 * size, most)
    bad = size if good < most else most + 1
    while bad - good > 1:
        size = (good + bad) // 2
        good, bad = (size, bad) if fits(size) else (good, size)
    return good


def train(lm: LMModel, shape: Shape, *, memory: bool) -> dict[str, Any]:
    """Steps of the real trainer on random codes, LoRA with or without memory, largest batch."""
    args = TrainArgs(
        data=DataArgs(train_data="random"),
        run_dir="none",
        lora=LoraArgs(enable=True, rank=shape.rank),
        ttt=shape.ttt if memory else None,
        duration_sec=shape.seconds,
    )
    lm.train()
    lm.transformer.checkpointing = True
    assert lm.depformer is not None
    lm.depformer.checkpointing = True
    rows = largest_batch(lambda b: steps(lm, args, shape, b, 1) is not None, shape.max_batch)
    row: dict[str, Any] = {
        "memory": memory,
        "batch": rows,
        "most": shape.max_batch,
        "seconds": shape.seconds,
        "trained": sum(p.numel() for g in parameter_groups(lm, args) for p in g.params),
        "tokens_per_second": None,
        "step_seconds": None,
        "allocated": None,
        "reserved": None,
    }
    if rows:
        row |= steps(lm, args, shape, rows, shape.steps) or {}
    lm.requires_grad_(False).eval()
    return row


def steps(
    lm: LMModel, args: TrainArgs, shape: Shape, rows: int, count: int
) -> dict[str, Any] | None:
    """`timed`, from clean memory to clean memory; None if the steps do not fit in it."""
    clean(lm.device)
    done = None
    try:
        done = timed(lm, args, shape, rows, count)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    for parameter in lm.parameters():
        parameter.grad = None
    detach_lanes(lm)
    clean(lm.device)
    return done


def out_of_memory(error: RuntimeError) -> bool:
    """Whether the GPU's memory was too small; libraries below torch say it in words only."""
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or (
        "out of memory" in words or "alloc_failed" in words
    )


def timed(lm: LMModel, args: TrainArgs, shape: Shape, rows: int, count: int) -> dict[str, Any]:
    """Time `count` optimizer steps at `rows` rows of random codes."""
    device, frames = lm.device, shape.frames
    optimizer = MasterAdamW(parameter_groups(lm, args), args.optim.betas)
    weights = LossWeights(args.first_codebook_weight_multiplier, args.text_padding_weight)
    codes = torch.randint(lm.card, (rows, lm.num_codebooks, frames + 1))
    codes[:, 0] = torch.randint(lm.text_card, (rows, frames + 1))
    known = torch.ones(rows, frames, dtype=torch.bool)
    begins = torch.ones(rows, dtype=torch.bool)
    batch = Batch(codes, known, begins, ("random codes",) * rows, (0,) * rows, (frames,) * rows)
    attach_lanes(lm, rows)
    seconds, tokens = [], 0
    for _ in range(count):
        synchronise(device)
        begin = time.perf_counter()
        done = train_step(TeacherForced(lm), [[batch]], optimizer, weights, max_norm=args.max_norm)
        synchronise(device)
        seconds.append(time.perf_counter() - begin)
        tokens = done.tokens
    median = statistics.median(seconds)
    return {"tokens_per_second": tokens / median, "step_seconds": median, **peaks(device)}
