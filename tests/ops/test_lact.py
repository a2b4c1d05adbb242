"""LaCT against its definition: any start, any cut, every option, gradients too."""

import random

import pytest
import torch
from torch import Tensor

from moshi_ttt.ops import lact
from tests.contract import assert_near, clone, take
from tests.ops.lact_case import (
    NAMES,
    OPTIONS,
    assert_same_gradients,
    assert_same_state,
    case,
    define,
    fast_state,
    leaves,
    meaning,
    outputs_and_gradients,
    params,
)


@pytest.mark.parametrize("C", [1, 3, 4, 16])
@pytest.mark.parametrize("name", OPTIONS)
def test_chunk_is_its_definition(name, C):
    """Outputs, state and every gradient, rows apart, from inside a chunk to inside another."""
    T = {1: 6, 3: 11, 4: 13, 16: 37}[C]
    c = case(C, B=3, T=T + 7, C=C, **OPTIONS[name])
    before = {n: x[:, :, :7] for n, x in c.frames.items()}
    c.frames = {n: x[:, :, 7:] for n, x in c.frames.items()}
    with torch.no_grad():
        _, start = define(c, before, lengths=[7, 2, 0])
    found, start = leaves(c, start)
    lengths = [T, T - 2, T - 5]

    wanted_o, wanted_state = define(c, state=start, lengths=lengths)
    o, state = lact.chunk(
        params(c), fast_state(c, start, stale=1e6), **c.frames, lengths=torch.tensor(lengths)
    )
    muon = c.options["muon"]
    assert_near(o, wanted_o, 1e-12 if muon else 1e-13)
    assert_same_state(c, state, wanted_state, 1e-12 if muon else 1e-13)
    wanted = outputs_and_gradients(wanted_o, fast_state(c, wanted_state), found)
    assert_same_gradients(outputs_and_gradients(o, state, found), wanted, 1e-11 if muon else 1e-12)


@pytest.mark.parametrize("together", [True, False])
def test_gradients_over_many_groups_of_chunks(together):
    """18 chunks in groups of 5, from inside the first into the last.

    Rows that stand together are laid out by a reshape, others by a gather.
    """
    c = case(3, T=53, C=3)
    with torch.no_grad():
        _, start = define(c, take(c.frames, slice(2)), lengths=[2, 2 if together else 1])
    c.frames = take(c.frames, slice(2, None))
    found, start = leaves(c, start)
    lengths = [51, 51] if together else [51, 40]
    wanted_o, wanted_state = define(c, state=start, lengths=lengths)
    o, state = lact.chunk(
        params(c), fast_state(c, start, stale=1e6), **c.frames, lengths=torch.tensor(lengths)
    )
    assert_near(o, wanted_o, 1e-12)
    assert_same_state(c, state, wanted_state, 1e-12)
    wanted = outputs_and_gradients(wanted_o, fast_state(c, wanted_state), found)
    assert_same_gradients(outputs_and_gradients(o, state, found), wanted, 1e-11)


@pytest.mark.parametrize("name", ["plain", "neither", "stacked residual"])
@pytest.mark.parametrize("seed", range(4))
def test_any_cut_into_calls(seed, name):
    """Chunk and step calls at random, each row at its own position."""
    pick = random.Random(seed)
    C = pick.choice([1, 3, 4])
    c = case(seed, B=3, T=19, C=C, **OPTIONS[name])
    p = params(c)
    state, at = lact.init_state(p, c.B), [0] * c.B
    out = torch.zeros_like(c.frames["q"])
    while min(at) < c.T:
        n = [min(pick.randint(0, 5), c.T - a) for a in at]
        if pick.random() < 0.5:  # frames past a row's own are garbage
            T = max(n)
            call = {name: x[:, :, :T].clone().fill_(1e6) for name, x in c.frames.items()}
            for b, (a, m) in enumerate(zip(at, n, strict=True)):
                for name, x in c.frames.items():
                    call[name][b, :, :m] = x[b, :, a : a + m]
            o, state = lact.chunk(p, state, **call, lengths=torch.tensor(n))
            for b, (a, m) in enumerate(zip(at, n, strict=True)):
                out[b, :, a : a + m] = o[b, :, :m]
                assert not o[b, :, m:].any()
            at = [a + m for a, m in zip(at, n, strict=True)]
        else:
            there = torch.tensor(n) > 0
            index = torch.tensor(at).clamp(max=c.T - 1)
            call = {
                name: x[torch.arange(c.B), :, index].unsqueeze(2) for name, x in c.frames.items()
            }
            o = lact.step(p, state, **call, exec_mask=there)
            for b in there.nonzero().flatten().tolist():
                out[b, :, at[b]] = o[b, :, 0]
                at[b] += 1
    wanted_o, wanted_state = define(c)
    assert_near(out, wanted_o, 1e-11)
    assert_same_state(c, state, wanted_state, 1e-11)


