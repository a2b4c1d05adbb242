"""What holds for every memory: its forms are one function, its definition's, and causal."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.contract import (
    MEMORIES_UNDER_TEST,
    assert_near,
    assert_same_state,
    clone,
    make_frames,
    make_slow,
    params,
    run_naive,
    stream,
)
from tests.contract.cases import (
    every_memory,
    every_ttt,
    period,
)


@every_memory
@pytest.mark.parametrize("C", [1, 3, 4, 16])
def test_definition_chunk_and_step_are_one_function(memory, C):
    T = 2 * period(memory, C) + C // 2 + 1
    slow, frames = make_slow(memory, C=C), make_frames(memory, T=T)
    p = params(memory, slow)
    with torch.no_grad():
        expected, end = run_naive(memory, slow, frames)
        chunked, after_chunk = memory.op.chunk(p, memory.op.init_state(p, 2), **frames)
    stepped, after_step = stream(memory, slow, frames)
    for outputs, state in ((chunked, after_chunk), (stepped, after_step)):
        assert_near(outputs, expected, memory.tolerance)
        assert_same_state(memory, slow, state, end)


@st.composite
def programs(draw):
    """A chunk size, and calls to `chunk` (a length per row) and to `step` (a mask per row)."""
    C, B = draw(st.sampled_from([1, 3, 4, 16])), draw(st.integers(2, 3))
    lengths = st.lists(st.integers(0, C + 3), min_size=B, max_size=B)
    mask = st.lists(st.booleans(), min_size=B, max_size=B)
    call = st.tuples(st.just("chunk"), lengths) | st.tuples(st.just("step"), mask)
    return C, B, draw(st.lists(call, min_size=1, max_size=7))


@every_memory
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(program=programs(), seed=st.integers(0, 99), spare=st.integers(0, 2))
def test_every_way_of_cutting_time_into_calls(memory, program, seed, spare):
    C, B, calls = program
    total = [sum(int(call[1][b]) for call in calls) for b in range(B)]
    slow = make_slow(memory, seed, C=C)
    frames = make_frames(memory, seed + 1, B=B, T=max(total))
    p = params(memory, slow)
    state, at, outputs = memory.op.init_state(p, B), [0] * B, [[] for _ in range(B)]
    with torch.no_grad():
        expected, end = run_naive(memory, slow, frames, lengths=total)
        for kind, rows in calls:
            T = 1 if kind == "step" else max(rows) + spare  # frames that no row has
            call = make_frames(memory, B=B, T=T)
            call = {n: torch.full_like(x, 1e3) for n, x in call.items()}  # what does not exist
            for b in range(B):
                for n, x in frames.items():
                    call[n][b, :, : int(rows[b])] = x[b, :, at[b] : at[b] + int(rows[b])]
            if kind == "step":
                out = memory.op.step(p, state, **call, exec_mask=torch.tensor(rows))
            else:
                out, state = memory.op.chunk(p, state, **call, lengths=torch.tensor(rows))
            for b in range(B):
                outputs[b].append(out[b, :, : int(rows[b])])
                assert kind == "step" or not out[b, :, rows[b] :].any()
                at[b] += int(rows[b])
    for b in range(B):
        given = torch.cat(outputs[b], dim=1)
        assert_near(given, expected[b, :, : total[b]], memory.tolerance)
    assert_same_state(memory, slow, state, end)


@every_ttt
def test_no_decay_is_the_papers_memory_bit_for_bit(memory):
    frames = make_frames(memory, T=11)
    plain, zero = (make_slow(memory, decay=d) for d in (None, 0.0))
    with torch.no_grad():
        (a, b), (c, d) = (
            memory.op.chunk(p, memory.op.init_state(p, 2), **frames)
            for p in (params(memory, plain), params(memory, zero))
        )
        expected, end = run_naive(memory, plain, frames)
    assert_near(a, expected, memory.tolerance)
    assert_same_state(memory, plain, b, end)
    (e, f), (g, h) = (stream(memory, slow, frames) for slow in (plain, zero))
    for x, y in ((a, c), (e, g), *zip(b, d, strict=True), *zip(f, h, strict=True)):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("memory", "break_it"),
    [(m, f) for m in MEMORIES_UNDER_TEST for f in m.breaks],
    ids=lambda x: getattr(x, "__name__", repr(x)),
)
def test_the_contract_sees_a_broken_equation(memory, break_it, monkeypatch):
    slow = make_slow(memory, C=4)
    frames = make_frames(memory, T=4 * period(memory, 4) + 1)
    p = params(memory, slow)
    with torch.no_grad():
        actual, _ = memory.op.chunk(p, memory.op.init_state(p, 2), **frames)
        assert_near(actual, run_naive(memory, slow, frames)[0], memory.tolerance)
        break_it(monkeypatch)
        broken, _ = run_naive(memory, slow, frames)
    with pytest.raises(AssertionError):
        assert_near(actual, broken, 1e-4)


def changed_at(frames, t):
    """The same frames with everything of frame t changed."""
    out = {name: x.clone() for name, x in frames.items()}
    for name, x in out.items():
        x[:, :, t] = x[:, :, t].flip(-1) if name in "qk" else x[:, :, t] * 0.8
    return out


@every_memory
def test_a_frame_changes_no_output_before_it(memory):
    slow, T = make_slow(memory), period(memory, 4) + 7
    frames = make_frames(memory, T=T)
    p = params(memory, slow)
    with torch.no_grad():
        first = make_frames(memory, 7, T=5)
        start = memory.op.init_state(p, 2)
        _, start = memory.op.chunk(p, start, **first, lengths=torch.tensor([5, 2]))
        before, _ = memory.op.chunk(p, clone(start), **frames)
        for t in range(T):
            after, _ = memory.op.chunk(p, clone(start), **changed_at(frames, t))
            assert torch.equal(after[:, :, :t], before[:, :, :t])
            assert (after != before).any(-1)[:, :, t].all()
            reached = (start.pos + t) // 4 < (start.pos + T - 1) // 4
            for b in range(2):  # what it left in the weights is read by the next chunks
                skips = memory.settings.get("write_every", 1) > 1 or not reached[b]
                assert skips or (after != before)[b, :, -1].any()


@every_ttt
def test_what_a_chunk_does_not_write_reaches_nothing_after_it(memory):
    slow, T = make_slow(memory), 11
    frames, every = make_frames(memory, T=T), memory.settings["write_every"]
    p = params(memory, slow)
    with torch.no_grad():
        start = memory.op.init_state(p, 2)
        first = make_frames(memory, 7, T=5)
        _, start = memory.op.chunk(p, start, **first, lengths=torch.tensor([5, 2]))
        before, _ = memory.op.chunk(p, clone(start), **frames)
        c = (start.pos[:, None] + torch.arange(T)) // 4
        written = (c + 1) % every == 0
        for t in range(T):
            after, _ = memory.op.chunk(p, clone(start), **changed_at(frames, t))
            reached = written[:, t, None] | (c == c[:, t, None])
            differs = (after != before).any(-1)[:, :, t:].transpose(1, 2)
            assert not differs[~reached[:, t:]].any()
            assert differs[reached[:, t:]].float().mean() > 0.7


@every_memory
def test_no_gradient_comes_from_the_past_to_the_future(memory):
    T = 2 * period(memory, 4) + 3
    slow, frames = make_slow(memory), make_frames(memory, T=T)
    p = params(memory, slow)
    leaves = {name: x.requires_grad_() for name, x in frames.items()}
    o, _ = memory.op.chunk(p, memory.op.init_state(p, 2), **leaves)
    for t in (1, 4, T - 1):
        loss = o[:, :, :t].square().sum()
        grads = torch.autograd.grad(loss, leaves.values(), retain_graph=True, allow_unused=True)
        for name, g in zip(leaves, grads, strict=True):
            assert g is None or not g[:, :, t:].any()
            assert t < T - 1 or name in memory.idle or g[:, :, :t].any(), name
