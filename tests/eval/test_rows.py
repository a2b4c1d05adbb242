"""Many recordings at once, rows out of step: the numbers of one at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.perplexity import score
from moshi_ttt.memory import MEMORIES
from moshi_ttt.states import reset_ttt_states
from tests.eval.oracle import assert_same, forward_nll, lent_nll, memories_at, streamed_nll
from tests.eval.tiny_lm import CONTEXT, make_lm, make_recordings

LENGTHS = (29, 1, 12, 40, 2, 33, 8, 5)
"""Longer and shorter than a call, a chunk and the window; more of them than rows."""
SMALL = settings(max_examples=10, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def lm():
    torch.set_num_threads(1)  # a module's fixtures come before the one of conftest.py
    return make_lm()


@pytest.fixture(scope="module")
def recordings():
    return make_recordings(*LENGTHS)


def how(kind, recordings, every=10):
    if kind == "kept":
        return {}
    others = make_recordings(*[r.shape[1] + i for i, r in enumerate(recordings)], seed=50)
    return {"reset_every": every} | ({"history": others} if kind == "lent" else {})


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


ALL = [(rows, frames) for rows in (2, 3, 64) for frames in (3, 7, 100)]


@pytest.mark.parametrize("shapes", [[(2, 7), (3, 3), (64, 100)], slow(ALL)], ids=["some", "all"])
@pytest.mark.parametrize("memory", [None, *MEMORIES])
def test_rows_out_of_step_are_forward(memory, shapes, recordings):
    lm = make_lm(memory)
    wanted = [forward_nll(lm, codes) for codes in recordings]
    for rows, frames_per_call in shapes:
        got = score(lm, recordings, rows=rows, frames_per_call=frames_per_call)
        for mine, theirs in zip(got, wanted, strict=True):
            assert_same(mine.values, theirs)
            assert not mine.broken


@pytest.mark.parametrize(
    ("kind", "dtype", "bound"),
    [
        *((kind, torch.float64, 1e-8) for kind in ("kept", "reset", "lent")),
        ("lent", torch.float32, 1e-5),
        *(slow(kind, torch.float32, 1e-5) for kind in ("kept", "reset")),
    ],
)
def test_rows_out_of_step_are_one_at_a_time(kind, dtype, bound, recordings):
    lm, more = make_lm(dtype=dtype), how(kind, recordings)
    alone = score(lm, recordings, **more)
    for rows, frames_per_call in ((3, 100), (4, 7)):
        got = score(lm, recordings, rows=rows, frames_per_call=frames_per_call, **more)
        for mine, theirs in zip(got, alone, strict=True):
            assert_same(mine.values, theirs.values, bound)


@SMALL
@given(
    lengths=st.lists(st.integers(1, 2 * CONTEXT + 3), min_size=1, max_size=5),
    rows=st.integers(1, 4),
    frames_per_call=st.integers(1, 30),
    every=st.integers(1, 2 * CONTEXT),
    kind=st.sampled_from(["kept", "reset", "lent"]),
)
def test_any_lengths_rows_and_calls(lm, lengths, rows, frames_per_call, every, kind):
    recordings = make_recordings(*lengths, seed=sum(lengths))
    more, done = how(kind, recordings, every), {}
    got = score(
        lm, recordings, rows=rows, frames_per_call=frames_per_call, done=done.setdefault, **more
    )
    assert done == dict(enumerate(got))
    history = more.get("history", recordings)
    for codes, other, mine in zip(recordings, history, got, strict=True):
        if kind == "kept":
            wanted = forward_nll(lm, codes)
        elif kind == "lent":
            wanted = lent_nll(lm, codes, other, every)
        else:
            wanted = streamed_nll(lm, codes, lambda t: t % every or reset_ttt_states(lm))
        assert_same(mine.values, wanted)


def test_progress_counts_each_frame_once(lm, recordings):
    for rows in (1, 4):
        seen = []
        got = score(lm, recordings, rows=rows, frames_per_call=7, progress=seen.append)
        assert sum(seen) == sum(LENGTHS)
        assert all(len(r.ms_per_frame) > 0 and min(r.ms_per_frame) > 0 for r in got)


def test_norms_of_a_row_are_of_its_own_recording(lm, recordings):
    """The last is the end, or where the call began in which it ended before others did."""
    alone = score(lm, recordings, frames_per_call=1)
    got = score(lm, recordings, rows=4, frames_per_call=7)
    for mine, theirs, codes in zip(got, alone, recordings, strict=True):
        if not mine.norm_frames:
            assert codes.shape[1] < 7  # it was never seen between two calls
            continue
        at = mine.norm_frames[-1]
        assert 0 <= codes.shape[1] - at < 7
        if at == codes.shape[1]:
            last = {n: norms[-1] for n, norms in theirs.state_moved.items()}
            assert {n: norms[-1] for n, norms in mine.state_moved.items()} == pytest.approx(last)
        else:
            (cut,) = score(lm, [codes[:, :at]], frames_per_call=1)
            last = {n: norms[-1] for n, norms in cut.state_moved.items()}
            found = {n: norms[-1] for n, norms in mine.state_moved.items()}
            # the codes of the frame that follows are read with a delay
            assert found == pytest.approx(last)


# -- history ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("memory", "every"), [("ttt_linear", 5), ("ttt_mlp", CONTEXT)])
def test_history_is_the_other_recordings_memory_put_in_by_hand(memory, every):
    lm = make_lm(memory)
    mine, others = make_recordings(25, 12, 18), make_recordings(30, 12, 17, seed=20)
    wanted = [lent_nll(lm, a, b, every) for a, b in zip(mine, others, strict=True)]
    (kept, *_) = score(lm, mine)
    (reset, *_) = score(lm, mine, reset_every=every)
    for rows, frames_per_call in ((1, 100), (2, 3), (3, 7)):
        got = score(
            lm, mine, rows=rows, frames_per_call=frames_per_call, reset_every=every, history=others
        )
        for found, by_hand in zip(got, wanted, strict=True):
            assert_same(found.values, by_hand)
    for arm in (kept, reset):
        assert_same(got[0].values[:, : every - 1], arm.values[:, : every - 1])
        assert (got[0].values - arm.values).nan_to_num().abs().max() > 1e-3


def test_ones_own_history_is_the_memory_kept(lm, recordings):
    kept = score(lm, recordings)
    for rows in (1, 3):
        own = score(lm, recordings, rows=rows, reset_every=CONTEXT, history=recordings)
        for mine, theirs in zip(own, kept, strict=True):
            assert_same(mine.values, theirs.values)


def test_of_a_history_nothing_is_read_after_the_last_renewal(lm):
    """What follows may be missing: 32 frames are enough for 37."""
    (mine,), (other,) = make_recordings(37), make_recordings(60, seed=30)
    (long,) = score(lm, [mine], reset_every=CONTEXT, history=[other])
    (short,) = score(lm, [mine], reset_every=CONTEXT, history=[other[:, :32]])
    assert_same(short.values, long.values, 0)
    assert len(memories_at(lm, other[:, :32], CONTEXT)) == 4


# -- a number that is none -------------------------------------------------------------------------

HOLE, USER = 7, 9
"""A code that one recording only has, in the user's first codebook: heard, never predicted."""