@pytest.mark.parametrize(
    "options", [{"r": 2, "residual": True}, {"r": 2, "width": 2}, {"muon": False}]
)
def test_gradcheck(options):
    """Chunks shorter than the head is wide, from inside a chunk."""
    c = case(1, B=1, H=1, T=5, D=3, C=2, **{"width": 4, **options})
    p, start = params(c), lact.init_state(params(c), 1)
    with torch.no_grad():
        _, start = lact.chunk(p, start, **take(c.frames, slice(3)))
    frames = take(c.frames, slice(3, None))
    inputs = [*p[:4], *start[:-1], *frames.values()]

    def call(*x: Tensor):
        W0, state, frames = x[:4], x[4:15], x[15:]
        o, after = lact.chunk(p._replace(**dict(zip(lact.Params._fields, W0, strict=False))),
                              lact.State(*state, start.pos), *frames)  # fmt: skip
        return o, *after[:-1]

    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(call, inputs, eps=1e-6, atol=1e-5, fast_mode=True)


def test_second_derivatives_are_refused():
    c = case()
    c.frames["k"].requires_grad_()
    o, _ = lact.chunk(params(c), lact.init_state(params(c), 2), **c.frames)
    (g,) = torch.autograd.grad(o.square().sum(), c.frames["k"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


@pytest.mark.parametrize("t", [4, 6, 7])
def test_nothing_comes_before_its_time(t):
    """A frame's write is not even read by the rest of its chunk."""
    c = case(T=12)
    o, _ = lact.chunk(params(c), lact.init_state(params(c), 2), **c.frames)
    for name in NAMES:
        other = c.frames | {name: c.frames[name].clone()}
        other[name][:, :, t] += 0.5
        changed, _ = lact.chunk(params(c), lact.init_state(params(c), 2), **other)
        same = (changed == o).all((0, 1, 3))
        assert same[:t].all()
        assert same[t : (t // 4 + 1) * 4].tolist().count(False) == (name == "q")
        assert name == "q" or not same[(t // 4 + 1) * 4 :].any()


@pytest.mark.parametrize("stale", [1e6, -3.0])
def test_stale_rows_never_leak(stale):
    c = case(B=3, T=11)
    _, start = define(c, take(c.frames, slice(7)), lengths=[7, 2, 4])
    rest = take(c.frames, slice(7, None))
    clean, dirty = (clone(fast_state(c, start, x)) for x in (0, stale))
    a, after = lact.chunk(params(c), clean, **rest)
    b, after_dirty = lact.chunk(params(c), dirty, **rest)
    assert torch.equal(a, b)
    for x, y in zip(meaning(c, after).values(), meaning(c, after_dirty).values(), strict=True):
        assert torch.equal(x, y)
    for t in range(4):
        frame = take(rest, slice(t, t + 1))
        one = lact.step(params(c), clean, **frame)
        assert torch.equal(one, lact.step(params(c), dirty, **frame))
    for x, y in zip(meaning(c, clean).values(), meaning(c, dirty).values(), strict=True):
        assert torch.equal(x, y)


def test_step_keeps_storage_and_the_rows_without_a_frame():
    c = case(B=3, T=9)
    p = params(c)
    state = lact.init_state(p, 3)
    where = [x.data_ptr() for x in state]
    assert len(set(where)) == len(where)
    for t in range(9):
        before = clone(state)
        lact.step(p, state, **take(c.frames, slice(t, t + 1)), exec_mask=torch.arange(3) != t % 3)
        for x, y in zip(state, before, strict=True):
            assert torch.equal(x[t % 3], y[t % 3])
    assert state.pos.tolist() == [6, 6, 6]
    assert [x.data_ptr() for x in state] == where
    assert all(x.is_contiguous() for x in state)


@pytest.mark.parametrize("name", ["plain", "stacked residual", "neither"])
def test_float32_streamed_against_chunked(name):
    size = 2 if name == "stacked residual" else 10
    c = case(T=61, D=32, width=32, C=16, size=size, dtype=torch.float32, **OPTIONS[name])
    p = params(c)
    whole, end = lact.chunk(p, lact.init_state(p, 2), **c.frames)
    state = lact.init_state(p, 2)
    one = [lact.step(p, state, **take(c.frames, slice(t, t + 1))) for t in range(c.T)]
    assert 2 < whole.abs().max() < 20
    assert (torch.cat(one, 2) - whole).abs().max() <= 1e-5
    for x, y in zip(meaning(c, state).values(), meaning(c, end).values(), strict=True):
        assert_near(x, y, 1e-5)
