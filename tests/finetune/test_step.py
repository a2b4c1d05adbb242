"""One optimizer step: micro-batches, missing text, non-finite values, the states it leaves."""

import math
import re
from dataclasses import replace

import pytest
import torch

import finetune.step
from finetune.loss import TeacherForced
from finetune.optim import Group, MasterAdamW
from finetune.step import memory_metrics, state_norms, train_step
from moshi_ttt.hybrid import carry_kv
from moshi_ttt.lanes import attach_lanes, lanes_of
from moshi_ttt.memory import MEMORIES
from moshi_ttt.states import attach_ttt_states, detach_ttt_states, save_ttt_states, ttt_blocks
from tests.finetune.test_loss import FRAMES, WEIGHTS, batch, segment, sums_of
from tests.small import small_hybrid, small_lm

ROWS = [segment(0), segment(1, frames=6), segment(2, text=False), segment(3, frames=3)]
CUTS = {
    "1x4": [batch(*ROWS)],
    "4x1": [batch(row) for row in ROWS],
    "2x2": [batch(*ROWS[:2]), batch(*ROWS[2:])],
}


class Recording(MasterAdamW):
    """AdamW that keeps the gradients it was given."""

    def __init__(self, lm, lr=1e-3):
        self.names = {id(p): n for n, p in lm.named_parameters()}
        super().__init__([Group("all", lr, 0.0, list(lm.parameters()))], (0.9, 0.95))

    def step(self, max_norm):
        grads = {self.names[id(p)]: p.grad for p, _ in self.pairs}
        self.grads = {n: g.clone() for n, g in grads.items() if g is not None}
        return super().step(max_norm)


def step(lm, batches, **values):
    optimizer = Recording(lm)
    attach_lanes(lm, len(batches[0].names), len(batches))
    result = train_step(TeacherForced(lm), [batches], optimizer, WEIGHTS, max_norm=1.0, **values)
    return result, getattr(optimizer, "grads", None)


def double(**values):
    return small_hybrid(lm={"norm": "rms_norm"}, **values).double()


def test_how_a_batch_is_cut_changes_nothing():
    """In float64, but for Moshi's RoPE, which computes in float32."""
    found = {name: step(double(), cut) for name, cut in CUTS.items()}
    want, grads = found["1x4"]
    assert any(g.abs().max() > 0 for n, g in grads.items() if n.endswith("W1"))
    for got, gradients in found.values():
        assert got.loss == pytest.approx(want.loss, rel=1e-12)
        assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-7)
        assert got.tokens == want.tokens
        assert got.sums.means() == pytest.approx(want.sums.means(), rel=1e-12)
        assert gradients.keys() == grads.keys()
        for name, gradient in gradients.items():
            bound = 1e-7 * (1 + grads[name].abs().max())
            assert (gradient - grads[name]).abs().max() < bound, name


def test_the_mean_of_the_micro_batches_means_would_be_something_else():
    """So that the test above can fail."""
    lm = double()
    means = []
    for part in CUTS["4x1"]:
        text, audio, sums = sums_of(lm, part)
        means.append((audio / sums.weight[1]).item() + (text / max(1, sums.weight[0])).item())
    assert abs(sum(means) / 4 - step(lm, CUTS["1x4"])[0].loss) > 1e-2


def test_the_loss_is_what_is_differentiated():
    lm, part = double(), CUTS["1x4"][0]
    text, audio, sums = sums_of(lm, part)
    loss = text / sums.weight[0] + audio / sums.weight[1]
    result, grads = step(lm, CUTS["1x4"])
    assert result.loss == pytest.approx(loss.item(), rel=1e-12)
    fresh = double()
    text, audio, _ = sums_of(fresh, part)
    (text / sums.weight[0] + audio / sums.weight[1]).backward()
    wanted = {n: p.grad for n, p in fresh.named_parameters() if p.grad is not None}
    assert wanted.keys() == grads.keys()
    assert all(torch.allclose(wanted[n], grads[n], rtol=1e-9, atol=1e-12) for n in grads)


def test_without_any_text_the_text_head_is_left_alone():
    lm = small_lm()
    before = lm.text_linear.weight.clone()
    audio = lm.linears[0].weight.clone()
    result, grads = step(lm, [batch(ROWS[2])])
    assert math.isfinite(result.loss)
    assert math.isnan(result.sums.means()["nll_text"])
    assert "text_linear.weight" not in grads
    assert torch.equal(lm.text_linear.weight, before)
    assert not torch.equal(lm.linears[0].weight, audio)


def test_a_loss_that_is_no_number_names_recordings_and_updates_nothing():
    lm = small_lm()
    with torch.no_grad():  # only the second recording has text token 63 as an input
        lm.text_emb.weight[63] = math.nan
    good, bad = segment(0), segment(9)
    for row in (good, bad):
        row.codes[0].clamp_(max=62)
    bad.codes[0, 1] = 63
    before = {n: p.clone() for n, p in lm.named_parameters()}
    result, _ = step(lm, [batch(good), batch(bad)])
    assert result.bad == "loss is nan on recording9.wav from 0.7 s"
    for name, p in lm.named_parameters():
        assert torch.equal(p.nan_to_num(7), before[name].nan_to_num(7)), name
        assert p.grad is None, name


