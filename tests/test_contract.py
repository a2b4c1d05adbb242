"""What holds for every memory: the fast forms are the definition, in value and in gradient."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moshi_ttt.ops import naive
from tests.contract import (
    MEMORIES_UNDER_TEST,
    assert_near,
    assert_same_state,
    buffers,
    clone,
    fast_state,
    live,
    make_frames,
    make_slow,
    params,
    run_naive,
    stream,
    take,
)

ROWS = [replace(m, write_every=N) for N in (1, 2, 3) for m in MEMORIES_UNDER_TEST]
every_memory = pytest.mark.parametrize("memory", ROWS, ids=repr)


# 1. One function, three forms.


@every_memory
@pytest.mark.parametrize("decay", [None, 0.0, 0.3])
@pytest.mark.parametrize("C", [1, 3, 4, 16])
def test_definition_chunk_and_step_are_one_function(memory, C, decay):
    T = 2 * C * memory.write_every + C // 2 + 1
    slow, frames = make_slow(memory, C=C, decay=decay), make_frames(T=T)
    p = params(memory, slow)
    with torch.no_grad():
        expected, end = run_naive(memory, slow, frames)
        chunked, after_chunk = memory.op.chunk(p, memory.op.init_state(p, 2), **frames)
    stepped, after_step = stream(memory, slow, frames)
    for outputs, state in ((chunked, after_chunk), (stepped, after_step)):
        assert_near(outputs, expected, 1e-13)
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
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    program=programs(),
    seed=st.integers(0, 99),
    decay=st.sampled_from([None, 0.0, 0.3]),
    spare=st.integers(0, 2),
)
def test_every_way_of_cutting_time_into_calls(memory, program, seed, decay, spare):
    C, B, calls = program
    total = [sum(int(call[1][b]) for call in calls) for b in range(B)]
    slow = make_slow(memory, seed, C=C, decay=decay)
    frames = make_frames(seed + 1, B=B, T=max(total))
    p = params(memory, slow)
    state, at, outputs = memory.op.init_state(p, B), [0] * B, [[] for _ in range(B)]
    with torch.no_grad():
        expected, end = run_naive(memory, slow, frames, lengths=total)
        for kind, rows in calls:
            T = 1 if kind == "step" else max(rows) + spare  # frames that no row has
            call = make_frames(B=B, T=T)
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
        assert_near(torch.cat(outputs[b], dim=1), expected[b, :, : total[b]], 1e-13)
    assert_same_state(memory, slow, state, end)


@every_memory
def test_no_decay_is_the_papers_memory_bit_for_bit(memory):
    frames = make_frames(T=11)
    plain, zero = (params(memory, make_slow(memory, decay=d)) for d in (None, 0.0))
    with torch.no_grad():
        a, b = (memory.op.chunk(p, memory.op.init_state(p, 2), **frames) for p in (plain, zero))
    (c, d), (e, f) = (stream(memory, make_slow(memory, decay=x), frames) for x in (None, 0.0))
    assert torch.equal(a[0], b[0])
    assert torch.equal(c, e)
    for pair in ((a[1], b[1]), (d, f)):
        for x, y in zip(*pair, strict=True):
            assert torch.equal(x, y)


def wrong_tau(monkeypatch):
    monkeypatch.setattr(naive, "tau", lambda delta, t: torch.clamp(1 / (t + 2) + delta[t], min=0))


def unclamped_tau(monkeypatch):
    monkeypatch.setattr(naive, "tau", lambda delta, t: 1 / (t + 1) + delta[t])


def decay_to_zero(monkeypatch):
    right = naive.forget
    monkeypatch.setattr(
        naive,
        "forget",
        lambda W, W0, d: right(W, {n: torch.zeros_like(w) for n, w in W.items()}, d),
    )


def shifted_grid(monkeypatch):
    right = naive.init_state
    monkeypatch.setattr(
        naive, "init_state", lambda W0, B: right(W0, B)._replace(pos=[1] * B), raising=True
    )


def bias_not_written(monkeypatch):
    right = naive.inner_gradient
    monkeypatch.setattr(
        naive,
        "inner_gradient",
        lambda *a: {n: g * (n[0] != "b") for n, g in right(*a).items()},
    )


def sum_of_the_loss_not_half(monkeypatch):
    right = naive.inner_loss
    monkeypatch.setattr(naive, "inner_loss", lambda *a: 2 * right(*a))


BREAKS = (
    wrong_tau,
    unclamped_tau,
    decay_to_zero,
    shifted_grid,
    bias_not_written,
    sum_of_the_loss_not_half,
)


def chunks_counted_from_one(monkeypatch):
    right = naive.writes
    monkeypatch.setattr(naive, "writes", lambda c, N: right(c + 1, N))


def first_chunk_of_N_written(monkeypatch):
    monkeypatch.setattr(naive, "writes", lambda c, N: c % N == 0)


def every_chunk_written(monkeypatch):
    monkeypatch.setattr(naive, "writes", lambda c, N: True)


MISCOUNTS = (chunks_counted_from_one, first_chunk_of_N_written, every_chunk_written)


@pytest.mark.parametrize(
    ("memory", "break_it"),
    [(m, f) for m in ROWS for f in BREAKS + MISCOUNTS * (m.write_every > 1)],
    ids=lambda x: getattr(x, "__name__", repr(x)),
)
def test_the_contract_sees_a_broken_equation(memory, break_it, monkeypatch):
    slow, frames = make_slow(memory, C=4), make_frames(T=8 * memory.write_every + 1)
    p = params(memory, slow)
    with torch.no_grad():
        actual, _ = memory.op.chunk(p, memory.op.init_state(p, 2), **frames)
        assert_near(actual, run_naive(memory, slow, frames)[0], 1e-13)
        break_it(monkeypatch)
        broken, _ = run_naive(memory, slow, frames)
    with pytest.raises(AssertionError):
        assert_near(actual, broken, 1e-4)


# 2. Causal.


@every_memory
def test_a_frame_changes_no_output_before_it_nor_after_a_chunk_that_is_not_written(memory):
    slow, frames, T = make_slow(memory), make_frames(T=11), 11
    p = params(memory, slow)
    with torch.no_grad():
        _, start = memory.op.chunk(
            p, memory.op.init_state(p, 2), **make_frames(7, T=5), lengths=torch.tensor([5, 2])
        )
        before, _ = memory.op.chunk(p, clone(start), **frames)
        c = (start.pos[:, None] + torch.arange(T)) // 4
        written = (c + 1) % memory.write_every == 0
        for t in range(T):
            changed = {name: x.clone() for name, x in frames.items()}
            changed["q"][:, :, t] = changed["q"][:, :, t].flip(-1)
            changed["k"][:, :, t] = changed["k"][:, :, t].flip(-1)
            changed["v"][:, :, t] += 3
            changed["eta"][:, :, t] *= 2
            after, _ = memory.op.chunk(p, clone(start), **changed)
            assert torch.equal(after[:, :, :t], before[:, :, :t])
            reached = written[:, t, None] | (c == c[:, t, None])
            differs = (after != before).any(-1)[:, :, t:].transpose(1, 2)
            assert not differs[~reached[:, t:]].any()
            assert differs[reached[:, t:]].float().mean() > 0.7


@every_memory
def test_no_gradient_comes_from_the_past_to_the_future(memory):
    slow, frames = make_slow(memory), make_frames(T=11)
    p = params(memory, slow)
    leaves = {name: x.requires_grad_() for name, x in frames.items()}
    o, _ = memory.op.chunk(p, memory.op.init_state(p, 2), **leaves)
    for t in (1, 4, 6):
        grads = torch.autograd.grad(o[:, :, :t].square().sum(), leaves.values(), retain_graph=True)
        for g in grads:
            assert not g[:, :, t:].any()
            assert g[:, :, :t].any()


# 3. Outer gradients.


def gradients(memory, slow, frames, start, form, lengths=None, cut=None):
    """Of a random functional of outputs and final state, to every input by name."""
    C = len(slow["delta"])
    leaves = {n: x.detach().clone().requires_grad_() for n, x in {**slow, **frames}.items()}
    slow = {n: leaves[n] for n in slow}
    frames = {n: leaves[n] for n in frames}
    state = None
    if start is not None:
        leaves |= {f"state {n}": w.detach().clone().requires_grad_() for n, w in start.W.items()}
        W = {n: leaves[f"state {n}"] for n in start.W}
        pairs = [
            [tuple(x.detach().clone().requires_grad_() for x in p) for p in row]
            for row in start.pairs
        ]
        for b, row in enumerate(pairs):
            for s, pair in enumerate(row):
                leaves |= {f"pair {b} {s} {n}": x for n, x in zip("kve", pair, strict=True)}
        state = naive.State(W, pairs, start.pos)
    if form == "naive":
        o, end = run_naive(memory, slow, frames, state, lengths)
        end = fast_state(memory, slow, end)
    else:
        p = params(memory, slow)
        B, T = frames["q"].shape[0], frames["q"].shape[2]
        if state is None:
            fast = memory.op.init_state(p, B)
        else:
            fast = fast_state(memory, slow, state, stale=1e6)
        lengths = None if lengths is None else torch.tensor(lengths)
        outs = []
        for begin, stop in ((0, cut), (cut, T)) if cut else ((0, T),):
            part = take(frames, slice(begin, stop))
            if cut is None:
                out, fast = memory.op.chunk(p, fast, **part, lengths=lengths)
            else:
                out, fast = memory.op.chunk(p, fast, **part)
            outs.append(out)
        o, end = torch.cat(outs, dim=2), fast
    gen = torch.Generator().manual_seed(5)
    loss = o.new_zeros(())
    for x in (o, *live(memory, end, C).values()):
        loss = loss + (x * torch.randn(x.shape, generator=gen, dtype=x.dtype)).sum()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def assert_same_gradients(actual, expected, tolerance=1e-12):
    assert actual.keys() == expected.keys()
    for name, g in expected.items():
        assert g.abs().max() > 0, f"nothing reaches {name}"
        error = (actual[name] - g).abs().max() / g.abs().max()
        assert error <= tolerance, f"gradient of {name}: relative error {error:.2e}"


@every_memory
@pytest.mark.parametrize("C", [1, 4, 16])
def test_outer_gradients_are_double_backward_through_the_definition(memory, C):
    T = 2 * C * memory.write_every + C // 2 + 1
    slow, frames = make_slow(memory, C=C), make_frames(T=T)
    assert_same_gradients(*(gradients(memory, slow, frames, None, f) for f in ("fast", "naive")))


def a_state(memory, slow, lengths):
    """The definition's state after some frames, each row at its own position."""
    frames = make_frames(7, B=len(lengths), T=max(lengths))
    with torch.no_grad():
        return run_naive(memory, slow, frames, lengths=lengths)[1]


