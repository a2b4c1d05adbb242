"""What holds for every memory: the fast forms are the definition, in value and in gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from tests.contract import (
    MEMORIES_UNDER_TEST,
    assert_near,
    assert_same_state,
    clone,
    fast_state,
    live,
    make_frames,
    make_slow,
    params,
    run_naive,
    stream,
    take,
    with_leaves,
)

every_memory = pytest.mark.parametrize("memory", MEMORIES_UNDER_TEST, ids=repr)
every_ttt = pytest.mark.parametrize(
    "memory", [m for m in MEMORIES_UNDER_TEST if m.name.startswith("ttt")], ids=repr
)


def period(memory, C):
    """Frames from write to write."""
    return C * memory.settings.get("write_every", 1)


# 1. One function, three forms.


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


# 2. Causal.


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


# 3. Outer gradients.


def gradients(memory, slow, frames, start, form, lengths=None, cut=None):
    """Of a random functional of outputs and final state, to every input by name."""
    (slow, frames, start), leaves = with_leaves((slow, frames, start), "leaf")
    B, T = frames["q"].shape[0], frames["q"].shape[2]
    if form == "naive":
        o, end = run_naive(memory, slow, frames, start, lengths)
        end = fast_state(memory, slow, end)
    else:
        p, outs = params(memory, slow), []
        fast = memory.op.init_state(p, B)
        if start is not None:
            fast = fast_state(memory, slow, start, stale=1e6)
        lengths = None if lengths is None else torch.tensor(lengths)
        for begin, stop in ((0, cut), (cut, T)) if cut else ((0, T),):
            part = take(frames, slice(begin, stop))
            out, fast = memory.op.chunk(p, fast, **part, lengths=lengths)
            outs.append(out)
        o, end = torch.cat(outs, dim=2), fast
    gen = torch.Generator().manual_seed(5)
    loss = o.new_zeros(())
    for _, x in [*sorted(live(memory, slow, end).items()), ("", o)]:
        loss = loss + (x * torch.randn(x.shape, generator=gen, dtype=x.dtype)).sum()
    idle = {id(frames[name]) for name in memory.idle}
    leaves = {name: x for name, x in leaves.items() if id(x) not in idle and x.numel()}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), found, strict=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in pairs}


def assert_same_gradients(memory, actual, expected, unreached=0.0):
    """At most that part of the leaves may be such that nothing depends on them."""
    assert actual.keys() == expected.keys()
    nothing = {name for name, g in expected.items() if not g.any()}
    assert len(nothing) <= unreached * len(expected), f"nothing reaches {nothing}"
    for name, g in expected.items():
        if name in nothing:
            assert not actual[name].any(), name
            continue
        error = (actual[name] - g).abs().max() / g.abs().max()
        assert error <= memory.slope, f"gradient of {name}: relative error {error:.2e}"


@every_memory
@pytest.mark.parametrize("C", [1, 4, 16])
def test_outer_gradients_are_double_backward_through_the_definition(memory, C):
    T = 2 * period(memory, C) + C // 2 + 1
    slow, frames = make_slow(memory, C=C), make_frames(memory, T=T)
    actual, expected = (gradients(memory, slow, frames, None, f) for f in ("fast", "naive"))
    assert_same_gradients(memory, actual, expected)


def a_state(memory, slow, lengths, **size):
    """The definition's state after some frames, each row at its own position."""
    frames = make_frames(memory, 7, B=len(lengths), T=max(lengths), **size)
    with torch.no_grad():
        return run_naive(memory, slow, frames, lengths=lengths)[1]


@every_memory
@pytest.mark.parametrize("lengths", [None, [8, 3]])
@pytest.mark.parametrize("at", [[6, 3], [6, 2]])  # [6, 2]: one place, but of different chunks
def test_outer_gradients_of_a_carried_state(memory, at, lengths):
    slow, frames = make_slow(memory), make_frames(memory, T=8)
    start = a_state(memory, slow, at)
    actual, expected = (
        gradients(memory, slow, frames, start, f, lengths) for f in ("fast", "naive")
    )
    # of a first chunk the momentum gate; of Atlas what the definition's state has twice
    assert_same_gradients(memory, actual, expected, unreached=0.3)


@every_memory
def test_no_gradient_reaches_a_frame_that_does_not_exist(memory):
    slow, frames = make_slow(memory), make_frames(memory, T=8)
    leaves = {name: x.requires_grad_() for name, x in frames.items()}
    p = params(memory, slow)
    o, end = memory.op.chunk(p, memory.op.init_state(p, 2), **leaves, lengths=torch.tensor([8, 3]))
    loss = o.square().sum() + sum(x.square().sum() for x in live(memory, slow, end).values())
    loss.backward()
    for name, x in leaves.items():
        assert x.grad is None or not x.grad[1, :, 3:].any(), name


