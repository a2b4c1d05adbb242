"""Readings: what they say is so, and the model does not notice that it is looked at."""

import math

import pytest
import torch
from moshi.models.lm import LMGen

from moshi_ttt import monitor, observe
from moshi_ttt.lanes import attach_lanes, map_tensors, named_tensors
from moshi_ttt.memory import MEMORIES
from moshi_ttt.memory.base import Shared
from moshi_ttt.monitor import CallMonitor, StreamMonitor, from_json, keeps_state, to_json
from moshi_ttt.ops.newton_schulz import newton_schulz
from moshi_ttt.states import save_ttt_states, ttt_blocks
from tests.small import randomise_memories, small_hybrid, small_lm
from tests.test_hybrid import codes_for

every_memory = pytest.mark.parametrize("family", list(MEMORIES))
MORE = {"ttt_mlp": {"write_every": 2}, "atlas": {"muon": True}, "lact": {"stacked": 2}}
LAYER = "transformer.layers.1"


def hybrid(family, **more):
    return small_hybrid(memory=family, **(MORE.get(family, {}) | more))


def one_memory(family, seed=0, **more):
    lm = hybrid(family, **more)
    memory = next(iter(ttt_blocks(lm).values())).memory
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 20, memory.width, generator=generator)
    return memory, x


def norm(tensors):
    return torch.stack([t.flatten(2).square().sum(-1) for t in tensors]).sum(0).sqrt()


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


# -- one call -------------------------------------------------------------------------------------


def train_call(lm, codes, watching=None):
    """Two micro-batches on lanes, forward and backward: outputs, gradients, states."""
    attach_lanes(lm, len(codes))
    lm.train()
    outs = []
    for piece in codes.split(10, -1):
        out = lm(piece)
        outs.append(out.text_logits.detach())
        out.text_logits.float().square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}
    return outs, gradients, save_ttt_states(lm)


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


# -- a stream -------------------------------------------------------------------------------------


def stream(lm, codes, frames_per_call=1, each=lambda t: None, rows=None):
    """Text logits of codes through the streaming model."""
    outs = []
    with torch.no_grad(), lm.streaming(len(codes)):
        lm.transformer.set_exec_mask(torch.ones(len(codes), dtype=torch.bool))
        for t, piece in enumerate(codes.split(frames_per_call, -1)):
            outs.append(lm.forward_text(piece)[1])
            each(t + 1)
        states = save_ttt_states(lm)
    return torch.cat(outs, 2), states


def monitored(lm, codes, every=1, each=lambda t: None):
    """As `stream`, with a monitor: readings too, a list a row. `each` says which rows it reset."""
    readings, looking = [], None

    def watch(t):
        readings.append(looking.frame(t))
        if (rows := each(t)) is not None:
            looking.forget(torch.tensor(rows))

    with torch.no_grad(), lm.streaming(len(codes)):
        looking, outs = StreamMonitor(lm, len(codes), every), []
        for t, piece in enumerate(codes.split(1, -1)):
            outs.append(lm.forward_text(piece)[1])
            watch(t + 1)
        states = save_ttt_states(lm)
        looking.detach()
    rows = [[r for r in row if r is not None] for row in zip(*readings, strict=True)]
    return torch.cat(outs, 2), states, rows


@every_memory
@pytest.mark.parametrize("placement", ["parallel", "after_attention"])
def test_a_stream_does_not_notice_and_is_read_as_a_call_would_be(family, placement):
    lm = hybrid(family, placement=placement)
    frames = observe.period(lm.transformer.layers[0].seq_modeling_block.memory)
    codes = codes_for(lm, 2, 3 * frames)
    want, states = stream(lm, codes)
    got, states2, readings = monitored(lm, codes)
    assert torch.equal(want, got)
    for name, saved in states.items():
        kept = saved["streaming"]
        assert all(torch.equal(t, states2[name]["streaming"][k]) for k, t in kept.items())
    assert all(block.watch is None for block in ttt_blocks(lm).values())
    # noted from the frame after the first full chunk on, and observed a layer of a row a frame
    for own, alone in zip(readings, codes.split(1), strict=True):
        assert [r.at for r in own] == [2 * frames]
        looking = CallMonitor(lm)
        with looking.watching():
            second = {1: looking.arm}
            stream(lm, alone, frames, each=lambda t, at=second: at.get(t, int)())
        expected = looking.reading(0)
        for name, values in own[0].layers.items():
            for key, value in values.items():
                other = torch.tensor(expected.layers[name][key])
                assert torch.allclose(torch.tensor(value), other, 1e-3, 1e-5, equal_nan=True), key


def test_a_row_that_was_reset_meanwhile_starts_its_reading_over():
    lm = hybrid("ttt_linear")
    codes = codes_for(lm, 2, 24)

    def reset(t):
        if t == 6:
            lm.reset_streaming(torch.tensor([False, True]))
            return [False, True]
        return None

    *_, whole = monitored(lm, codes, every=100)
    *_, parted = monitored(lm, codes, every=3, each=reset)
    *_, alone = monitored(lm, codes[:1], every=3)
    assert [r.at for r in parted[0]] == [r.at for r in alone[0]] == [8, 16]
    assert parted[0][0].layers[LAYER]["moved"] == pytest.approx(
        whole[0][0].layers[LAYER]["moved"], rel=1e-4
    )
    assert [r.at for r in parted[1]] == [14, 22]  # from the write at 10 on
    *_, anew = monitored(lm, codes[1:, :, 6:], every=3)
    assert parted[1][0].layers[LAYER]["moved"] == pytest.approx(
        anew[0][0].layers[LAYER]["moved"], rel=1e-4
    )