@every_memory
@pytest.mark.parametrize("lengths", [None, [8, 3]])
@pytest.mark.parametrize("at", [[6, 3], [6, 2]])  # [6, 2]: one place, but of different chunks
def test_outer_gradients_of_a_carried_state(memory, at, lengths):
    slow, frames = make_slow(memory), make_frames(T=8)
    start = a_state(memory, slow, at)
    actual, expected = (
        gradients(memory, slow, frames, start, f, lengths) for f in ("fast", "naive")
    )
    assert_same_gradients(actual, expected)
    if lengths is not None:
        assert not any(actual[name][1, :, lengths[1] :].any() for name in frames)


@every_memory
def test_outer_gradients_through_forty_chunks(memory):
    slow, frames = make_slow(memory, C=4), make_frames(B=1, T=40 * 4 + 3)
    start = a_state(memory, slow, [6])
    assert_same_gradients(*(gradients(memory, slow, frames, start, f) for f in ("fast", "naive")))


@every_memory
def test_gradcheck(memory):
    slow = make_slow(memory, H=1, D=3, C=2)
    p = params(memory, slow)
    B, names = 2, list(slow)
    state = fast_state(memory, slow, a_state_of(memory, slow, B))
    tensors = [x for n, x in state._asdict().items() if n != "pos"]
    frames = make_frames(B=B, H=1, T=3, D=3)
    gen = torch.Generator().manual_seed(3)
    inputs = [x.detach().clone().requires_grad_() for x in (*slow.values(), *tensors)]
    inputs += [x.requires_grad_() for x in frames.values()]
    with torch.no_grad():
        end = memory.op.chunk(p, state, **frames)[1]
    size = sum(x.numel() for x in live(memory, end, 2).values())
    mix = torch.randn(4, size, generator=gen, dtype=torch.float64)

    def function(*args):
        p = memory.op.Params(**dict(zip(names, args, strict=False)))
        weights = args[len(names) : len(names) + len(tensors)]
        start = memory.op.State(*weights, pos=state.pos)
        o, end = memory.op.chunk(p, start, *args[-4:])
        flat = torch.cat([x.flatten() for x in live(memory, end, 2).values()])
        return o, mix @ flat

    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-5)


