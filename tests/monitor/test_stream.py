"""Readings of a stream: rows that reset, pause and start over, and how they are written."""

import math

import pytest
import torch
from moshi.models.lm import LMGen

from moshi_ttt import monitor, observe
from moshi_ttt.lanes import map_tensors
from moshi_ttt.monitor import CallMonitor, StreamMonitor, from_json, keeps_state, to_json
from moshi_ttt.states import save_ttt_states, ttt_blocks
from tests.monitor.watched import LAYER, every_memory, hybrid
from tests.small import randomise_memories, small_lm
from tests.test_hybrid import codes_for


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
