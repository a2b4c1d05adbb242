"""What is trained and how fast: groups, masters, schedules."""

import math
from dataclasses import replace

import pytest
import torch
from moshi.modules.lora import LoRALinear
from torch import nn

from finetune.args import DataArgs, LoraArgs, OptimArgs, TrainArgs
from finetune.optim import (
    Group,
    MasterAdamW,
    inner_lr_scale,
    parameter_groups,
    schedule,
    set_inner_loop,
)
from moshi_ttt.config import TTTConfig
from moshi_ttt.hybrid import splice
from moshi_ttt.lora import add_lora
from moshi_ttt.states import ttt_blocks
from tests.small import small_hybrid, small_lm

TTT = TTTConfig(layers="all", chunk_size=4, num_heads=2)


def args(**values):
    optim = OptimArgs(lr=1e-3, weight_decay=0.3, ttt_lr=2e-3, gate_lr=3e-3)
    given = {"data": DataArgs(train_data="a.jsonl"), "run_dir": "r", "optim": optim}
    return TrainArgs(**given | {"lora": LoraArgs(enable=True, rank=4), "ttt": TTT} | values)


def model(ttt=True, lora=True):
    lm = small_lm()
    if lora:
        add_lora(lm, 4, 2.0)
    if ttt:
        splice(lm, TTT)
    return lm


def names_of(lm, groups):
    names = {id(p): n for n, p in lm.named_parameters()}
    return {g.name: [names[id(p)] for p in g.params] for g in groups}


def test_lora_and_memory_in_groups_by_what_they_are():
    lm = model()
    groups = parameter_groups(lm, args())
    found = names_of(lm, groups)
    linears = [n for n, m in lm.named_modules() if isinstance(m, LoRALinear)]
    assert sorted(found["lora"]) == sorted(f"{n}.lora_{x}.weight" for n in linears for x in "AB")
    at = [f"transformer.layers.{i}.seq_modeling_block" for i in range(2)]
    assert found["gate"] == [f"{b}.gate" for b in at]
    projections = ("qkv_proj", "o_proj")
    assert found["memory"] == [f"{b}.memory.{p}.weight" for b in at for p in projections]
    rest = {n.rpartition(".")[2] for n in found["memory_no_decay"]}
    assert rest == {
        "W1", "b1", "W2", "b2", "gamma", "beta", "delta", "decay_logit", "out_scale",
        "lr_weight", "lr_bias", "conv_weight", "conv_bias",
    }  # fmt: skip
    settings = {g.name: (g.lr, g.weight_decay) for g in groups}
    assert settings == {
        "lora": (1e-3, 0.3),
        "memory": (2e-3, 0.3),
        "memory_no_decay": (2e-3, 0.0),
        "gate": (3e-3, 0.0),
    }
    trainable = {n for n, p in lm.named_parameters() if p.requires_grad}
    assert trainable == {n for group in found.values() for n in group}
    ours = sum(p.numel() for n, p in lm.named_parameters() if "seq_modeling_block" in n)
    assert sum(p.numel() for g in groups[1:] for p in g.params) == ours


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"ttt": None}, {"lora"}),
        ({"lora": LoraArgs()}, {"memory", "memory_no_decay", "gate"}),
        ({"lora": LoraArgs(enable=True, ft_embed=True), "ttt": None}, {"lora", "base_no_decay"}),
        ({"lora": LoraArgs(), "ttt": None, "full_finetuning": True}, {"base", "base_no_decay"}),
    ],
    ids=["lora", "memory", "embeddings", "full"],
)
def test_groups_of_each_mode(values, wanted):
    given = args(**values)
    lm = model(given.ttt is not None, given.lora.enable)
    groups = parameter_groups(lm, given)
    assert {g.name for g in groups} == wanted
    found = names_of(lm, groups)
    if given.lora.ft_embed:
        embeddings = [f"{n}.weight" for n, m in lm.named_modules() if isinstance(m, nn.Embedding)]
        assert sorted(found["base_no_decay"]) == sorted(embeddings)
        assert len(embeddings) == 16 + 1 + 1 + 7  # audio, text; depformer's text and audio
    if given.full_finetuning:
        assert all(p.requires_grad for p in lm.parameters())
        modules = dict(lm.named_modules())
        assert {type(modules[n.rpartition(".")[0]]) for n in found["base"]} == {
            type(m) for m in modules.values() if isinstance(m, nn.Linear)
        }
        assert any("norm" in n for n in found["base_no_decay"])


def test_a_parameter_that_no_group_has_stays_frozen_whatever_it_was():
    lm = model()
    lm.requires_grad_(True)
    parameter_groups(lm, args())
    assert not lm.text_linear.frozen_W.weight.requires_grad
    assert not lm.emb[0].weight.requires_grad