def a_state_of(memory, slow, B):
    frames = make_frames(7, B=B, H=1, T=3, D=3)
    with torch.no_grad():
        return run_naive(memory, slow, frames, lengths=[3, 2][:B])[1]


# 4. Segments.


@every_memory
@pytest.mark.parametrize("cut", [3, 8, 13])
def test_two_calls_are_one(memory, cut):
    slow, frames = make_slow(memory), make_frames(T=19)
    p = params(memory, slow)
    with torch.no_grad():
        whole, end = memory.op.chunk(p, memory.op.init_state(p, 2), **frames)
        first, mid = memory.op.chunk(p, memory.op.init_state(p, 2), **take(frames, slice(0, cut)))
        second, last = memory.op.chunk(p, mid, **take(frames, slice(cut, None)))
    assert_near(torch.cat([first, second], dim=2), whole, 1e-13)
    assert torch.equal(last.pos, end.pos)
    wanted = live(memory, end, 4)
    for name, x in live(memory, last, 4).items():
        assert_near(x, wanted[name], 1e-13, name)
    assert_same_gradients(
        gradients(memory, slow, frames, None, "fast", cut=cut),
        gradients(memory, slow, frames, None, "fast"),
    )


@every_memory
def test_a_call_leaves_the_state_it_was_given_alone(memory):
    slow, frames = make_slow(memory), make_frames(T=9)
    p = params(memory, slow)
    state = fast_state(memory, slow, a_state(memory, slow, [6, 3]))
    kept = clone(state)
    with torch.no_grad():
        memory.op.chunk(p, state, **frames)
    for x, y in zip(state, kept, strict=True):
        assert torch.equal(x, y)


