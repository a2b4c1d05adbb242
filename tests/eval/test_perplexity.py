"""One recording at a time, held against `LMModel.forward` and against one frame a call."""

import pytest
import torch

from eval.modes import writing_off
from eval.perplexity import score
from moshi_ttt.memory import MEMORIES
from moshi_ttt.states import attach_ttt_states, reset_ttt_states, save_ttt_states, ttt_blocks
from tests.eval.oracle import assert_same, forward_nll, streamed_nll
from tests.eval.tiny_lm import CONTEXT, make_codes, make_lm, make_recordings
from tests.eval.untouched import assert_untouched, facts, in_training

MOSHI = (0, 0, *[1] * 7, 0, *[1] * 7)
DELAYS = {
    "moshi": MOSHI,
    "none": (0,) * 17,
    "0, 2, 0, 3": (0, 2, 0, 3, 1, 0, 2, 5, 0, 3, 0, 2, 1, 4, 0, 2, 7),
    "text is late": (4, 0, *[2] * 7, 1, *[3] * 7),
    "longer than the window": (0, CONTEXT + 3, *[1] * 7, 0, *[CONTEXT + 1] * 7),
}


@pytest.fixture
def lm():
    return make_lm()


# -- the number ------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [None, *MEMORIES])
def test_score_is_forward(memory):
    """Any number of frames a call, three windows long: the ring of 8 frames wraps."""
    lm = make_lm(memory)
    for codes in make_recordings(3 * CONTEXT + 3, 2 * CONTEXT):
        wanted = forward_nll(lm, codes)
        for frames_per_call in (1, 7, CONTEXT, 100):
            (got,) = score(lm, [codes], frames_per_call=frames_per_call)
            assert got.values.dtype == torch.float64
            assert got.values.shape == (9, codes.shape[-1])
            assert not got.broken
            assert_same(got.values, wanted)


@pytest.mark.parametrize("delays", DELAYS.values(), ids=DELAYS)
@pytest.mark.parametrize("memory", [None, "ttt_mlp"])
def test_score_is_streaming_frame_by_frame(memory, delays):
    """All 17 delays; moshi's own ring, and the masks that forward has."""
    lm = make_lm(memory, lm={"delays": list(delays)})
    (codes,) = make_recordings(3 * CONTEXT + 1)
    wanted = streamed_nll(lm, codes)
    assert_same(wanted, forward_nll(lm, codes))
    for frames_per_call in (1, 5, 32):
        (got,) = score(lm, [codes], frames_per_call=frames_per_call)
        assert_same(got.values, wanted)
    for k, delay in enumerate(delays[:9]):
        there = got.values[k].isfinite()
        assert not there[codes.shape[1] - delay :].any()
        assert there.sum() == codes.shape[1] - delay - (k == 3)  # no code in one place


@pytest.mark.parametrize("frames", [1, 2, 3, CONTEXT])
def test_a_recording_may_be_shorter_than_the_delays(frames):
    lm = make_lm(lm={"delays": list(DELAYS["0, 2, 0, 3"])})
    (codes,) = make_recordings(frames)
    (got,) = score(lm, [codes])
    assert_same(got.values, forward_nll(lm, codes))
    assert_same(got.values, streamed_nll(lm, codes))
    assert not got.broken


def test_float32_stays_near_forward():
    lm, (codes,) = make_lm(dtype=torch.float32), make_recordings(5 * CONTEXT)
    (got,) = score(lm, [codes], frames_per_call=7)
    assert got.values.dtype == torch.float32
    assert_same(got.values, forward_nll(lm, codes), 1e-5)


def test_chunks_that_do_not_divide_calls_or_windows():
    lm = make_lm(chunk_size=3, write_every=2, decay=0.01)
    (codes,) = make_recordings(4 * CONTEXT + 1)
    wanted = streamed_nll(lm, codes)
    for frames_per_call in (1, 4, 100):
        assert_same(score(lm, [codes], frames_per_call=frames_per_call)[0].values, wanted)


def test_a_memory_that_is_fresh_every_call():
    """Then, and only then, the length of a call is part of what is measured."""
    lm, (codes,) = make_lm(persistent_states=False), make_recordings(4 * CONTEXT)
    wanted = forward_nll(lm, codes)
    assert_same(score(lm, [codes])[0].values, wanted)
    (short,) = score(lm, [codes], frames_per_call=5)
    assert (short.values - wanted).nan_to_num().abs().max() > 1e-3


# -- what the memory does --------------------------------------------------------------------------


@pytest.mark.parametrize("frames_per_call", [1, 5, 32])
def test_reset_every_is_a_reset_between_frames(lm, frames_per_call):
    (codes,), every = make_recordings(37), 10

    def before(t):
        if t in (10, 20, 30):
            reset_ttt_states(lm)

    (got,) = score(lm, [codes], frames_per_call=frames_per_call, reset_every=every)
    assert_same(got.values, streamed_nll(lm, codes, before))
    (kept,) = score(lm, [codes])
    assert_same(got.values[..., :9], kept.values[..., :9])
    assert (got.values - kept.values).nan_to_num().abs().max() > 1e-3


def test_memory_is_written_and_matters(lm):
    (codes,) = make_recordings(4 * CONTEXT)
    (kept,) = score(lm, [codes])
    with writing_off(lm):
        (off,) = score(lm, [codes])
    assert (kept.values - off.values).nan_to_num().abs().max() > 1e-3
    assert all(moved[-1] > 0.01 for moved in kept.state_moved.values())
    assert all(moved[-1] == 0 for moved in off.state_moved.values())
    assert all(block.memory.lr_scale == 1.0 for block in ttt_blocks(lm).values())
    assert_same(score(lm, [codes])[0].values, kept.values, 0)