# -- AdamW ----------------------------------------------------------------------------------------


def optimizer(parameter, lr=1e-2, decay=0.1):
    return MasterAdamW([Group("g", lr, decay, [parameter])], (0.9, 0.95))


def test_float32_is_torchs_adamw():
    torch.manual_seed(1)
    mine = nn.Parameter(torch.randn(5, 3))
    theirs = nn.Parameter(mine.detach().clone())
    one = optimizer(mine)
    two = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(20):
        gradient = torch.randn(5, 3)
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        norm = one.step(1.0)
        assert norm == pytest.approx(gradient.norm().item())
        nn.utils.clip_grad_norm_([theirs], 1.0)
        two.step()
        assert mine.grad is None
        assert torch.equal(mine, theirs)


def test_small_updates_of_bfloat16_add_up():
    """An update of 1e-4 on 1.0 is lost in bfloat16 (next number: 1.0078); in a master it is not."""
    plain = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    lossy = torch.optim.AdamW([plain], lr=1e-4, weight_decay=0.0)
    mine = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    kept = optimizer(mine, 1e-4, 0.0)
    wide = nn.Parameter(torch.ones(4))
    exact = optimizer(wide, 1e-4, 0.0)
    for _ in range(200):
        for p in (plain, mine, wide):
            p.grad = torch.ones_like(p)
        lossy.step()
        kept.step(0.0)
        exact.step(0.0)
    assert (plain == 1).all()
    assert mine.dtype == torch.bfloat16
    assert torch.equal(mine, wide.to(torch.bfloat16))
    assert wide[0].item() == pytest.approx(0.98, abs=1e-4)


def test_one_norm_over_all_groups_and_dtypes():
    a = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    b = nn.Parameter(torch.zeros(2))
    both = MasterAdamW([Group("a", 1.0, 0.0, [a]), Group("b", 1.0, 0.0, [b])], (0.9, 0.95))
    a.grad, b.grad = torch.full_like(a, 3.0), torch.full_like(b, 4.0)
    assert both.step(1.0) == pytest.approx(math.sqrt(2 * 9 + 2 * 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_no_number_is_told_and_not_taken(dtype):
    p = nn.Parameter(torch.ones(2, dtype=dtype))
    adamw = optimizer(p)
    p.grad = torch.tensor([1.0, math.nan], dtype=dtype)
    assert math.isnan(adamw.step(1.0))
    assert (p == 1).all()
    assert p.grad is None
    assert adamw.is_finite()
    with torch.no_grad():
        p[0] = math.inf
    assert not adamw.is_finite()


# -- schedules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "start"), [(100, 0.05), (100, 0.3), (37, 0.1), (7, 0.5)])
def test_onecycle_is_torchs(steps, start):
    given = replace(args(), max_steps=steps, optim=OptimArgs(lr=1e-3, pct_start=start))
    adamw = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        adamw, max_lr=1e-3, total_steps=steps, pct_start=start
    )
    rate = schedule(given)
    for step in range(steps):
        assert 1e-3 * rate(step) == pytest.approx(adamw.param_groups[0]["lr"], rel=1e-9), step
        adamw.step()
        if step < steps - 1:
            theirs.step()
    assert rate(steps - 1) == pytest.approx(1 / 250_000)
    assert max(map(rate, range(steps))) <= 1


def test_cosine_rises_in_a_line_and_ends_at_a_hundredth():
    rate = schedule(
        replace(args(), max_steps=100, optim=OptimArgs(pct_start=0.1, schedule="cosine"))
    )
    assert [rate(s) for s in range(10)] == pytest.approx([(s + 1) / 10 for s in range(10)])
    falling = [rate(s) for s in range(9, 100)]
    assert falling == sorted(falling, reverse=True)
    assert rate(54) == pytest.approx(0.505)  # half-way
    assert rate(99) == pytest.approx(0.01)


@pytest.mark.parametrize("name", ["cosine", "onecycle"])
@pytest.mark.parametrize("start", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("steps", [1, 2, 3, 100])
def test_a_schedule_has_a_rate_for_every_step(name, start, steps):
    optim = OptimArgs(pct_start=start, schedule=name)
    rate = schedule(replace(args(), max_steps=steps, optim=optim))
    assert all(0 < rate(s) <= 1 for s in range(steps))


def test_the_inner_rate_rises_from_a_tenth():
    lm = small_hybrid()
    scale = inner_lr_scale(replace(args(), max_steps=100, optim=OptimArgs(pct_start=0.2)))
    assert scale(0) == pytest.approx(0.1)
    assert scale(10) == pytest.approx(0.55)
    assert scale(20) == scale(99) == 1
    set_inner_loop(lm, scale(10))
    assert [b.memory.lr_scale for b in ttt_blocks(lm).values()] == [scale(10)] * 2
