"""The gate regulariser: its gradient, its schedule, and that it is off unless asked for."""

import pytest
import torch

from finetune.gate_reg import gate_penalty, gate_weight, push_gates
from finetune.load_args import load_args
from finetune.step import memory_metrics
from moshi_ttt.errors import UserError
from moshi_ttt.states import ttt_blocks
from tests.finetune.small_run import LORA_ONLY, lines, weights
from tests.finetune.test_loss import batch
from tests.finetune.test_step import CUTS, ROWS, double, step
from tests.small import small_hybrid


def gates_of(lm):
    return [block.gate for block in ttt_blocks(lm).values()]


def test_the_gradient_is_that_of_the_term():
    lm = small_hybrid().double()
    gates = gates_of(lm)
    (0.3 * gate_penalty(torch.cat(gates))).backward()
    want = [gate.grad for gate in gates]
    for gate in gates:
        gate.grad = torch.ones_like(gate)
    push_gates(lm, 0.3)
    for gate, gradient in zip(gates, want, strict=True):
        assert torch.allclose(gate.grad, 1 + gradient, rtol=1e-12, atol=1e-15)
        assert gradient.abs().max() > 0


def test_it_pushes_away_from_one_half_whatever_the_sign():
    lm = small_hybrid()
    gate = gates_of(lm)[0]
    half = torch.atanh(torch.tensor(0.5)).item()
    with torch.no_grad():
        gate.zero_()
        gate[:6] = torch.tensor([0.1, half + 0.1, -0.1, -half - 0.1, half, 0.0])
    gate.grad = torch.zeros_like(gate)
    push_gates(lm, 1.0)
    down = (-gate.grad).sign()  # the way that a step goes: less open, more open
    assert down[:4].tolist() == [-1, 1, 1, -1]
    assert gate.grad[4:].abs().max() < 1e-6


def test_a_gate_that_takes_no_part_is_left_alone():
    lm = small_hybrid()
    push_gates(lm, 1.0)
    assert all(gate.grad is None for gate in gates_of(lm))


def test_how_a_batch_is_cut_changes_nothing():
    found = {name: step(double(), cut, gate_weight=2.0) for name, cut in CUTS.items()}
    plain, without = step(double(), CUTS["1x4"])
    want, gradients = found["1x4"]
    assert want.loss == plain.loss
    assert want.grad_norm != plain.grad_norm
    moved = 0
    for got, grads in found.values():
        assert got.loss == pytest.approx(want.loss, rel=1e-12)
        for name, gradient in grads.items():
            bound = 1e-7 * (1 + gradients[name].abs().max())
            assert (gradient - gradients[name]).abs().max() < bound, name
    for name, gradient in gradients.items():
        if torch.equal(gradient, without[name]):
            continue
        assert name.endswith("gate")
        moved += 1
    assert moved == 2


def test_the_weight_rises_in_a_line_and_stays(world):
    args = load_args(
        world.config,
        {"gate_reg.weight": 0.2, "gate_reg.warmup_steps": 4, "memory_start_step": 2,
         "max_steps": 20},
    )  # fmt: skip
    weight = gate_weight(args)
    assert [weight(s) for s in (1, 2, 3, 4, 6, 7, 20)] == pytest.approx(
        [0, 0, 0.05, 0.1, 0.2, 0.2, 0.2]
    )
    off = gate_weight(load_args(world.config, {}))
    assert off(1) == off(20) == 0.0


def test_off_is_training_as_it_was_and_on_is_not(world, tmp_path):
    keys = {"max_steps": 3, "memory_start_step": 1}
    plain = world.run(tmp_path / "plain", **keys)
    off = world.run(tmp_path / "off", gate_reg__weight=0.0, gate_reg__warmup_steps=2, **keys)
    on = world.run(tmp_path / "on", gate_reg__weight=50.0, gate_reg__warmup_steps=2, **keys)
    want, same, other = weights(plain), weights(off), weights(on)
    assert all(torch.equal(t, same[k]) for k, t in want.items())
    assert any(not torch.equal(t, other[k]) for k, t in want.items() if k.endswith("gate"))
    assert "gate_reg" not in lines(off)[0]
    found = lines(on)
    assert "gate_reg" not in found[0]  # the memory takes no part yet
    assert found[2]["gate_reg"] > 0
    assert [a["loss"] for a in found[:2]] == [b["loss"] for b in lines(plain)[:2]]


def test_the_term_is_a_metric_of_its_own():
    lm = small_hybrid()
    result, _ = step(lm, [batch(*ROWS)])
    raw = torch.cat(gates_of(lm)).detach()
    found = memory_metrics(lm, result, gate_weight=0.5)
    assert found["gate_reg"] == pytest.approx(0.5 * float(gate_penalty(raw)))
    assert "gate_reg" not in memory_metrics(lm, result)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"gate_reg.weight": -1}, "gate_reg.weight must be at least 0, got -1"),
        ({"gate_reg.warmup_steps": 0}, "gate_reg.warmup_steps must be at least 1, got 0"),
        ({"gate_reg.weight": 1, **LORA_ONLY}, "gate_reg.weight is 1.*no gate"),
        ({"monitor_freq": -1}, "monitor_freq must be at least 0, got -1"),
    ],
)
def test_what_is_out_of_range_is_said(world, keys, match):
    with pytest.raises(UserError, match=match):
        load_args(world.config, keys)
