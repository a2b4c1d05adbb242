"""Atlas: its fast forms are its definition, for every window, phi, depth, with Muon and without."""

import itertools
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moshi_ttt.ops import atlas
from moshi_ttt.ops.naive import atlas as naive
from tests.test_graphable import OnlyOnMeta

B, H, D, F_, R = 2, 2, 4, 7, 3
GATES = ("alpha", "eta", "theta", "gamma")
PHIS = ("none", "squares", "products")
KINDS = list(itertools.product((True, False), PHIS, (False, True)))
every_kind = pytest.mark.parametrize(("deep", "phi", "muon"), KINDS)


def make(deep=True, phi="squares", muon=False, C=4, c=5, seed=0, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)

    def rand(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=gen, dtype=torch.float64)).to(dtype)

    P = {"none": D, "squares": 2 * D, "products": D + R}[phi]
    return atlas.Params(
        W1=rand(H, D, F_ if deep else P, scale=0.4),
        W2=rand(H, F_, P, scale=0.5) if deep else None,
        coef=None if phi == "none" else 1 + rand(H, 2, scale=0.2),
        proj=rand(H, R, D * (D + 1) // 2, scale=0.4) if phi == "products" else None,
        chunk_size=C,
        window=c,
        muon=muon,
    )


def make_frames(T, seed=1, B=B, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    q, k = (F.normalize(rand(B, H, T, D), dim=-1) for _ in range(2))
    alpha, eta, theta, gamma = (torch.rand(B, H, T, generator=gen, dtype=q.dtype) for _ in GATES)
    frames = {"q": q, "k": k, "v": rand(B, H, T, D)}
    frames |= {"alpha": 1 - 0.1 * alpha, "eta": 0.1 * eta, "theta": theta, "gamma": 0.3 * gamma}
    return {n: x.to(dtype) for n, x in frames.items()}


def define(p, frames, state=None, lengths=None):
    W0 = {"W1": p.W1} if p.W2 is None else {"W1": p.W1, "W2": p.W2}
    settings = {"chunk_size": p.chunk_size, "window": p.window, "muon": p.muon}
    return naive.atlas(W0, p.coef, p.proj, **frames, **settings, state=state, lengths=lengths)


def fast_state(p, state: naive.State, stale=0.0):
    """The fast state that means what the definition's does."""
    n = len(state.pos)
    fields = atlas.init_state(p, n)._asdict()
    for name in state.W:
        fields |= {name: state.W[name], f"{name}s": state.start[name], f"S{name[1]}": state.S[name]}
    rows = {"k": [], "v": [], "gamma": []}
    for pairs in state.pairs:
        for i, (field, shape) in enumerate({"k": (H, D), "v": (H, D), "gamma": (H,)}.items()):
            unused = p.W1.new_full(shape, stale)
            held = [unused] * (p.window - 1 - len(pairs)) + [pair[i] for pair in pairs]
            rows[field].append(torch.stack(held, 1) if held else fields[field][0])
    fields |= {name: torch.stack(x) for name, x in rows.items()}
    return atlas.State(**fields | {"pos": torch.tensor(state.pos)})


def stream(p, state, frames):
    state = clone(state)
    T = frames["q"].shape[2]
    return torch.cat([atlas.step(p, state, **take(frames, t, t + 1)) for t in range(T)], 2), state


def take(frames, begin, end):
    return {n: x[:, :, begin:end] for n, x in frames.items()}


def clone(state):
    return type(state)(*(x.detach().clone() for x in state))


def error(a, b):
    """Absolute up to 1, relative above."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item() if b.numel() else 0.0


def assert_same(actual, expected, tolerance):
    for name, x, y in zip(atlas.State._fields, actual, expected, strict=True):
        assert error(x, y.detach()) <= tolerance, name


# The definition, in value and in gradient.


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


# What it is in the papers.


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


# What its forms are worth.


@every_kind
def test_the_past_does_not_see_the_future(deep, phi, muon):
    p, frames = make(deep, phi, muon), make_frames(11)
    start = atlas.init_state(p, B)
    for t in (0, 3, 6, 10):
        changed = {n: x.clone() for n, x in frames.items()}
        for x in changed.values():
            x[:, :, t] += 0.1
        a, b = (atlas.chunk(p, start, **f)[0] for f in (frames, changed))
        assert torch.equal(a[:, :, :t], b[:, :, :t])
        assert not torch.equal(a[:, :, t], b[:, :, t])


class Kept:
    """The memory that a call keeps for its backward, and that backward for its own, at its peak."""

    def __init__(self):
        self.count, self.now, self.peak = Counter(), 0, 0

    def pack(self, x):
        kept, storage = self, x.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()

        class Saved:
            def __init__(self):
                self.x = x
                kept.count[key] += 1
                kept.now += size * (kept.count[key] == 1)
                kept.peak = max(kept.peak, kept.now)

            def __del__(self):
                kept.count[key] -= 1
                kept.now -= size * (kept.count[key] == 0)

        return Saved()


@pytest.mark.parametrize("muon", [False, True])
def test_a_long_call_keeps_the_root_of_its_states(muon):
    p, wide = make(muon=muon, C=1, c=1), 32
    W1, W2 = torch.randn(H, wide, wide), 0.1 * torch.randn(H, wide, 2 * wide)
    p = p._replace(W1=W1.requires_grad_(), W2=W2, coef=torch.ones(H, 2))
    state = 2 * B * H * wide * 3 * wide * 4  # M and S

    def states(T):
        kept, frames = Kept(), make_frames(T, dtype=torch.float32)
        frames |= {n: torch.randn(B, H, T, wide) for n in "qkv"}
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda saved: saved.x):
            atlas.chunk(p, atlas.init_state(p, B), **frames)[0].sum().backward()
        return kept.peak / state

    few, many = states(16), states(256)
    assert many < 5 * few
    assert many < 3 * 16


@pytest.mark.parametrize("muon", [False, True])
def test_float32_streamed_is_float32_chunked(muon):
    p, frames = make(muon=muon, dtype=torch.float32), make_frames(41, dtype=torch.float32)
    start = atlas.init_state(p, B)
    chunked, streamed = atlas.chunk(p, start, **frames)[0], stream(p, start, frames)[0]
    exact = define(make(muon=muon), make_frames(41))[0]
    assert (chunked - streamed).abs().max() <= 1e-5
    assert (chunked - exact).abs().max() <= 1e-5


@pytest.mark.parametrize("muon", [False, True])
def test_lower_precision_is_raised_and_float32_is_kept(muon):
    p, frames = make(muon=muon, dtype=torch.bfloat16), make_frames(6, dtype=torch.bfloat16)
    start = atlas.init_state(p, B)
    o, state = atlas.chunk(p, start, **frames)
    streamed = stream(p, start, frames)[0]
    assert {x.dtype for x in (o, streamed, *state[:-1])} == {torch.float32}
    assert (o - streamed).abs().max() <= 1e-5


@every_kind
def test_nothing_to_learn_leaves_the_start_and_its_gradients_finite(deep, phi, muon):
    p, frames = make(deep, phi, muon), make_frames(9)
    frames["gamma"] = torch.zeros_like(frames["gamma"]).requires_grad_()
    frames["alpha"] = torch.ones_like(frames["alpha"])
    start = atlas.init_state(p._replace(W1=p.W1.requires_grad_()), B)
    o, state = atlas.chunk(p, start, **frames)
    assert torch.equal(state.W1, start.W1)
    assert all(x.isfinite().all() for x in torch.autograd.grad(o.sum(), [p.W1, frames["gamma"]]))
    stepped = stream(p, start, frames)[1]
    assert torch.equal(stepped.W1, start.W1)


def test_a_state_has_its_own_memory_and_a_step_writes_in_it():
    for deep in (True, False):
        p, frames = make(deep), make_frames(3)
        for state in (
            atlas.init_state(p, B),
            atlas.chunk(p, atlas.init_state(p, B), **frames)[1],
            atlas.chunk(p, atlas.init_state(p, B), **take(frames, 0, 0))[1],
            atlas.chunk(p, atlas.init_state(p, B), **frames, lengths=torch.tensor([3, 0]))[1],
        ):
            places = [x.untyped_storage().data_ptr() for x in state if x.numel()]
            assert len(set(places)) == len(places)
            assert all(x.is_contiguous() for x in state)
            atlas.step(p, state, **take(frames, 0, 1))
            assert places == [x.untyped_storage().data_ptr() for x in state if x.numel()]


@every_kind
def test_inner_loss_is_that_of_the_definition(deep, phi, muon):
    p, frames = make(deep, phi, muon), make_frames(4)
    state = atlas.chunk(p, atlas.init_state(p, B), **frames)[1]
    loss = atlas.inner_loss(p, state, frames["k"], frames["v"])
    assert loss.shape == (B, H, 4)
    for b, t in itertools.product(range(B), range(4)):
        W = {n: getattr(state, n)[b] for n in ("W1", "W2") if getattr(p, n) is not None}
        k, v = (frames[n][b, :, t] for n in "kv")
        assert error(loss[b, :, t], naive.inner_loss(W, p.coef, p.proj, k, v)) <= 1e-13


@every_kind
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_reads_nothing_on_the_host(deep, phi, muon, masked):
    p = make(deep, phi, muon)
    p = p._replace(**{n: x.to("meta") for n, x in p._asdict().items() if torch.is_tensor(x)})
    frames = {n: x.to("meta") for n, x in make_frames(1).items()}
    with OnlyOnMeta():
        state = atlas.init_state(p, B)
        mask = torch.ones(B, dtype=torch.bool, device="meta") if masked else None
        atlas.step(p, state, **frames, exec_mask=mask)