@every_memory
def test_no_frame_moves_nothing(memory):
    slow = make_slow(memory)
    p = params(memory, slow)
    state = fast_state(memory, slow, a_state(memory, slow, [6, 3]))
    kept = clone(state)
    with torch.no_grad():
        o, end = memory.op.chunk(p, state, **make_frames(T=0))
        zero, same = memory.op.chunk(p, state, **make_frames(T=3), lengths=torch.tensor([0, 0]))
        memory.op.step(p, state, **make_frames(T=1), exec_mask=torch.tensor([False, False]))
    assert o.shape == (2, 2, 0, 6)
    assert not zero.any()
    for after in (end, same, state):
        for x, y in zip(after, kept, strict=True):
            assert torch.equal(x, y)


@every_memory
def test_the_chunk_size_is_part_of_the_function(memory):
    frames = make_frames(T=16)
    outs = []
    for C in (4, 8):
        slow = make_slow(memory) | {"delta": torch.zeros(C, dtype=torch.float64)}
        p = params(memory, slow)
        with torch.no_grad():
            outs.append(memory.op.chunk(p, memory.op.init_state(p, 2), **frames)[0])
    assert (outs[0] - outs[1])[:, :, 4:].abs().max() > 1e-2


# 6. float32, and what a state is made of.


@every_memory
def test_float32_streamed_is_chunked(memory):
    size = dict(D=16, dtype=torch.float32)
    slow = make_slow(memory, C=16, decay=1e-3, scale=2.0, **size)
    frames = make_frames(T=203, **size)
    p = params(memory, slow)
    with torch.no_grad():
        chunked, end = memory.op.chunk(p, memory.op.init_state(p, 2), **frames)
    stepped, last = stream(memory, slow, frames)
    assert 3 < chunked.abs().max() < 11
    assert (chunked - stepped).abs().max() <= 1e-5
    wanted = live(memory, end, 16)
    for name, x in live(memory, last, 16).items():
        assert (x - wanted[name]).abs().max() <= 1e-5, name


