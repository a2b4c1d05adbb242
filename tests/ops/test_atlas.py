"""Atlas: its fast forms are its definition, for every window, phi, depth, with Muon and without."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moshi_ttt.ops import atlas
from moshi_ttt.ops.naive import atlas as naive
from tests.ops.atlas_case import (
    KINDS,
    B,
    D,
    H,
    assert_same,
    clone,
    define,
    error,
    every_kind,
    fast_state,
    make,
    make_frames,
    stream,
    take,
)


@every_kind
@pytest.mark.parametrize("C", [1, 3, 4, 16])
def test_definition_chunk_and_step_are_one_function(deep, phi, muon, C):
    for c in {"none": (1, 16), "squares": (5, 8), "products": (1, 5)}[phi]:
        p, frames = make(deep, phi, muon, C, c), make_frames(25 if C == 16 else 2 * C + 2)
        start = atlas.init_state(p, B)
        with torch.no_grad():
            expected, end = define(p, frames)
            chunked, after = atlas.chunk(p, start, **frames)
        tolerance = 1e-11 if muon else 1e-13
        for o, state in ((chunked, after), stream(p, start, frames)):
            assert error(o, expected) <= tolerance
            assert_same(state, fast_state(p, end), tolerance)


def calls():
    lengths = st.lists(st.integers(0, 6), min_size=3, max_size=3)
    mask = st.lists(st.booleans(), min_size=3, max_size=3)
    return st.lists(st.tuples(st.just("chunk"), lengths) | st.tuples(st.just("step"), mask))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    program=calls(),
    kind=st.sampled_from(KINDS),
    C=st.sampled_from([1, 3, 4]),
    c=st.sampled_from([1, 2, 5, 8]),
    spare=st.integers(0, 2),
)
def test_every_way_of_cutting_time_into_calls(program, kind, C, c, spare):
    total = [sum(int(rows[b]) for _, rows in program) for b in range(3)]
    p, frames = make(*kind, C, c), make_frames(max(total), B=3)
    state, at, outputs = atlas.init_state(p, 3), [0] * 3, [[] for _ in range(3)]
    for x in (state.k, state.v, state.gamma):
        x.fill_(1e6)  # before a row's first frame the window holds nothing
    with torch.no_grad():
        expected, end = define(p, frames, lengths=total)
        for name, rows in program:
            T = 1 if name == "step" else max(rows) + spare
            call = {n: x.new_full((3, H, T, *x.shape[3:]), 1e3) for n, x in frames.items()}
            for b, m in enumerate(map(int, rows)):
                for n, x in frames.items():
                    call[n][b, :, :m] = x[b, :, at[b] : at[b] + m]
            if name == "step":
                before = clone(state)
                out = atlas.step(p, state, **call, exec_mask=torch.tensor(rows))
                idle = ~torch.tensor(rows)
                assert all(
                    torch.equal(x[idle], y[idle]) for x, y in zip(state, before, strict=True)
                )
            else:
                out, state = atlas.chunk(p, state, **call, lengths=torch.tensor(rows))
            for b, m in enumerate(map(int, rows)):
                outputs[b].append(out[b, :, :m])
                assert name == "step" or not out[b, :, m:].any()
                at[b] += m
    for b, parts in enumerate(outputs):
        assert not parts or error(torch.cat(parts, 1), expected[b, :, : total[b]]) <= 1e-11
    live = torch.arange(c - 1) >= c - 1 - state.pos[:, None]
    k, v = (torch.where(live[:, None, :, None], x, 0) for x in (state.k, state.v))
    gamma = torch.where(live[:, None], state.gamma, 0)
    assert_same(state._replace(k=k, v=v, gamma=gamma), fast_state(p, end), 1e-11)


def gradients(p, frames, state, run, seed=7):
    """Gradients of a random function of outputs and carried state to all that goes in."""
    o, after = run(p, frames, state)
    gen = torch.Generator().manual_seed(seed)
    outs = [x for x in (o, *after) if x.is_floating_point() and x.requires_grad]
    loss = sum((x * torch.randn(x.shape, generator=gen, dtype=x.dtype)).sum() for x in outs)
    leaves = [x for x in p if isinstance(x, torch.Tensor)] + list(frames.values())
    leaves += [x for x in state if x.is_floating_point()]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]


@every_kind
@pytest.mark.parametrize(("C", "c"), [(1, 5), (3, 1), (4, 8)])
@pytest.mark.parametrize("lengths", [None, [9, 4]])
def test_gradients_are_those_of_the_definition(deep, phi, muon, C, c, lengths):
    """Both start in the middle of a chunk, at different places if rows have different lengths."""
    p, frames = make(deep, phi, muon, C, c), make_frames(9)
    with torch.no_grad():
        _, middle = define(p, make_frames(6, seed=5), lengths=lengths and [6, 3])
    p = p._replace(**{n: x.requires_grad_() for n, x in p._asdict().items() if torch.is_tensor(x)})
    frames = {n: x.requires_grad_() for n, x in frames.items()}
    state = atlas.State(*(x.requires_grad_(x.is_floating_point()) for x in fast_state(p, middle)))

    def fast(p, frames, state):
        return atlas.chunk(p, state, **frames, lengths=lengths and torch.tensor(lengths))

    def slow(p, frames, state):
        W, Ws, S = (
            {n: getattr(state, f.format(n[1])) for n in middle.W} for f in ("W{}", "W{}s", "S{}")
        )
        pairs = [
            [(k[:, i], v[:, i], g[:, i]) for i in range(c - 1 - len(old), c - 1)]
            for k, v, g, old in zip(state.k, state.v, state.gamma, middle.pairs, strict=True)
        ]
        o, end = define(p, frames, naive.State(W, Ws, S, pairs, middle.pos), lengths)
        return o, fast_state(p, end)

    names = [n for n, x in p._asdict().items() if torch.is_tensor(x)] + list(frames)
    names += [n for n, x in state._asdict().items() if x.is_floating_point()]
    pairs = zip(names, *(gradients(p, frames, state, f) for f in (fast, slow)), strict=True)
    for name, a, b in pairs:
        assert error(a, b) <= (1e-10 if muon else 1e-12), name


@pytest.mark.parametrize(("deep", "muon"), list(itertools.product((True, False), (False, True))))
def test_gradcheck(deep, muon):
    p, frames = make(deep, "squares", muon, C=2, c=2), make_frames(5, B=1)
    state = atlas.chunk(p, atlas.init_state(p, 1), **take(frames, 0, 1))[1]
    names = [n for n in ("W1", "W2", "coef") if getattr(p, n) is not None]
    inputs = [getattr(p, n) for n in names] + list(take(frames, 1, 5).values())
    inputs += [x.detach() for x in state[:-1] if x.numel()]

    def run(*tensors):
        it = iter(tensors)
        slow = p._replace(**{n: next(it) for n in names})
        given = {n: next(it) for n in frames}
        start = atlas.State(*(next(it) if x.numel() else x for x in state[:-1]), state.pos)
        o, after = atlas.chunk(slow, start, **given)
        return o, *(x for x in after[:-1] if x.numel())

    leaves = [x.clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(run, leaves, eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=True)


def broken_band(monkeypatch):
    right = naive.band
    monkeypatch.setattr(naive, "band", lambda pairs, n: right(pairs, n - 1) if n > 1 else pairs)


def broken_momentum(monkeypatch):
    right = naive.momentum
    monkeypatch.setattr(naive, "momentum", lambda S, g, theta: right(S, g, 1 - theta))


def broken_decay(monkeypatch):
    right = naive.write
    monkeypatch.setattr(naive, "write", lambda W, S, a, e, muon: right(W, S, a**0, e, muon))


def broken_residual(monkeypatch):
    right = naive.read
    monkeypatch.setattr(naive, "read", lambda W, x, *phi: right(W, x, *phi) - x)


@pytest.mark.parametrize("break_it", [broken_band, broken_momentum, broken_decay, broken_residual])
def test_another_equation_is_another_function(break_it, monkeypatch):
    p, frames = make(), make_frames(9)
    break_it(monkeypatch)
    assert error(atlas.chunk(p, atlas.init_state(p, B), **frames)[0], define(p, frames)[0]) > 1e-3


def test_the_smallest_atlas_is_the_delta_rule():
    p, frames = make(deep=False, phi="none", C=1, c=1), make_frames(9)
    frames |= {"theta": torch.zeros(B, H, 9).double(), "alpha": torch.ones(B, H, 9).double()}
    W, outs = p.W1.expand(B, H, D, D), []
    for t in range(9):
        q, k, v = (frames[n][:, :, t].unsqueeze(-1) for n in "qkv")
        rate = 2 * (frames["eta"] * frames["gamma"])[:, :, t, None, None]
        W = W - rate * (W @ k - v) @ k.mT
        outs.append((W @ q).squeeze(-1))
    o, state = atlas.chunk(p, atlas.init_state(p, B), **frames)
    assert error(o, torch.stack(outs, 2)) <= 1e-13
    assert error(state.W1, W) <= 1e-13


def titans(W1, W2, q, k, v, surprise, rate, forget, C):
    """arXiv:2501.00663, equations 12 to 14 and section 3.2, for one head: gradients of chunks of C.

    S_t = e_t S_{t-1} - l_t grad ||M(k_t) - v_t||^2;   M_t = (1 - a_t) M_{t-1} + S_t
    """

    def read(M, x):
        return x + M[0] @ F.gelu(M[1] @ x, approximate="tanh")

    M, S, outs = [W1, W2], [torch.zeros_like(W1), torch.zeros_like(W2)], []
    for t in range(len(q)):
        if t % C == 0:
            start = [x.detach().requires_grad_() for x in M]
        loss = (read(start, k[t]) - v[t]).square().sum()
        g = torch.autograd.grad(loss, start)
        S = [surprise[t] * s - rate[t] * x for s, x in zip(S, g, strict=True)]
        M = [(1 - forget[t]) * m + s for m, s in zip(M, S, strict=True)]
        outs.append(read(M, q[t]))
    return torch.stack(outs), M, S


@pytest.mark.parametrize("C", [1, 4])
def test_a_window_of_one_without_muon_is_titans(C):
    p, frames = make(phi="none", C=C, c=1), make_frames(11)
    frames["eta"] = torch.ones(B, H, 11, dtype=torch.float64)
    o, state = atlas.chunk(p, atlas.init_state(p, B), **frames)
    for b, h in itertools.product(range(B), range(H)):
        f = {n: x[b, h] for n, x in frames.items()}
        gates = (f["theta"], f["gamma"], 1 - f["alpha"])
        expected, M, S = titans(p.W1[h], p.W2[h], f["q"], f["k"], f["v"], *gates, C)
        assert error(o[b, h], expected) <= 1e-13
        for i in (0, 1):
            assert error((state.W1, state.W2)[i][b, h], M[i]) <= 1e-13
            assert error(-(state.S1, state.S2)[i][b, h], S[i]) <= 1e-13
