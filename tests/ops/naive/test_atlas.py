"""Atlas's definition, checked by hand: numpy, written-out gradients, NS5 by singular values."""

import ast
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from moshi_ttt.ops.naive import atlas as naive

FORMS = [(deep, poly) for deep in (True, False) for poly in (None, "elementwise", "outer")]
GATES = ("alpha", "eta", "theta", "gamma")


def make(deep=True, poly="elementwise", *, B=1, H=2, D=3, F=4, R=2, T=7, seed=0):
    gen = torch.Generator().manual_seed(seed)

    def rand(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=gen, dtype=torch.float64)

    P = {None: D, "elementwise": 2 * D, "outer": D + R}[poly]
    W0 = {"W1": rand(H, D, F, scale=0.6), "W2": rand(H, F, P, scale=0.6)}
    W0 = W0 if deep else {"W1": rand(H, D, P, scale=0.6)}
    slow = {"coef": None if poly is None else 1 + rand(H, 2, scale=0.2)}
    slow["proj"] = rand(H, R, D * (D + 1) // 2) if poly == "outer" else None
    frames = {n: torch.nn.functional.normalize(rand(B, H, T, D), dim=-1) for n in "qk"}
    frames |= {"v": rand(B, H, T, D), "alpha": 0.9 + 0.1 * rand(B, H, T).sigmoid()}
    frames |= {"eta": 0.1 * rand(B, H, T).sigmoid(), "theta": rand(B, H, T).sigmoid()}
    return W0, slow, frames | {"gamma": rand(B, H, T).sigmoid()}


def cut(frames, *spans):
    """The frames `a..b` of each row, one span a row."""
    rows = list(enumerate(spans))
    return {n: torch.stack([x[i, :, a:b] for i, (a, b) in rows]) for n, x in frames.items()}


def ns5(S):
    """Newton-Schulz leaves the singular vectors alone: five odd polynomials of the values."""
    left, s, right = np.linalg.svd(S, full_matrices=False)
    s = s / (np.sqrt((s**2).sum()) + 1e-7)
    for a, b, c in [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ]:
        s = a * s + b * s**3 + c * s**5
    return left @ np.diag(s) @ right


def features(x, coef, proj):
    if coef is None:
        return x
    if proj is None:
        return np.concatenate([coef[0] * x, coef[1] * x**2])
    scale = np.where(np.eye(len(x)), 1, math.sqrt(2))
    products = (scale * np.outer(x, x))[np.triu_indices(len(x))]
    return np.concatenate([coef[0] * x, coef[1] * proj @ products])


def forward(W, x, f):
    """`M(x)` and what its gradient needs: `gelu(z)` and `gelu'(z)` at `z = W2 phi(x)`."""
    if "W2" not in W:
        return W["W1"] @ f, None, None
    z = W["W2"] @ f
    c = math.sqrt(2 / math.pi)
    th = np.tanh(c * (z + 0.044715 * z**3))
    slope = 0.5 * (1 + th) + 0.5 * z * (1 - th**2) * c * (1 + 3 * 0.044715 * z**2)
    hidden = 0.5 * z * (1 + th)
    return x + W["W1"] @ hidden, hidden, slope


def gradient(W, k, v, f):
    """Of `|| M(k) - v ||^2`, by the chain rule on paper."""
    y, hidden, slope = forward(W, k, f)
    e = 2 * (y - v)
    if hidden is None:
        return {"W1": np.outer(e, f)}
    return {"W1": np.outer(e, hidden), "W2": np.outer(slope * (W["W1"].T @ e), f)}


def one_head(head, W0, slow, frames):
    W0 = {n: w[head].numpy() for n, w in W0.items()}
    coef, proj = (None if slow[n] is None else slow[n][head].numpy() for n in ("coef", "proj"))
    return W0, lambda x: features(x, coef, proj), {n: x[0, head].numpy() for n, x in frames.items()}


def by_hand(head, W0, slow, frames, C, c, muon):
    """One head of row 0 in numpy: Atlas with the gradients written out."""
    M, f, x = one_head(head, W0, slow, frames)
    start, S, outputs = M, {n: 0 * w for n, w in M.items()}, []
    for t in range(len(x["q"])):
        if t % C == 0:
            start = M
        S = {n: x["theta"][t] * s for n, s in S.items()}
        for i in range(max(0, t - c + 1), t + 1):
            g = gradient(start, x["k"][i], x["v"][i], f(x["k"][i]))
            S = {n: s + x["gamma"][i] * g[n] for n, s in S.items()}
        step = {n: ns5(s) if muon else s for n, s in S.items()}
        M = {n: x["alpha"][t] * w - x["eta"][t] * step[n] for n, w in M.items()}
        outputs.append(forward(M, x["q"][t], f(x["q"][t]))[0])
    return np.stack(outputs), M, S


def titans(head, W0, frames, a, eta, theta, C):
    """Titans, arXiv:2501.00663: `S_t = eta_t S_{t-1} - theta_t grad`, M and S as in its eq. 13-14.

    `M_t = (1 - a_t) M_{t-1} + S_t`; the gradients of a chunk are taken at its start (section 3.2).
    """
    M, f, x = one_head(head, W0, {"coef": None, "proj": None}, frames)
    start, S, outputs = M, {n: 0 * w for n, w in M.items()}, []
    for t in range(len(x["q"])):
        if t % C == 0:
            start = M
        surprise = gradient(start, x["k"][t], x["v"][t], f(x["k"][t]))
        S = {n: eta[t] * s - theta[t] * surprise[n] for n, s in S.items()}
        M = {n: (1 - a[t]) * w + S[n] for n, w in M.items()}
        outputs.append(forward(M, x["q"][t], f(x["q"][t]))[0])
    return np.stack(outputs), M


@pytest.mark.parametrize(("C", "c"), [(1, 1), (1, 3), (3, 1), (3, 2), (2, 5), (10, 4)])
@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize(("deep", "poly"), FORMS)
def test_equals_the_equations_with_written_out_gradients(deep, poly, muon, C, c):
    W0, slow, frames = make(deep, poly)
    o, state = naive.atlas(W0, **slow, **frames, chunk_size=C, window=c, muon=muon)
    for head in range(2):
        expected, M, S = by_hand(head, W0, slow, frames, C, c, muon)
        np.testing.assert_allclose(o[0, head].numpy(), expected, atol=1e-11)
        for n in W0:
            np.testing.assert_allclose(state.W[n][0, head].numpy(), M[n], atol=1e-11)
            np.testing.assert_allclose(state.S[n][0, head].numpy(), S[n], atol=1e-11)
            assert np.abs(M[n] - W0[n][head].numpy()).max() > 1e-3
    assert state.pos == [7]
    assert len(state.pairs[0]) == min(7, c - 1)


def test_the_plainest_atlas_is_the_delta_rule():
    W0, slow, frames = make(False, None, H=1)
    frames |= {"alpha": torch.ones(1, 1, 7).double(), "theta": torch.zeros(1, 1, 7).double()}
    o, state = naive.atlas(W0, **slow, **frames, chunk_size=1, window=1)
    W = W0["W1"][0].numpy()
    q, k, v, eta, gamma = (frames[n][0, 0].numpy() for n in ("q", "k", "v", "eta", "gamma"))
    for t in range(7):
        W = W - eta[t] * 2 * gamma[t] * np.outer(W @ k[t] - v[t], k[t])
        np.testing.assert_allclose(o[0, 0, t].numpy(), W @ q[t], atol=1e-14)
    np.testing.assert_allclose(state.W["W1"][0, 0].numpy(), W, atol=1e-14)


@pytest.mark.parametrize("C", [1, 3, 4])
@pytest.mark.parametrize("deep", [True, False])
def test_one_frame_of_window_and_no_muon_is_titans(deep, C):
    W0, slow, frames = make(deep, None)
    frames |= {"gamma": 0.2 * frames["gamma"], "eta": torch.ones_like(frames["eta"])}
    o, state = naive.atlas(W0, **slow, **frames, chunk_size=C, window=1)
    for head in range(2):
        alpha, theta, gamma = (frames[n][0, head].numpy() for n in ("alpha", "theta", "gamma"))
        expected, M = titans(head, W0, frames, a=1 - alpha, eta=theta, theta=gamma, C=C)
        np.testing.assert_allclose(o[0, head].numpy(), expected, atol=1e-13)
        for n in W0:
            np.testing.assert_allclose(state.W[n][0, head].numpy(), M[n], atol=1e-13)


def test_features_are_the_polynomial_kernel():
    x, y = torch.randn(2, 2, 3, dtype=torch.float64)
    coef = torch.tensor([[0.9, 0.6], [1.1, 0.7]], dtype=torch.float64)
    dot = (x * y).sum(-1)
    torch.testing.assert_close((naive.vec(x) * naive.vec(y)).sum(-1), dot**2)
    everything = torch.eye(6, dtype=torch.float64).expand(2, 6, 6)
    kernel = (naive.phi(x, coef, everything) * naive.phi(y, coef, everything)).sum(-1)
    torch.testing.assert_close(kernel, coef[:, 0] ** 2 * dot + coef[:, 1] ** 2 * dot**2)
    assert torch.equal(naive.phi(x, None, None), x)
    assert naive.phi(x, coef, None).shape == (2, 6)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (1, 6)])
