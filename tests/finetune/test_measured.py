"""The bytes that are estimated, held against bytes that are measured, on small shapes."""

from dataclasses import dataclass, replace

import pytest
import torch
from moshi.models.loaders import _lm_kwargs

from finetune.args import DataArgs, LoraArgs, TrainArgs
from finetune.data.loader import Batch
from finetune.live_bytes import LiveBytes, kept, storages
from finetune.loss import LossWeights, TeacherForced, loss_sums
from finetune.memory_use import estimate
from finetune.optim import MasterAdamW, parameter_groups
from finetune.step import train_step
from moshi_ttt.config import TTTConfig
from moshi_ttt.hybrid import carry_kv, splice
from moshi_ttt.lanes import attach_lanes, lanes_of, named_tensors, use_slot
from moshi_ttt.lora import add_lora
from moshi_ttt.states import ttt_blocks
from tests.small import LM_KWARGS, small_lm

TOO_LITTLE, TOO_MUCH = -0.05, 0.25
"""How far an estimate may be from what is measured, in parts of it."""
SHAPE = {"dim": 64, "depformer_dim_feedforward": 64}
CONFIG = {**_lm_kwargs, **LM_KWARGS, **SHAPE}
MLP, LINEAR, LACT, ATLAS = (
    TTTConfig(memory=m, layers="all", chunk_size=4, num_heads=2)
    for m in ("ttt_mlp", "ttt_linear", "lact", "atlas")
)
BASE = TrainArgs(
    data=DataArgs(train_data="random"), run_dir="none", lora=LoraArgs(enable=True, rank=4),
    ttt=MLP, duration_sec=2.0, batch_size=2, gradient_checkpointing=False,
)  # fmt: skip
NO_LORA = LoraArgs()
CASES = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "long": {"duration_sec": 16.0},
    "long, checkpointing": {"duration_sec": 16.0, "gradient_checkpointing": True},
    "4 rows": {"batch_size": 4, "gradient_checkpointing": True},
    "3 slots": {"num_microbatches": 3},
    "carry_kv": {"carry_kv": True},
    "carry_kv, checkpointing": {"carry_kv": True, "gradient_checkpointing": True},
    "2 segments": {"tbptt_segments": 2},
    "2 segments, all": {
        "tbptt_segments": 2, "carry_kv": True, "gradient_checkpointing": True,
        "num_microbatches": 2, "duration_sec": 4.0,
    },
    "memory only": {"lora": NO_LORA},
    "memory only, last layer": {"lora": NO_LORA, "ttt": replace(MLP, layers=(1,))},
    "memory only, checkpointing": {"lora": NO_LORA, "gradient_checkpointing": True},
    "linear": {"ttt": LINEAR},
    "linear, checkpointing": {
        "ttt": LINEAR, "gradient_checkpointing": True, "duration_sec": 4.0
    },
    "after attention": {"ttt": replace(MLP, placement="after_attention", chunk_size=16)},
    "narrow heads": {"ttt": replace(MLP, head_dim=16, conv_width=1)},
    "shared projection": {"ttt": replace(MLP, projection="shared")},
    "shared projection, checkpointing": {
        "ttt": replace(MLP, projection="shared", placement="after_attention"),
        "gradient_checkpointing": True,
    },
    "writing off": {"ttt": replace(MLP, writing=False)},
    "lact": {"ttt": LACT},
    "lact, checkpointing": {"ttt": LACT, "gradient_checkpointing": True},
    "lact, stacked": {"ttt": replace(LACT, stacked=2, residual=True, low_rank=0, chunk_size=16)},
    "lact, wide heads": {
        "ttt": replace(LACT, head_dim=48, placement="after_attention"),
        "gradient_checkpointing": True,
    },
    "lact, plain": {"ttt": replace(LACT, muon=False, momentum=False, conv_width=4)},
    "lact, shared projection": {"ttt": replace(LACT, projection="shared")},
    "lact, long": {"ttt": replace(LACT, chunk_size=20), "duration_sec": 8.0},
    "lact, memory only": {"ttt": replace(LACT, projection="shared"), "lora": NO_LORA},
    "atlas": {"ttt": ATLAS},
    "atlas, checkpointing": {"ttt": ATLAS, "gradient_checkpointing": True},
    "atlas, linear": {"ttt": replace(ATLAS, deep=False, window=1, polynomial="none")},
    "atlas, muon": {
        "ttt": replace(ATLAS, muon=True, placement="after_attention"), "duration_sec": 1.2
    },
    "atlas, muon, checkpointing": {
        "ttt": replace(ATLAS, muon=True), "gradient_checkpointing": True, "duration_sec": 1.2
    },
    "atlas, outer": {"ttt": replace(ATLAS, polynomial="outer", outer_rank=8)},
    "atlas, 2 segments": {
        "ttt": ATLAS, "tbptt_segments": 2, "gradient_checkpointing": True, "duration_sec": 4.0
    },
    "lact, 2 segments": {"ttt": LACT, "tbptt_segments": 2},
    "no memory": {"ttt": None},
    "no memory, checkpointing": {"ttt": None, "gradient_checkpointing": True},
    "embeddings": {"lora": LoraArgs(enable=True, rank=4, ft_embed=True)},
    "all of the base": {"lora": NO_LORA, "full_finetuning": True},
    "all of the base, checkpointing, 2 slots": {
        "lora": NO_LORA, "full_finetuning": True, "gradient_checkpointing": True,
        "num_microbatches": 2, "batch_size": 1,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Bytes: of the parts, and the most that was there during a whole step."""

    parts: dict[str, int]
    total: int


def build(args, width):
    dtype = torch.bfloat16 if width == 2 else torch.float32
    lm = small_lm(**SHAPE).to(dtype)
    if args.lora.enable:
        add_lora(lm, args.lora.rank, args.lora.scaling)
    if args.ttt is not None:
        splice(lm, args.ttt)
        for block in ttt_blocks(lm).values():
            block.memory.cast_projections(dtype)
    lm.transformer.checkpointing = lm.depformer.checkpointing = args.gradient_checkpointing
    if args.carry_kv:
        carry_kv(lm)
    return lm.train()


def measure(args, width):
    """A step in the middle of a run: every lane has heard something, and not as much."""
    lm = build(args, width)
    groups = parameter_groups(lm, args)
    optimizer = MasterAdamW(groups, args.optim.betas)
    trained = [p for group in groups for p in group.params]
    attach_lanes(lm, args.batch_size, args.num_microbatches)
    model, rows, T = TeacherForced(lm), args.batch_size, round(12.5 * args.duration_sec)

    def batch(begins=False):
        codes = torch.randint(0, lm.card, (rows, lm.num_codebooks, T + 1))
        known, starts = torch.ones(rows, T, dtype=torch.bool), torch.full((rows,), begins)
        return Batch(codes, known, starts, ("random",) * rows, (0,) * rows, (T,) * rows)

    ticks = [[batch() for _ in range(args.num_microbatches)] for _ in range(args.tbptt_segments)]

    def step():
        train_step(model, ticks, optimizer, LossWeights(), max_norm=1.0)

    step()
    if args.ttt is not None and args.batch_size > 1:
        for slot in range(args.num_microbatches):
            use_slot(lm, slot)
            for lanes in lanes_of(lm).values():
                lanes.reset(torch.arange(rows) == 0)
        step()
    parts = {"weights": held(lm.parameters())}
    parts["masters"] = held(m for p, m in optimizer.pairs if m is not p)
    states = optimizer.adamw.state.values()
    parts["moments"] = held(x for s in states for n, x in s.items() if n != "step")
    parts["lanes"] = lanes = held(
        x for ls in lanes_of(lm).values() for v in ls.values for _, x in named_tensors(v)
    )
    use_slot(lm, 0)
    first = ticks[0][0]
    with kept(lm.parameters()) as found:
        loss = sum(loss_sums(model, first.sequence, first.text_mask, LossWeights())[:2])
    parts["activations"] = found.bytes
    loss.backward()
    parts["gradients"] = held(p.grad for p in trained if p.grad is not None)
    optimizer.clear()
    del loss, found
    with LiveBytes() as live:
        step()
    there = parts["weights"] + parts["masters"] + parts["moments"] + lanes
    parts["lanes"] = 2 * lanes  # a step that fails is taken back
    return Measured(parts, there + live.peak)


def held(tensors):
    return sum(storages(tensors).values())


def close(estimated, measured):
    return 1 + TOO_LITTLE <= estimated / measured <= 1 + TOO_MUCH


def check(args, width):
    torch.manual_seed(0)
    need, real = estimate(CONFIG, args, width), measure(args, width)
    parts = {name: getattr(need, name) for name in real.parts} | {
        "activations": need.activations.kept
    }
    off = {
        name: f"{parts[name]:,} estimated, {value:,} measured"
        for name, value in real.parts.items()
        if (not close(parts[name], value) if value else parts[name])
    }
    assert not off
    assert parts["weights"] == real.parts["weights"]
    assert parts["moments"] == real.parts["moments"]
    assert close(need.total, real.total), f"{need.total:,} estimated, {real.total:,} measured"


PAIRS = {
    "3 slots", "4 rows", "writing off", "narrow heads", "long", "long, checkpointing",
    "carry_kv, checkpointing", "memory only, checkpointing", "shared projection, checkpointing",
    "lact, wide heads", "lact, stacked", "lact, plain", "lact, long", "lact, memory only",
    "lact, 2 segments", "atlas, linear", "atlas, outer", "atlas, muon, checkpointing",
}  # fmt: skip
"""What other cases have each half of."""


def cases(names, slow):
    return [pytest.param(n, marks=[pytest.mark.slow] if n in slow else []) for n in names]


@pytest.mark.parametrize("name", cases(CASES, PAIRS))
def test_the_estimate_is_what_is_measured(name):
    check(replace(BASE, **CASES[name]), 4)


@pytest.mark.parametrize(
    "name",
    cases(
        ["plain", "checkpointing", "linear", "lact", "atlas", "no memory, checkpointing"],
        ["plain", "linear", "atlas"],
    ),
)
def test_in_bfloat16_too(name):
    check(replace(BASE, **CASES[name]), 2)


def test_gradients_of_the_only_micro_batch_come_one_after_the_other():
    """The estimate has all of them there from the start, as they are for every later one."""
    values = {"lora": NO_LORA, "full_finetuning": True, "ttt": None, "gradient_checkpointing": True}
    args = replace(BASE, duration_sec=4.0, **values)
    need, real = estimate(CONFIG, args, 4), measure(args, 4)
    assert real.total < need.total
    assert close(need.total - need.gradients, real.total)