@every_memory
@pytest.mark.parametrize(
    ("given_dtype", "kept"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_a_state_is_never_below_float32(memory, given_dtype, kept):
    p = params(memory, make_slow(memory, dtype=given_dtype))
    state = memory.op.init_state(p, 3)
    shapes = memory.shapes(6)
    for name, x in state._asdict().items():
        assert x.dtype == (torch.int64 if name == "pos" else kept), name
        assert x.is_contiguous(), f"{name} cannot be written in place"
        if name in shapes:
            assert x.shape == (3, 2, *shapes[name])
            assert torch.equal(x[1], getattr(p, name).to(kept))
    assert state.pos.tolist() == [0, 0, 0]
    frames = make_frames(B=3, T=6, dtype=kept)
    with torch.no_grad():
        o, state = memory.op.chunk(p, state, **frames)
        memory.op.step(p, state, **take(frames, slice(0, 1)))
    assert o.dtype == kept
    for name, x in state._asdict().items():
        assert x.dtype == (torch.int64 if name == "pos" else kept), name


@every_memory
def test_a_step_writes_in_place(memory):
    slow, frames = make_slow(memory), make_frames(T=9)
    state = memory.op.init_state(params(memory, slow), 2)
    before = [x.data_ptr() for x in state]
    _, after = stream(memory, slow, frames, state)
    assert [x.data_ptr() for x in after] == before
    assert after.pos.tolist() == [9, 9]


@every_memory
def test_a_stale_row_of_a_buffer_never_leaks(memory):
    slow, frames = make_slow(memory), make_frames(T=9)
    p = params(memory, slow)
    for start in (naive.init_state({n: slow[n] for n in memory.shapes(1)}, 2), None):
        start = start or a_state(memory, slow, [6, 3])
        clean, stale = (fast_state(memory, slow, start, stale=x) for x in (0.0, 1e6))
        clean, stale = clone(clean), clone(stale)
        assert any((getattr(stale, n) == 1e6).any() for n in buffers(memory))
        with torch.no_grad():
            a, after_a = memory.op.chunk(p, clean, **frames)
            b, after_b = memory.op.chunk(p, stale, **frames)
        assert torch.equal(a, b)
        for name, x in live(memory, after_b, 4).items():
            assert torch.equal(x, live(memory, after_a, 4)[name]), name
        c, d = (stream(memory, slow, frames, s)[0] for s in (clean, stale))
        assert torch.equal(c, d)
        assert_near(c, a, 1e-13)


# 7. A state that moved.


@every_memory
def test_the_memory_learns_what_is_repeated(memory):
    D, n, N = 16, 20, memory.write_every  # 5 chunks: each has its turn to be written
    slow = make_slow(memory, D=D, C=4, decay=None)
    slow["delta"] = torch.zeros_like(slow["delta"])
    frames = {x: torch.cat([f] * 30 * N, dim=2) for x, f in make_frames(B=1, T=n, D=D).items()}
    frames["eta"] = torch.full_like(frames["eta"], 0.5 / D)
    W0 = {name: slow[name] for name in memory.shapes(D)}
    p = params(memory, slow)

    def loss(state):
        W = {name: getattr(state, name)[0] for name in W0}
        pairs = zip(frames["k"][0, :, :n].unbind(1), frames["v"][0, :, :n].unbind(1), strict=True)
        each = [naive.inner_loss(memory.f, W, slow["gamma"], slow["beta"], *kv) for kv in pairs]
        return torch.stack(each).mean()

    with torch.no_grad():
        start = memory.op.init_state(p, 1)
        _, first = memory.op.chunk(p, start, **take(frames, slice(0, 4 * N)))
        _, once = memory.op.chunk(p, start, **take(frames, slice(0, n * N)))
        _, last = memory.op.chunk(p, start, **frames)
    for name, w0 in W0.items():
        assert (getattr(first, name)[0] - w0).abs().max() > 1e-3, f"{name} did not move"
    assert loss(start) > loss(once) > loss(last)
    assert loss(last) < 0.5 * loss(start)