def test_newton_schulz_is_a_function_of_the_singular_values(shape):
    S = torch.randn(2, *shape, dtype=torch.float64)
    for s, x in zip(S, naive.newton_schulz(S), strict=True):
        np.testing.assert_allclose(x.numpy(), ns5(s.numpy()), atol=1e-13)


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("deep", [True, False])
def test_momentum_of_exactly_zero_writes_nothing(deep, muon):
    W0, slow, frames = make(deep)
    frames["alpha"][:] = 1
    frames["gamma"][:, 0] = 0  # a head that never looks
    leaves = W0 | {"coef": slow["coef"]} | frames
    for x in leaves.values():
        x.requires_grad_()
    o, state = naive.atlas(W0, **slow, **frames, chunk_size=2, window=2, muon=muon)
    for n, w0 in W0.items():
        assert torch.equal(state.W[n][0, 0], w0[0])
        assert (state.W[n][0, 1] != w0[1]).any()
    gradients = torch.autograd.grad(o.square().sum(), list(leaves.values()))
    gradients = dict(zip(leaves, gradients, strict=True))
    assert all(torch.isfinite(g).all() for g in gradients.values())
    assert gradients["gamma"][0, 0].any() != muon
    assert not gradients["eta"][0, 0].any()
    assert gradients["eta"][0, 1].any()


