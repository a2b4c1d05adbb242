"""What a monitor reads of a memory is what the memory does, and nobody notices."""

import math

import pytest
import torch

from moshi_ttt import observe
from moshi_ttt.lanes import attach_lanes, map_tensors, named_tensors
from moshi_ttt.memory.base import Shared
from moshi_ttt.monitor import CallMonitor
from moshi_ttt.ops.newton_schulz import newton_schulz
from moshi_ttt.states import ttt_blocks
from tests.monitor.watched import LAYER, every_memory, hybrid, norm, one_memory, train_call
from tests.small import small_lm
from tests.test_hybrid import codes_for


@every_memory
@torch.no_grad()
def test_a_write_is_what_the_memory_itself_does(family):
    """From the middle of a chunk: the frames that are left of it, and no others."""
    memory, x = one_memory(family)
    frames = observe.period(memory)
    _, state = memory(x[:, :3], memory.init_state(2))
    rest = x[:, 3:frames]
    before = map_tensors(torch.clone, state)
    found = observe.observe(memory, x[:, 3:], state)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(
        named_tensors(state), named_tensors(before), strict=True))  # fmt: skip
    _, after = memory(rest, state)
    weights = list(memory.fast_weights(after.fast))
    old = [w for w, _ in memory.fast_weights(state.fast)]
    moved = norm([now - start for now, start in weights])
    w0 = norm([start.unsqueeze(0) for _, start in weights])
    want = {
        "update": norm([n - o for (n, _), o in zip(weights, old, strict=True)]) / norm(old),
        "state": norm([now for now, _ in weights]) / w0,
        "moved": moved / w0,
    }
    _, k, v, _ = memory.project(rest, state.conv, None, None)
    op, params = memory.op, memory.params()
    want["loss_before"] = op.inner_loss(params, state.fast, k, v).mean(-1)
    want["loss_after"] = op.inner_loss(params, after.fast, k, v).mean(-1)
    for name, value in want.items():
        assert torch.allclose(found[name], value.mean(0), rtol=1e-4, atol=1e-6), name
    assert (found["loss_after"] < found["loss_before"]).all()
    gates = memory.gates(memory._rates(rest, torch.float32))
    for name, gate in gates.items():
        value = gate.flatten(3).mean(-1) if gate.dim() == 4 else gate
        assert torch.allclose(found[name], value.mean((0, 2)), rtol=1e-4), name
    has = bool(op.MOMENTUM)
    assert bool(found["momentum"].isfinite().all()) is has
    assert bool(found["ns_min"].isfinite().all()) is (family in ("lact", "atlas"))


@every_memory
@torch.no_grad()
def test_only_rows_that_reach_their_write_count(family):
    memory, x = one_memory(family)
    frames = observe.period(memory)
    _, state = memory(x[:, :3], memory.init_state(2), torch.tensor([3, 1]))
    piece = x[:, : frames - 3]  # the first row's chunk is full after it, the second's is not
    found = observe.observe(memory, piece, state)
    alone = observe.observe(memory, piece[:1], map_tensors(lambda t: t[:1], state))
    assert all(torch.allclose(found[k], v, 1e-5, 1e-6, equal_nan=True) for k, v in alone.items())
    found = observe.observe(memory, x, state, lengths=torch.tensor([0, 20]))
    alone = observe.observe(memory, x[1:], map_tensors(lambda t: t[1:], state))
    assert all(torch.allclose(found[k], v, 1e-5, 1e-6, equal_nan=True) for k, v in alone.items())
    found = observe.observe(memory, x, state, lengths=torch.tensor([0, 0]))
    assert all(bool(value.isnan().all()) for value in found.values())


@every_memory
def test_what_does_not_write_has_no_loss_after(family):
    memory, x = one_memory(family, writing=False)
    found = observe.observe(memory, x, memory.init_state(2))
    assert bool(found["loss_before"].isfinite().all())
    assert bool(found["loss_after"].isnan().all())
    assert bool(found["update"].isnan().all())
    assert (found["moved"] < 3e-5).all()  # LaCT renormalises its rows


def test_a_state_that_is_no_number_is_infinite():
    memory, x = one_memory("ttt_linear")
    state = memory.init_state(2)
    state.fast.W1[0, 0, 0, 0] = math.nan
    found = observe.observe(memory, x, state)
    assert found["state"].isinf().tolist() == [True, False]
    assert found["moved"].isinf().tolist() == [True, False]