def test_a_gradient_that_is_no_number_is_named_and_updates_nothing():
    lm = small_lm()
    lm.text_linear.weight.register_hook(lambda g: g * math.inf)
    before = {n: p.clone() for n, p in lm.named_parameters()}
    result, _ = step(lm, [batch(ROWS[0])])
    assert re.match(r"gradient norm is (nan|inf) on .*recording0\.wav", result.bad)
    assert all(torch.equal(p, before[n]) for n, p in lm.named_parameters())


def test_lanes_of_a_bad_step_go_on_from_before_it():
    """But not a lane whose recording began in it: that one starts anew."""
    lm = double()
    attach_lanes(lm, 2)
    model, optimizer = TeacherForced(lm), Recording(lm)

    def run(begins):
        part = replace(batch(*ROWS[:2]), begins=torch.tensor(begins))
        return train_step(model, [[part]], optimizer, WEIGHTS, max_norm=1.0)

    assert run([True, True]).bad is None
    before = {n: held.tensors() for n, held in lanes_of(lm).items()}
    hook = lm.text_linear.weight.register_hook(lambda g: g * math.inf)
    assert run([False, True]).bad
    hook.remove()
    for name, held in lanes_of(lm).items():
        after = held.tensors()
        assert after.pop("fresh").tolist() == [[False, True]]
        assert all(torch.equal(t, before[name][k]) for k, t in after.items())
        assert after["fast.pos"].tolist() == [FRAMES, FRAMES]
    assert run([False, False]).bad is None
    for held in lanes_of(lm).values():
        assert held.values[0].fast.pos.tolist() == [2 * FRAMES, FRAMES]


def test_a_lane_that_carries_a_bad_number_starts_anew():
    """Or it would stop the run: nothing else ever resets it."""
    lm = double()
    attach_lanes(lm, 2)
    model, optimizer = TeacherForced(lm), Recording(lm)
    part = replace(batch(*ROWS[:2]), begins=torch.zeros(2, dtype=torch.bool))
    train_step(model, [[part]], optimizer, WEIGHTS, max_norm=1.0)
    lanes = lanes_of(lm)["transformer.layers.1.seq_modeling_block"]
    lanes.values[0].fast.W1[1, 0, 0, 0] = math.inf
    assert "loss is nan" in train_step(model, [[part]], optimizer, WEIGHTS, max_norm=1.0).bad
    assert [held.fresh[0].tolist() for held in lanes_of(lm).values()] == [[False, True]] * 2
    assert train_step(model, [[part]], optimizer, WEIGHTS, max_norm=1.0).bad is None


def test_a_loss_that_is_none_with_gradients_that_are_numbers_updates_nothing(monkeypatch):
    lm = small_lm()
    before = {n: p.clone() for n, p in lm.named_parameters()}
    real = finetune.step.loss_sums

    def infinite(*args):
        text, audio, sums = real(*args)
        sums.loss[1] = math.inf
        return text, audio, sums

    monkeypatch.setattr(finetune.step, "loss_sums", infinite)
    assert step(lm, [batch(ROWS[0])])[0].bad == "loss is inf on recording0.wav from 0.0 s"
    assert all(torch.equal(p, before[n]) for n, p in lm.named_parameters())


# -- passing states --------------------------------------------------------------------------------


def test_a_lane_goes_on_unless_its_recording_begins():
    lm = double()
    attach_lanes(lm, 2)
    for begins in ([True, True], [False, True]):
        part = replace(batch(*ROWS[:2]), begins=torch.tensor(begins))
        train_step(TeacherForced(lm), [[part]], Recording(lm), WEIGHTS, max_norm=1.0)
    assert all(
        held.values[0].fast.pos.tolist() == [2 * FRAMES, FRAMES] for held in lanes_of(lm).values()
    )


def test_several_micro_batches_of_lanes_have_the_gradient_of_one_batch():
    """Two steps in a row, states passed: 1 slot of 4 rows, 4 slots of 1, 2 of 2; float64."""
    found = []
    for cut in CUTS.values():
        lm = double()
        carry_kv(lm)
        model, optimizer = TeacherForced(lm), Recording(lm, lr=1e-4)
        attach_lanes(lm, len(cut[0].names), len(cut))
        train_step(model, [cut], optimizer, WEIGHTS, max_norm=1.0)
        on = [replace(b, begins=torch.zeros_like(b.begins)) for b in cut]
        result = train_step(model, [on], optimizer, WEIGHTS, max_norm=1.0)
        found.append((result.loss, optimizer.grads))
    assert found[0][0] != pytest.approx(step(double(), CUTS["1x4"])[0].loss, rel=1e-4)
    for value, grads in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-9)
        for name, gradient in grads.items():
            bound = 1e-6 * (1 + found[0][1][name].abs().max())
            assert (gradient - found[0][1][name]).abs().max() < bound, name


