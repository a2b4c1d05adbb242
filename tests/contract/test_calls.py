"""What holds for every memory: calls, states, dtypes and buffers; and that it learns."""

import pytest
import torch

from tests.contract import (
    assert_near,
    clone,
    fast_state,
    live,
    make_frames,
    make_slow,
    params,
    stream,
    take,
)
from tests.contract.cases import (
    a_state,
    assert_same_gradients,
    every_memory,
    gradients,
)


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