def test_orthogonality_is_that_of_newton_schulz_in_the_directions_that_count():
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(3, 6, 10, generator=generator)
    low, high = observe.orthogonality(flat)
    values = torch.linalg.svdvals(newton_schulz(flat))
    assert torch.allclose(low, values.amin(-1), atol=1e-2)
    assert torch.allclose(high, values.amax(-1), atol=1e-2)
    thin = torch.randn(3, 10, 2, generator=generator) @ torch.randn(3, 2, 6, generator=generator)
    low, _ = observe.orthogonality(thin)
    assert (low > 0.9).all()  # the other four directions are at 0
    tiny = observe.orthogonality(1e-12 * flat)[1]
    assert (tiny < 0.7).all()  # drowned by what the norm is kept away from 0 with
    low, high = observe.orthogonality(torch.stack([flat[0] * 0, flat[0] * math.inf, flat[0]]))
    assert low.isnan().tolist() == high.isnan().tolist() == [True, True, False]


def test_a_gates_spread():
    found = observe.observe_gate(torch.tensor([-10.0, 0.0, 10.0, 0.5]))
    g = math.tanh(0.5)
    want = {
        "gate_mean": g / 4, "gate_abs": (2 + g) / 4, "gate_min": -1.0, "gate_max": 1.0,
        "gate_full": 0.5,
    }  # fmt: skip
    assert {k: float(v) for k, v in found.items() if k in want} == pytest.approx(want)


@every_memory
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("placement", ["parallel", "after_attention"])
def test_training_does_not_notice(family, recompute, placement, monkeypatch):
    codes, calls = codes_for(small_lm(), 2, 20), []
    real = observe.observe
    monkeypatch.setattr(observe, "observe", lambda *a: calls.append(1) or real(*a))
    found = []
    for watched in (False, True):
        lm = hybrid(family, placement=placement)
        lm.transformer.checkpointing = recompute
        looking = CallMonitor(lm)
        keys = list(lm.state_dict())
        if watched:
            with looking.watching():
                assert list(lm.state_dict()) == keys
                found.append(train_call(lm, codes))
            reading = looking.reading(7)
        else:
            found.append(train_call(lm, codes))
        assert all(block.watch is None for block in ttt_blocks(lm).values())
        assert not any(layer.layer_scale_1._forward_hooks for layer in lm.transformer.layers)
    assert len(calls) == 2  # a layer each: not the second call, nor a recompute
    (outs, gradients, states), (outs2, gradients2, states2) = found
    assert all(map(torch.equal, outs, outs2))
    assert gradients.keys() == gradients2.keys()
    assert all(torch.equal(gradients[n], gradients2[n]) for n in gradients)
    for name, saved in states.items():
        assert all(torch.equal(t, states2[name]["lanes"][k]) for k, t in saved["lanes"].items())
    assert reading.at == 7
    assert list(reading.layers) == ["transformer.layers.0", LAYER]
    values = reading.layers[LAYER]
    assert all(math.isfinite(x) for x in values["loss_after"])
    assert values["attention"] > 0 < values["memory"]


def test_lanes_that_go_on_are_seen_where_they_stand():
    """After a first segment the state is that of the lanes, fresh rows at W0."""
    lm, codes = hybrid("ttt_linear"), codes_for(small_lm(), 2, 20)
    looking = CallMonitor(lm)
    with torch.no_grad(), looking.watching():
        attach_lanes(lm, 2)
        lm(codes[..., :10])
        early = looking.reading(1)
        looking.arm()
        lm(codes[..., 10:])
        late = looking.reading(2)
    assert all(a > b for a, b in zip(
        late.layers[LAYER]["moved"], early.layers[LAYER]["moved"], strict=True))  # fmt: skip


def test_a_memory_that_takes_no_part_is_left_out():
    lm = hybrid("ttt_linear")
    block = lm.transformer.layers[0].seq_modeling_block
    block.active = False
    looking = CallMonitor(lm)
    with looking.watching(), torch.no_grad():
        lm(codes_for(lm, 1, 10))
    assert list(looking.reading(1).layers) == [LAYER]


def test_shared_projections_are_those_of_the_call():
    lm = hybrid("ttt_linear", projection="shared", num_heads=None)
    seen = {}
    looking, layer = CallMonitor(lm), lm.transformer.layers[0]
    real = layer.seq_modeling_block.memory.forward

    def caught(x, state, lengths=None, shared=None):
        seen.update(x=x, state=state, shared=shared)
        return real(x, state, lengths, shared)

    layer.seq_modeling_block.memory.forward = caught
    with torch.no_grad(), looking.watching():
        lm(codes_for(lm, 2, 10))
    assert isinstance(seen["shared"], Shared)
    del layer.seq_modeling_block.memory.forward
    want = observe.observe(
        layer.seq_modeling_block.memory, seen["x"], seen["state"], seen["shared"]
    )
    got = looking.reading(1).layers["transformer.layers.0"]
    assert got["loss_after"] == want["loss_after"].tolist()