def poisoned(memory, dtype=torch.float64):
    lm = make_lm(memory, dtype=dtype)
    with torch.no_grad():
        lm.emb[USER - 1].weight[HOLE] = float("nan")
    recordings = make_recordings(*[20 + 2 * i for i in range(7)])
    for codes in recordings:
        codes[USER][codes[USER] == HOLE] = HOLE + 1
    bad = [codes.clone() for codes in recordings]
    bad[1][USER, 11] = HOLE
    return lm, recordings, bad


@pytest.mark.parametrize(
    ("rows", "memory"),
    [
        *((3, memory) for memory in (None, *MEMORIES)),
        *((1, "ttt_mlp"), (7, "lact")),
        *(slow(rows, memory) for rows in (1, 2, 7) for memory in (None, *MEMORIES)),
    ],
)
def test_a_nan_stays_in_its_recording(memory, rows):
    """Neither the rows beside it see it, nor the recording that follows in its row."""
    lm, recordings, bad = poisoned(memory)
    wanted = [forward_nll(lm, codes) for codes in recordings]
    got = score(lm, bad, rows=rows, frames_per_call=6)
    assert "is nan" in got[1].broken
    at = 11 + 1  # frame 11 is an input of the next
    assert_same(got[1].values[:2, :at], wanted[1][:2, :at])
    assert got[1].values[:2, at:].isnan().all()
    for i in (0, 2, 3, 4, 5, 6):
        assert not got[i].broken, i
        assert_same(got[i].values, wanted[i])


@pytest.mark.parametrize("rows", [1, 3])
def test_a_nan_in_a_history_stays_with_the_one_who_borrows_it(rows):
    """From the renewal after it on."""
    lm, recordings, _ = poisoned("ttt_mlp")
    more = {"rows": rows, "reset_every": CONTEXT, "frames_per_call": 6}
    others = make_recordings(*[40] * 7, seed=60)
    others = [codes.clamp(max=HOLE - 1) for codes in others]
    wanted = score(lm, recordings, history=others, **more)
    others[1] = others[1].clone()
    others[1][USER, 11] = HOLE
    got = score(lm, recordings, history=others, **more)
    assert "is nan" in got[1].broken
    assert got[1].values[:2, : 2 * CONTEXT].isfinite().all()
    assert got[1].values[:2, 2 * CONTEXT :].isnan().all()
    for i in (0, 2, 3, 4, 5, 6):
        assert_same(got[i].values, wanted[i].values)