def test_a_paused_row_is_waited_for():
    lm = hybrid("ttt_linear")
    codes = codes_for(lm, 2, 24)

    def pause(t):
        if t in (6, 10):
            lm.set_exec_mask(torch.tensor([True, t == 10]))

    *_, readings = monitored(lm, codes, every=100, each=pause)
    assert [r.at for r in readings[0]] == [8]
    assert [r.at for r in readings[1]] == [12]


def test_a_memory_that_started_over_alone_is_read_where_it_stands():
    """As after a divergence: from then on it is at another place of its chunk than the first."""
    lm = hybrid("ttt_linear")
    layer, block = list(ttt_blocks(lm).items())[1]
    read, before = [], []

    def each(t):
        if t == 6:
            block.reset_ttt_states(torch.tensor([True]))
            return [True]
        if t == 8:
            state = block._streaming_state.memory
            before.append(map_tensors(lambda x: x.clone(), state))
            read.clear()
        return None

    streamed = block.stream

    def stream_and_note(x, shared=None):
        read.append(x.clone())
        return streamed(x, shared)

    block.stream = stream_and_note
    *_, (readings,) = monitored(lm, codes_for(lm, 1, 14), every=1, each=each)
    assert [r.at for r in readings] == [12]
    assert before[0].fast.pos.tolist() == [2]
    with torch.no_grad():
        wanted = observe.observe(block.memory, torch.cat(read[:4], 1), before[0])
    got = readings[0].layers[layer.removesuffix(".seq_modeling_block")]
    for name in ("loss_before", "loss_after", "moved"):
        assert got[name] == pytest.approx(wanted[name].tolist(), rel=1e-4), name


def test_a_row_that_has_begun_anew_is_read_soon():
    lm = hybrid("ttt_linear")

    def begin(t):
        if t == 12:
            lm.reset_streaming(torch.tensor([True]))
            return [True]
        return None

    *_, (readings,) = monitored(lm, codes_for(lm, 1, 24), every=1000, each=begin)
    assert [r.at for r in readings] == [8, 20]


def test_readings_come_as_often_as_asked():
    lm = hybrid("ttt_linear")
    *_, (readings,) = monitored(lm, codes_for(lm, 1, 60), every=20)
    assert [r.at for r in readings] == [8, 28, 48]


def test_two_monitors_do_not_fit():
    lm = hybrid("ttt_linear")
    with CallMonitor(lm).watching(), pytest.raises(ValueError, match="a monitor already"):
        with CallMonitor(lm).watching():
            pass
    with CallMonitor(lm).watching():  # the one that failed has left the other alone, and nothing
        pass


def test_what_keeps_no_state_is_not_for_streams():
    assert not keeps_state(small_lm())
    lm = hybrid("ttt_linear", persistent_states=False)
    assert not keeps_state(lm)
    with pytest.raises(ValueError, match="nothing to monitor"):
        StreamMonitor(lm, 1, 1)
    looking = CallMonitor(lm)
    with looking.watching():
        stream(lm, codes_for(lm, 1, 8), 8)
    assert all(math.isfinite(x) for x in looking.reading(1).layers[LAYER]["loss_after"])


def test_a_live_generator_says_the_same_with_a_monitor():
    lm, said = hybrid("ttt_mlp"), []
    for watched in (False, True):
        torch.manual_seed(0)
        gen = LMGen(lm)
        with torch.no_grad(), gen.streaming(1):
            looking = StreamMonitor(lm, 1, 4) if watched else None
            out = []
            for t in range(20):
                out.append(gen.step(torch.full((1, 8, 1), t)))
                if looking is not None:
                    looking.frame(t + 1)
            if looking is not None:
                looking.detach()
        said.append(torch.cat([o for o in out if o is not None], -1))
    assert torch.equal(*said)


def test_json_and_back():
    values = {"state": [1.5, math.inf, math.nan], "gate_abs": 0.25, "attention": math.nan}
    line = to_json(monitor.Reading(3, {LAYER: values}), "step")
    assert line["step"] == 3
    assert line["layers"][LAYER]["state"][2] is line["layers"][LAYER]["attention"] is None
    back = from_json(line, "step")
    assert back.at == 3
    assert back.layers[LAYER]["state"][1] > 1e300
    assert math.isnan(back.layers[LAYER]["state"][2])
    assert math.isnan(back.layers[LAYER]["attention"])


def test_the_models_seed_matters_here():
    """So that equal readings mean something."""
    codes, values = codes_for(small_lm(), 1, 8), []
    for seed in (0, 1):
        lm = hybrid("ttt_linear")
        randomise_memories(lm, seed=seed)
        looking = CallMonitor(lm)
        with torch.no_grad(), looking.watching():
            lm(codes)
        values.append(looking.reading(1).layers[LAYER]["update"])
    assert values[0] != values[1]