def test_norms_are_those_of_the_stream_at_the_end(lm):
    (codes,) = make_recordings(3 * CONTEXT + 2)
    (got,) = score(lm, [codes], frames_per_call=5)
    wanted = {}

    def before(t):
        if t == codes.shape[1]:
            for name, saved in save_ttt_states(lm).items():
                memory, now = ttt_blocks(lm)[name].memory, saved["streaming"]
                moves = [now[f"fast.{w}"][0] - getattr(memory, w) for w in ("W1", "b1", "W2", "b2")]
                wanted[name] = torch.cat([m.flatten() for m in moves]).norm().item()

    streamed_nll(lm, torch.cat([codes, codes[:, :1]], 1), before)
    assert {n: moved[-1] for n, moved in got.state_moved.items()} == pytest.approx(wanted)
    assert got.norm_frames[-1] == codes.shape[1]


def fail_with_writing_off(lm):
    with writing_off(lm):
        assert all(block.memory.lr_scale == 0.0 for block in ttt_blocks(lm).values())
        raise RuntimeError("inside")


def test_writing_off_comes_back_after_an_error(lm):
    with pytest.raises(RuntimeError, match="inside"):
        fail_with_writing_off(lm)
    assert all(block.memory.lr_scale == 1.0 for block in ttt_blocks(lm).values())


# -- no trace --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("memory", [None, "ttt_mlp"])
def test_scoring_leaves_no_trace(memory, rows):
    """Also where there are as many lanes as rows, and where there are not."""
    lm = in_training(memory)
    before = facts(lm)
    assert sum("lanes" in name for name in before) > 8
    history = make_recordings(20, 20, 20, seed=9)
    score(lm, make_recordings(20, 13, 5), rows=rows)
    if memory is not None:
        score(lm, make_recordings(20, 13, 5), rows=rows, reset_every=4)
        score(lm, make_recordings(20, 13, 5), rows=rows, reset_every=4, history=history)
    assert_untouched(before, facts(lm))


def test_every_module_is_in_eval_mode_while_it_scores():
    lm, seen = in_training(), []
    note = lm.linears[7].register_forward_pre_hook
    with note(lambda *_: seen.append([n for n, m in lm.named_modules() if m.training])):
        score(lm, make_recordings(20), frames_per_call=10)
    assert seen == [[], []]


@pytest.mark.parametrize("error", [RuntimeError("device lost"), KeyboardInterrupt()])
@pytest.mark.parametrize("how", [{}, {"reset_every": 4}])
def test_an_error_in_the_middle_leaves_things_as_before(monkeypatch, error, how):
    lm, calls = in_training(), []
    before = facts(lm)

    def broken(*args):
        calls.append(args)
        if len(calls) == 3:
            raise error
        return type(lm).forward_depformer_training(lm, *args)

    with monkeypatch.context() as patch:
        patch.setattr(lm, "forward_depformer_training", broken)
        with pytest.raises(type(error)):
            score(lm, make_recordings(20, 30, 9), rows=3, frames_per_call=5, **how)
    assert len(calls) == 3
    assert_untouched(before, facts(lm))


# -- bad calls -------------------------------------------------------------------------------------


def test_a_wrong_call_is_refused(lm):
    (codes,) = make_recordings(10)
    with pytest.raises(ValueError, match=r"codes must be \[17, T\], got \[9, 10\]"):
        score(lm, [codes, codes[:9]])
    with pytest.raises(ValueError, match=r"codes must be \[17, T\], got \[17, 0\]"):
        score(lm, [codes[:, :0]])
    with pytest.raises(ValueError, match=r"got \[1, 17, 10\]"):
        score(lm, [codes[None]])
    with pytest.raises(ValueError, match="row 5 of the codes holds 24: -1 to 23"):
        score(lm, [codes.clone().index_fill_(0, torch.tensor(5), 24)])
    with pytest.raises(ValueError, match="row 0 of the codes holds -2: -1 to 39"):
        score(lm, [codes.clone().index_fill_(0, torch.tensor(0), -2)])
    for name in ("rows", "frames_per_call", "reset_every"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            score(lm, [codes], **{name: 0})
    with pytest.raises(ValueError, match="no memory to reset"):
        score(make_lm(None), [codes], reset_every=4)
    with pytest.raises(ValueError, match="history: one for each recording"):
        score(lm, [codes], history=[codes])
    with pytest.raises(ValueError, match="history: one for each recording"):
        score(lm, [codes], history=[], reset_every=4)
    with pytest.raises(ValueError, match="history: 8 frames are needed, one has 7"):
        score(lm, [codes], history=[codes[:, :7]], reset_every=4)
    with lm.streaming(1), pytest.raises(ValueError, match="is streaming"):
        score(lm, [codes])


def test_a_wrong_call_leaves_things_as_before():
    lm = in_training()
    before = facts(lm)
    with pytest.raises(ValueError, match="codes must be"):
        score(lm, [*make_recordings(10), torch.zeros(3, 3)], rows=2)
    assert_untouched(before, facts(lm))


def test_no_recordings_have_no_scores(lm):
    assert score(lm, []) == []
    assert score(lm, [], rows=4, reset_every=4, history=[]) == []


def test_an_nll_that_is_not_finite_is_named(lm):
    attach_ttt_states(lm, 2)
    with torch.no_grad():
        lm.linears[2].weight[:] = float("inf")
    (found,) = score(lm, [make_codes(10, holes=False)[0]])
    assert found.broken == "the NLL of codebook 3 (0 is text), frame 0 is nan; 9 such in all"
    assert found.values[:3].isfinite().sum() == 10 + 10 + 9  # the others are what they are