def test_gradients_flow_through_the_ticks_of_a_step():
    """Two linked segments are one long one: loss and gradients of a recording cut in two."""
    rows = [segment(0, frames=28), segment(1, frames=28)]
    long = batch(*rows, frames=28)
    first, second = (
        replace(
            long, sequence=long.sequence[..., a : b + 1], text_mask=long.text_mask[:, a:b],
            begins=torch.full((2,), a == 0),
        )
        for a, b in ((0, 13), (13, 28))
    )  # fmt: skip
    found = []
    for ticks in ([[long]], [[first], [second]]):
        lm = double()
        carry_kv(lm)
        attach_lanes(lm, 2)
        optimizer = Recording(lm)
        result = train_step(TeacherForced(lm), ticks, optimizer, WEIGHTS, max_norm=1.0)
        found.append((result.loss, optimizer.grads))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        assert (gradient - found[1][1][name]).abs().max() < 1e-7 * (1 + gradient.abs().max()), name


def test_without_passing_each_segment_starts_from_w0():
    """Keys and values go on all the same."""
    lm = double()
    carry_kv(lm)
    attach_lanes(lm, 4)
    for begins in (True, False):
        part = replace(CUTS["1x4"][0], begins=torch.full((4,), begins))
        train_step(
            TeacherForced(lm), [[part]], Recording(lm), WEIGHTS, max_norm=1.0, pass_states=False
        )
    for held in lanes_of(lm).values():
        value = held.values[0]
        memory = hasattr(value, "fast")
        pos = value.fast.pos if memory else value.pos
        assert pos.tolist() == [FRAMES * (1 if memory else 2)] * 4


# -- the states that a step leaves -----------------------------------------------------------------


@pytest.mark.parametrize("family", list(MEMORIES))
def test_the_state_after_a_segment_is_measured(family):
    """By hand: attach, one forward, norms of the fast weights row by row."""
    lm = double(memory=family)
    attach_ttt_states(lm, 4)
    with torch.no_grad():
        TeacherForced(lm)(CUTS["1x4"][0].sequence)
    squares, moved = torch.zeros(4).double(), torch.zeros(4).double()
    for saved, block in zip(save_ttt_states(lm).values(), ttt_blocks(lm).values(), strict=True):
        for name in block.memory.op.WEIGHTS:
            w, start = saved["lanes"][f"fast.{name}"], getattr(block.memory.params(), name)
            squares += w.square().flatten(1).sum(1)
            moved += (w - start).square().flatten(1).sum(1)
    detach_ttt_states(lm)
    assert (moved > 1e-3).all()
    result, _ = step(lm, CUTS["1x4"])
    want = torch.stack([squares.sqrt(), moved.sqrt()])
    assert torch.allclose(result.state_norms, want.detach(), rtol=1e-9)
    metrics = memory_metrics(lm, result)
    assert metrics["state_norm"] == pytest.approx(squares.sqrt().mean().item())
    assert metrics["state_moved"] == pytest.approx(moved.sqrt().mean().item())
    gates = torch.cat([torch.tanh(b.gate) for b in ttt_blocks(lm).values()])
    assert metrics["gate_mean"] == pytest.approx(gates.mean().item(), rel=1e-5)
    assert metrics["gate_std"] == pytest.approx(gates.std().item(), rel=1e-5)


def test_measuring_changes_no_gradient():
    """The step attaches lanes; by hand, without any, the gradients are the same to the bit."""
    _, grads = step(double(), [CUTS["1x4"][0]])
    lm, part = double(), CUTS["1x4"][0]
    text, audio, sums = sums_of(lm, part)
    (audio / sums.weight[1].item() + text / sums.weight[0].item()).backward()
    for name, p in lm.named_parameters():
        assert (p.grad is None) == (name not in grads)
        assert p.grad is None or torch.equal(p.grad, grads[name]), name


def test_a_segment_shorter_than_a_chunk_has_not_moved():
    lm = double(chunk_size=FRAMES + 5)
    norm, moved = step(lm, [batch(ROWS[0])])[0].state_norms[:, 0].tolist()
    assert moved == 0
    assert norm > 0


def test_memories_without_persistent_states_have_no_norm():
    lm = double(persistent_states=False)
    result, _ = step(lm, [batch(ROWS[0])])
    metrics = memory_metrics(lm, result)
    assert math.isnan(metrics["state_norm"])
    assert math.isnan(metrics["state_moved"])
    assert math.isfinite(metrics["gate_std"])
    assert state_norms(lm).shape == (2, 0)


def test_checkpointing_on_and_off_train_the_same():
    """Two steps with the optimizer, lanes attached: float64, all weights."""
    found = []
    for checkpointing in (False, True):
        lm = double()
        lm.transformer.checkpointing = lm.depformer.checkpointing = checkpointing
        optimizer = Recording(lm)
        attach_lanes(lm.train(), 2, 2)
        for _ in range(2):
            train_step(TeacherForced(lm), [CUTS["2x2"]], optimizer, WEIGHTS, max_norm=1.0)
        found.append(lm.state_dict())
    start = double().state_dict()
    for name, want in found[0].items():
        assert (found[1][name] - want).abs().max() < 1e-9, name
    assert sum(not torch.equal(start[n], w) for n, w in found[0].items()) > 20