@every_memory
def test_outer_gradients_through_many_chunks(memory):
    n = 24 if memory.name.startswith("ttt") else 16  # with Muon a rounding error grows
    slow, frames = make_slow(memory, C=4), make_frames(memory, B=1, T=n * 4 - 3)
    start = a_state(memory, slow, [6])
    found = (gradients(memory, slow, frames, start, f) for f in ("fast", "naive"))
    assert_same_gradients(memory, *found, unreached=0.3)


@every_memory
@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gradcheck(memory, fast):
    """Fast: along random directions; else every entry of the Jacobian."""
    size = dict(H=1, D=3)
    slow = make_slow(memory, C=2, **size)
    start = fast_state(memory, slow, a_state(memory, slow, [3, 2], **size))
    frames = make_frames(memory, B=2, T=3, **size)
    gen = torch.Generator().manual_seed(3)
    given = (slow, {n: x for n, x in start._asdict().items() if n != "pos"}, frames)
    flat, spec = pytree.tree_flatten(given)
    places = [i for i, x in enumerate(flat) if isinstance(x, torch.Tensor)]

    def call(tensors):
        at = dict(zip(places, tensors, strict=True))
        values = [at.get(i, x) for i, x in enumerate(flat)]
        slow, state, frames = pytree.tree_unflatten(values, spec)
        state = memory.op.State(**state, pos=start.pos)
        return memory.op.chunk(params(memory, slow), state, **frames)

    def flat_state(end):
        return torch.cat([x.flatten() for _, x in sorted(live(memory, slow, end).items())])

    inputs = [flat[i].detach().clone().requires_grad_() for i in places]
    with torch.no_grad():
        width = flat_state(call(inputs)[1]).numel()
    mix = torch.randn(4, width, generator=gen, dtype=torch.float64)

    def function(*tensors):
        o, end = call(tensors)
        return o, mix @ flat_state(end)

    assert torch.autograd.gradcheck(
        function, inputs, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=fast
    )


# 4. Segments.


@every_memory
@pytest.mark.parametrize("cut", [3, 8, 13])
def test_two_calls_are_one(memory, cut):
    slow, frames = make_slow(memory), make_frames(memory, T=19)
    p = params(memory, slow)
    with torch.no_grad():
        whole, end = memory.op.chunk(p, memory.op.init_state(p, 2), **frames)
        first, mid = memory.op.chunk(p, memory.op.init_state(p, 2), **take(frames, slice(0, cut)))
        second, last = memory.op.chunk(p, mid, **take(frames, slice(cut, None)))
    assert_near(torch.cat([first, second], dim=2), whole, memory.tolerance)
    assert torch.equal(last.pos, end.pos)
    wanted = live(memory, slow, end)
    for name, x in live(memory, slow, last).items():
        assert_near(x, wanted[name], memory.tolerance, name)
    assert_same_gradients(
        memory,
        gradients(memory, slow, frames, None, "fast", cut=cut),
        gradients(memory, slow, frames, None, "fast"),
    )


@every_memory
def test_a_call_leaves_the_state_it_was_given_alone(memory):
    slow, frames = make_slow(memory), make_frames(memory, T=9)
    p = params(memory, slow)
    state = clone(fast_state(memory, slow, a_state(memory, slow, [6, 3])))
    kept = clone(state)
    with torch.no_grad():
        memory.op.chunk(p, state, **frames)
    for x, y in zip(state, kept, strict=True):
        assert torch.equal(x, y)


@every_memory
def test_no_frame_moves_nothing(memory):
    slow = make_slow(memory)
    p = params(memory, slow)
    state = clone(fast_state(memory, slow, a_state(memory, slow, [6, 3])))
    kept = clone(state)
    with torch.no_grad():
        o, end = memory.op.chunk(p, state, **make_frames(memory, T=0))
        three, zero = make_frames(memory, T=3), torch.tensor([0, 0])
        nothing, same = memory.op.chunk(p, state, **three, lengths=zero)
        memory.op.step(p, state, **make_frames(memory, T=1), exec_mask=zero.bool())
    assert o.shape == (2, 2, 0, 6)
    assert not nothing.any()
    for after in (end, same, state):
        for x, y in zip(after, kept, strict=True):
            assert torch.equal(x, y)


@every_memory
def test_the_chunk_size_is_part_of_the_function(memory):
    frames, outs = make_frames(memory, T=16), []
    for C in (4, 8):
        slow = make_slow(memory, C=C)
        if "delta" in slow:
            slow["delta"] = torch.zeros_like(slow["delta"])
        p = params(memory, slow)
        with torch.no_grad():
            outs.append(memory.op.chunk(p, memory.op.init_state(p, 2), **frames)[0])
    written = memory.settings.get("write_every", 1) > 1  # one that is, and one that is not
    assert written or (outs[0] - outs[1])[:, :, 4:].abs().max() > 1e-3


# 6. float32, and what a state is made of.