def test_muon_forgets_the_size_of_the_gradient():
    W0, slow, frames = make(F=3)

    def moved(muon, **change):
        call = slow | frames | {"alpha": torch.ones_like(frames["alpha"])} | change
        _, state = naive.atlas(W0, **call, chunk_size=4, window=3, muon=muon)
        return torch.cat([(state.W[n][0] - W0[n]).flatten() for n in W0])

    quiet = 1e-3 * frames["gamma"]
    loud = moved(True)
    assert (moved(True, gamma=quiet) - loud).norm() < 1e-2 * loud.norm()
    assert moved(False, gamma=quiet).norm() < 1e-2 * moved(False).norm()
    assert moved(True, eta=1e-2 * frames["eta"]).norm() < 2e-2 * loud.norm()


@pytest.mark.parametrize("c", [1, 3])
def test_the_window_reaches_back_over_a_chunk_boundary(c):
    W0, slow, frames = make(T=5)
    frames["theta"][:] = 0
    frames["eta"][:, :, :4] = 0  # the weights have moved by the last write alone
    frames["v"].requires_grad_()
    o, _ = naive.atlas(W0, **slow, **frames, chunk_size=4, window=c)
    (g,) = torch.autograd.grad(o[:, :, 4].sum(), frames["v"])
    reached = g.abs().sum((0, 1, 3)) > 0
    assert reached.tolist() == [i > 4 - c for i in range(5)]


def test_old_frames_are_seen_again_with_the_new_chunks_weights():
    W0, slow, frames = make(False, None, H=1, T=3)
    frames |= {"alpha": torch.ones(1, 1, 3).double(), "theta": torch.zeros(1, 1, 3).double()}
    _, state = naive.atlas(W0, **slow, **frames, chunk_size=2, window=2)
    _, before = naive.atlas(W0, **slow, **cut(frames, (0, 2)), chunk_size=2, window=2)
    start, S = before.W["W1"][0, 0], torch.zeros(3, 3).double()
    assert torch.equal(before.start["W1"][0, 0], start)
    assert torch.equal(state.start["W1"][0, 0], start)
    for i in (1, 2):
        k, v = frames["k"][0, 0, i], frames["v"][0, 0, i]
        S += 2 * frames["gamma"][0, 0, i] * torch.outer(start @ k - v, k)
    torch.testing.assert_close(state.S["W1"][0, 0], S, atol=1e-14, rtol=0)
    torch.testing.assert_close(state.W["W1"][0, 0], start - frames["eta"][0, 0, 2] * S)


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize(("deep", "poly"), FORMS)
def test_two_calls_are_one_and_rows_are_strangers(deep, poly, muon):
    W0, slow, frames = make(deep, poly, B=2, T=9)
    call = dict(W0=W0, **slow, chunk_size=3, window=4, muon=muon)
    whole, _ = naive.atlas(**call, **frames)
    first, mid = naive.atlas(**call, **frames, lengths=[4, 0])
    assert mid.pos == [4, 0]
    assert not first[0, :, 4:].any()
    assert not first[1].any()
    second, mid = naive.atlas(**call, **cut(frames, (4, 9), (0, 5)), state=mid, lengths=[1, 5])
    third, mid = naive.atlas(**call, **cut(frames, (5, 8), (5, 8)), state=mid)
    assert mid.pos == [8, 8]
    row0 = torch.cat([first[0, :, :4], second[0, :, :1], third[0]], 1)
    row1 = torch.cat([second[1], third[1]], 1)
    assert torch.equal(torch.stack([row0, row1]), whole[:, :, :8])
    _, end = naive.atlas(**call, **cut(frames, (0, 8), (0, 8)))
    for part, expected in zip(mid[:3], end[:3], strict=True):
        assert all(torch.equal(part[n], expected[n]) for n in W0)
    for kept, held in zip(mid.pairs, end.pairs, strict=True):
        assert len(kept) == len(held) == 3
        pairs = (zip(a, b, strict=True) for a, b in zip(kept, held, strict=True))
        assert all(torch.equal(x, y) for pair in pairs for x, y in pair)
    empty, same = naive.atlas(**call, **cut(frames, (8, 8), (8, 8)), state=mid)
    assert empty.shape == (2, 2, 0, 3)
    assert same.pos == [8, 8]