@every_memory
def test_float32_streamed_is_chunked(memory):
    size = dict(D=16, dtype=torch.float32)
    slow = make_slow(memory, C=16, decay=1e-3, scale=2.0, **size)
    if "eta" in slow:
        slow["eta"] *= 0.1  # with larger writes a rounding error grows from chunk to chunk
    frames = make_frames(memory, T=203, **size)
    p = params(memory, slow)
    with torch.no_grad():
        chunked, end = memory.op.chunk(p, memory.op.init_state(p, 2), **frames)
    stepped, last = stream(memory, slow, frames)
    assert 0.1 < chunked.abs().max() < 12
    assert (chunked - stepped).abs().max() <= 1e-5
    wanted = live(memory, slow, end)
    for name, x in live(memory, slow, last).items():
        assert_near(x, wanted[name], 1e-5, name)


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
    for name, x in state._asdict().items():
        assert x.dtype == (torch.int64 if name == "pos" else kept), name
        assert x.is_contiguous(), f"{name} cannot be written in place"
        assert x.shape[0] == 3, name
    for name in memory.op.WEIGHTS:
        if getattr(p, name) is not None:
            assert torch.equal(getattr(state, name)[1], getattr(p, name).to(kept))
    assert state.pos.tolist() == [0, 0, 0]
    frames = make_frames(memory, B=3, T=6, dtype=kept)
    with torch.no_grad():
        o, state = memory.op.chunk(p, state, **frames)
        memory.op.step(p, state, **take(frames, slice(0, 1)))
    assert o.dtype == kept
    for name, x in state._asdict().items():
        assert x.dtype == (torch.int64 if name == "pos" else kept), name


@every_memory
def test_a_step_writes_in_place(memory):
    slow, frames = make_slow(memory), make_frames(memory, T=9)
    state = memory.op.init_state(params(memory, slow), 2)
    before = [x.data_ptr() for x in state]
    _, after = stream(memory, slow, frames, state)
    assert [x.data_ptr() for x in after] == before
    assert len({p for p, x in zip(before, after, strict=True) if x.numel()}) == len(
        [x for x in after if x.numel()]
    )
    assert after.pos.tolist() == [9, 9]


@every_memory
def test_a_stale_row_of_a_buffer_never_leaks(memory):
    slow, frames = make_slow(memory), make_frames(memory, T=9)
    p = params(memory, slow)
    for at in ([0, 0], [6, 3]):
        start = a_state(memory, slow, at)
        clean, stale = (clone(fast_state(memory, slow, start, stale=x)) for x in (0.0, 1e6))
        with torch.no_grad():
            a, after_a = memory.op.chunk(p, clean, **frames)
            b, after_b = memory.op.chunk(p, stale, **frames)
        assert torch.equal(a, b)
        wanted = live(memory, slow, after_a)
        for name, x in live(memory, slow, after_b).items():
            assert torch.equal(x, wanted[name]), name
        c, d = (stream(memory, slow, frames, s)[0] for s in (clean, stale))
        assert torch.equal(c, d)
        assert_near(c, a, memory.tolerance)


# 7. A state that moved.


@every_memory
def test_the_memory_learns_what_is_repeated(memory):
    D, n, N = 16, 20, memory.settings.get("write_every", 1)  # 5 chunks: each has a turn to write
    slow = make_slow(memory, D=D, C=4, decay=None)
    frames = make_frames(memory, B=1, T=n, D=D)
    frames |= memory.rules.steady(frames)
    if "delta" in slow:
        slow["delta"] = torch.zeros_like(slow["delta"])
    once = {name: torch.cat([x] * N, dim=2) for name, x in frames.items()}
    p = params(memory, slow)
    start = memory.op.init_state(p, 1)

    def loss(state):
        return memory.op.inner_loss(p, state, frames["k"], frames["v"]).mean()

    with torch.no_grad():
        _, first = memory.op.chunk(p, start, **take(once, slice(0, 4 * N)))
        losses, state = [loss(start)], start
        for _ in range(30):
            _, state = memory.op.chunk(p, state, **once)
            losses.append(loss(state))
    for name in memory.op.WEIGHTS:
        if getattr(p, name) is not None:
            moved = getattr(first, name)[0] - getattr(p, name)
            assert moved.abs().max() > 1e-3, f"{name} did not move"
    assert losses[0] > losses[1] > losses[30]
    assert losses[30] < memory.rules.learned(losses[0])


@every_memory
def test_the_inner_loss_is_the_definitions(memory):
    slow, frames = make_slow(memory), make_frames(memory, T=9)
    start = a_state(memory, slow, [6, 3])
    state = fast_state(memory, slow, start)
    k, v = frames["k"], frames["v"]
    found = memory.op.inner_loss(params(memory, slow), state, k, v)
    expected = torch.stack(
        [
            torch.stack(
                [
                    memory.rules.loss(memory.name, slow, start, b, k[b, :, t], v[b, :, t])
                    for t in range(9)
                ],
                1,
            )
            for b in range(2)
        ]
    )
    assert_near(found, expected, memory.tolerance)