@pytest.mark.parametrize("name", ["q", "k", "v", *GATES])
def test_no_output_before_a_changed_frame_moves(name):
    W0, slow, frames = make(T=9)
    o, _ = naive.atlas(W0, **slow, **frames, chunk_size=3, window=3)
    other = {n: x.clone() for n, x in frames.items()}
    other[name][:, :, 4] += 0.3
    moved, _ = naive.atlas(W0, **slow, **other, chunk_size=3, window=3)
    assert torch.equal(moved[:, :, :4], o[:, :, :4])
    assert (moved[:, :, 4] != o[:, :, 4]).any()  # what it reads has its own write in it


@pytest.mark.parametrize("muon", [False, True])
def test_recall_improves(muon):
    W0, slow, frames = make(H=1, D=8, F=16, T=40)
    for n in ("k", "v"):
        frames[n] = frames[n][:, :, :4].repeat(1, 1, 10, 1)
    frames["alpha"][:] = 1
    frames["eta"] *= 0.3
    _, state = naive.atlas(W0, **slow, **frames, chunk_size=4, window=2, muon=muon)

    def loss(W):
        pairs = [(frames["k"][0, :, t], frames["v"][0, :, t]) for t in range(4)]
        return sum(float(naive.inner_loss(W, **slow, k=k, v=v)) for k, v in pairs)

    assert loss({n: w[0] for n, w in state.W.items()}) < 0.5 * loss(W0)


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize(("deep", "poly"), FORMS)
def test_outer_gradients_reach_everything(deep, poly, muon):
    W0, slow, frames = make(deep, poly, B=2)
    leaves = W0 | {n: x for n, x in slow.items() if x is not None} | frames
    for x in leaves.values():
        x.requires_grad_()
    call = dict(W0=W0, **slow, **frames, chunk_size=3, window=2, muon=muon)
    o, state = naive.atlas(**call)
    with torch.no_grad():
        quiet, _ = naive.atlas(**call)
    torch.testing.assert_close(o, quiet, atol=1e-13, rtol=0)
    weights = [*state.W.values(), *state.S.values()]
    loss = o.square().sum() + sum(w.square().sum() for w in weights)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    for n, g in zip(leaves, gradients, strict=True):
        assert torch.isfinite(g).all(), n
        assert g.abs().max() > 1e-6, n


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize(("deep", "poly"), [(True, "outer"), (False, "elementwise")])
def test_gradcheck(deep, poly, muon):
    W0, slow, frames = make(deep, poly, H=1, D=2, F=3, R=1, T=4)
    leaves = W0 | {n: x for n, x in slow.items() if x is not None} | frames

    def run(*values):
        x = dict(zip(leaves, values, strict=True))
        weights = {n: x.pop(n) for n in W0}
        call = {"coef": None, "proj": None} | x
        o, state = naive.atlas(weights, **call, chunk_size=2, window=2, muon=muon)
        return o, *state.W.values(), *state.S.values()

    values = [x.requires_grad_() for x in leaves.values()]
    assert torch.autograd.gradcheck(run, values, eps=1e-6, atol=1e-5, fast_mode=True)


def test_imports_none_of_the_fast_forms():
    tree = ast.parse(Path(naive.__file__).read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "." for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    allowed = ("__future__", "collections", "math", "typing", "torch", "jaxtyping")
    assert {n for n in names if n.split(".")[0] not in allowed} == set()
