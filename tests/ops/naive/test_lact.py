"""LaCT's definition, checked by hand: numpy, MATH's explicit gradients, NS5 by singular values."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

from moshi_ttt.ops.naive import lact as naive

SETTINGS = [dict(momentum=a, muon=b) for a in (True, False) for b in (True, False)]


def make(*, B=1, H=2, r=1, D=3, F=4, T=7, seed=0):
    gen = torch.Generator().manual_seed(seed)

    def rand(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=gen, dtype=torch.float64)

    W0 = {"Wg": rand(H, r, F, D), "Wu": rand(H, r, F, D), "Wo": rand(H, r, D, F, scale=0.7)}
    eta = 0.02 + 0.08 * rand(H).sigmoid()
    frames = {n: torch.nn.functional.normalize(rand(B, H, T, D), dim=-1) for n in "qk"}
    frames |= {"v": rand(B, H, T, D), "lr": 0.3 * rand(B, H, T, 3).exp()}
    return W0, eta, frames | {n: rand(B, H, T).sigmoid() for n in "mw"}


def cut(frames, *spans):
    """The frames `a..b` of each row, one span a row."""
    return {
        n: torch.stack([x[i, :, a:b] for i, (a, b) in enumerate(spans)]) for n, x in frames.items()
    }


def ns5(D):
    """Newton-Schulz leaves the singular vectors alone: five odd polynomials of the values."""
    left, s, right = np.linalg.svd(D, full_matrices=False)
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


def silu(x):
    return x / (1 + np.exp(-x))


def explicit(W, k, v, lr):
    """`Go = v^T (lo*h)`, `Gg = (p*b*silu'(a))^T (lg*k)`, `Gu = (p*s)^T (lu*k)`; rows are frames."""
    a, b, p = k @ W["Wg"].T, k @ W["Wu"].T, v @ W["Wo"]
    sig = 1 / (1 + np.exp(-a))
    s, ds = a * sig, sig * (1 + a * (1 - sig))
    lg, lu, lo = (lr[:, i : i + 1] for i in range(3))
    return {"Wg": (p * b * ds).T @ (lg * k), "Wu": (p * s).T @ (lu * k), "Wo": v.T @ (lo * s * b)}


def by_hand(W0, eta, frames, head, C, momentum, muon):
    """One head of row 0 in numpy, r = 1."""
    W0 = {n: w[head, 0].numpy() for n, w in W0.items()}
    q, k, v, lr, m, w = (frames[n][0, head].numpy() for n in ("q", "k", "v", "lr", "m", "w"))
    W, D, outputs = W0, {n: 0 * x for n, x in W0.items()}, []
    for begin in range(0, len(q), C):
        at = slice(begin, begin + C)
        outputs.append((silu(q[at] @ W["Wg"].T) * (q[at] @ W["Wu"].T)) @ W["Wo"].T)
        if begin + C > len(q):
            break
        G = explicit(W, k[at], v[at], lr[at])
        D = {n: G[n] + m[at].mean() * D[n] * momentum for n in G}
        U = {n: W[n] + float(eta[head]) * w[at].mean() * (ns5(D[n]) if muon else D[n]) for n in W}
        W = {
            n: u
            / (np.linalg.norm(u, axis=1, keepdims=True) + 1e-5)
            * np.linalg.norm(W0[n], axis=1, keepdims=True)
            for n, u in U.items()
        }
    return np.concatenate(outputs), W, D


@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("settings", SETTINGS)
def test_equals_the_explicit_formulas(C, settings):
    W0, eta, frames = make()
    o, state = naive.lact(W0, eta, **frames, chunk_size=C, **settings)
    for head in range(2):
        expected, W, D = by_hand(W0, eta, frames, head, C, **settings)
        np.testing.assert_allclose(o[0, head].numpy(), expected, atol=1e-12)
        for n in W:
            np.testing.assert_allclose(state.W[n][0, head, 0].numpy(), W[n], atol=1e-12)
            np.testing.assert_allclose(state.D[n][0, head, 0].numpy(), D[n], atol=1e-12)
            assert np.abs(W[n] - W0[n][head, 0].numpy()).max() > 1e-3
    assert state.pos == [7]
    assert len(state.frames[0]) == 7 % C


@pytest.mark.parametrize("residual", [False, True])
def test_stacked_is_the_chain_with_the_gradient_by_differences(residual):
    W0, eta, frames = make(H=1, r=2, T=2)
    o, state = naive.lact(W0, eta, **frames, chunk_size=2, muon=False, residual=residual)
    W = {n: w[0].numpy() for n, w in W0.items()}
    q, k, v, lr = (frames[n][0, 0].numpy() for n in ("q", "k", "v", "lr"))

    def memory(x, W):
        for g, u, out in zip(W["Wg"], W["Wu"], W["Wo"], strict=True):
            x = out @ (silu(g @ x) * (u @ x)) + residual * x
        return x

    for t in range(2):
        np.testing.assert_allclose(o[0, 0, t].numpy(), memory(q[t], W), atol=1e-14)
    for i, n in enumerate(("Wg", "Wu", "Wo")):
        D = np.zeros_like(W[n])
        for at in np.ndindex(D.shape):
            up, down = W[n].copy(), W[n].copy()
            up[at] += 1e-6
            down[at] -= 1e-6
            for t in range(2):
                rise = (memory(k[t], W | {n: up}) - memory(k[t], W | {n: down})) @ v[t]
                D[at] += lr[t, i] * rise / 2e-6
        np.testing.assert_allclose(state.D[n][0, 0].numpy(), D, atol=1e-8)


def test_one_stacked_without_residual_is_the_plain_one():
    W0, _, frames = make()
    x = frames["q"][0, :, 0]
    plain = naive.swiglu(x, *(W0[n][:, 0] for n in ("Wg", "Wu", "Wo")))
    assert torch.equal(naive.read(W0, x, False), plain)
    assert torch.equal(naive.read(W0, x, True), x + plain)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (1, 6)])
def test_newton_schulz_is_a_function_of_the_singular_values(shape):
    D = torch.randn(2, *shape, dtype=torch.float64)
    for d, x in zip(D, naive.newton_schulz(D), strict=True):
        np.testing.assert_allclose(x.numpy(), ns5(d.numpy()), atol=1e-13)


def test_newton_schulz_of_zero_is_zero_and_so_is_its_gradient():
    D = torch.randn(2, 3, 4, dtype=torch.float64)
    D[0] = 0
    D.requires_grad_()
    X = naive.newton_schulz(D)
    (g,) = torch.autograd.grad((X * torch.randn_like(X)).sum(), D)
    assert torch.equal(X[0], torch.zeros_like(X[0]))
    assert torch.equal(g[0], torch.zeros_like(g[0]))
    assert torch.isfinite(g).all()
    assert g[1].any()


def test_a_zero_row_stays_zero_and_its_gradients_are_finite():
    U, start = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    U[0, 1] = start[1, 2] = 0
    leaves = U.requires_grad_(), start.requires_grad_()
    out = naive.row_normalise(*leaves)
    assert not out[0, 1].any()
    assert not out[1, 2].any()
    gradients = torch.autograd.grad((out * torch.randn_like(out)).sum(), leaves)
    assert all(torch.isfinite(g).all() for g in gradients)


def test_rows_keep_the_norm_of_their_start():
    W0, eta, frames = make(T=12)
    _, state = naive.lact(W0, eta, **frames, chunk_size=3)
    for n, start in W0.items():
        norm, target = state.W[n][0].norm(dim=-1), start.norm(dim=-1)
        torch.testing.assert_close(norm, target, rtol=1e-3, atol=0)
        assert (norm < target).all()  # by the 1e-5 under the fraction


def test_a_chunk_reads_its_start_and_is_written_when_it_is_full():
    W0, eta, frames = make(T=4)
    o, full = naive.lact(W0, eta, **frames, chunk_size=4)
    for t in range(4):  # stale read: not even its own frames
        torch.testing.assert_close(o[0, :, t], naive.read(W0, frames["q"][0, :, t], False))
    _, state = naive.lact(W0, eta, **cut(frames, (0, 3)), chunk_size=4)
    assert len(state.frames[0]) == 3
    for n in W0:
        assert torch.equal(state.W[n][0], W0[n])
        assert not state.D[n].any()
        assert (full.W[n][0] != W0[n]).any()
    _, state = naive.lact(W0, eta, **cut(frames, (3, 4)), chunk_size=4, state=state)
    assert state.frames == [[]]
    for n in W0:
        assert torch.equal(state.W[n], full.W[n])


def test_two_calls_are_one_and_rows_are_strangers():
    W0, eta, frames = make(B=2, T=9)
    call = dict(W0=W0, eta=eta, chunk_size=3)
    whole, _ = naive.lact(**call, **frames)
    first, mid = naive.lact(**call, **frames, lengths=[4, 0])
    assert mid.pos == [4, 0]
    assert not first[0, :, 4:].any()
    assert not first[1].any()
    second, mid = naive.lact(**call, **cut(frames, (4, 9), (0, 5)), state=mid, lengths=[1, 5])
    third, mid = naive.lact(**call, **cut(frames, (5, 8), (5, 8)), state=mid)
    assert mid.pos == [8, 8]
    row0 = torch.cat([first[0, :, :4], second[0, :, :1], third[0]], 1)
    row1 = torch.cat([second[1], third[1]], 1)
    assert torch.equal(torch.stack([row0, row1]), whole[:, :, :8])
    _, end = naive.lact(**call, **cut(frames, (0, 8), (0, 8)))
    for n in W0:
        assert torch.equal(mid.W[n], end.W[n])
        assert torch.equal(mid.D[n], end.D[n])
    for kept, held in zip(mid.frames, end.frames, strict=True):
        assert len(kept) == len(held) == 2
        pairs = (zip(a, b, strict=True) for a, b in zip(kept, held, strict=True))
        assert all(torch.equal(x, y) for pair in pairs for x, y in pair)
    empty, same = naive.lact(**call, **cut(frames, (8, 8), (8, 8)), state=mid)
    assert empty.shape == (2, 2, 0, 3)
    assert same.pos == [8, 8]


@pytest.mark.parametrize("name", ["q", "k", "v", "lr", "m", "w"])
def test_no_output_before_a_changed_frame_moves(name):
    W0, eta, frames = make(T=9)
    o, _ = naive.lact(W0, eta, **frames, chunk_size=3)
    other = {n: x.clone() for n, x in frames.items()}
    other[name][:, :, 4] += 0.3
    moved, _ = naive.lact(W0, eta, **other, chunk_size=3)
    first = 4 if name == "q" else 6
    assert torch.equal(moved[:, :, :first], o[:, :, :first])
    assert (moved[:, :, first] != o[:, :, first]).any()


def test_muon_forgets_the_size_of_the_gradient_and_the_write_gate_does_not():
    W0, eta, frames = make(T=3, F=3)

    def moved(muon=True, **change):
        _, state = naive.lact(W0, eta, **frames | change, chunk_size=3, muon=muon)
        return torch.cat([(state.W[n][0] - W0[n]).flatten() for n in W0])

    loud, quiet = moved(), moved(lr=1e-3 * frames["lr"])
    assert ((quiet - loud).norm() / loud.norm()) < 1e-2
    assert moved(muon=False, lr=1e-3 * frames["lr"]).norm() < 1e-2 * moved(muon=False).norm()
    assert moved(w=1e-2 * frames["w"]).norm() < 2e-2 * loud.norm()


@pytest.mark.parametrize("muon", [True, False])
def test_a_matrix_with_nothing_to_write_stays_to_the_bit(muon):
    W0, eta, frames = make(T=6)
    frames["k"][:, 0] = 0  # silence in one head
    frames["lr"][:, 1, :, 1] = 0  # no learning rate for one matrix of the other
    leaves = W0 | {"eta": eta} | frames
    for x in leaves.values():
        x.requires_grad_()
    o, state = naive.lact(W0, eta, **frames, chunk_size=3, muon=muon)
    for n, w0 in W0.items():
        assert torch.equal(state.W[n][0, 0], w0[0])
        assert torch.equal(state.W[n][0, 1], w0[1]) == (n == "Wu")
    loss = o.square().sum() + sum(w.square().sum() for w in state.W.values())
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    assert all(torch.isfinite(g).all() for g in gradients.values())
    assert not gradients["k"][0, 0].any()
    assert not gradients["lr"][0, 1, :, 1].any()
    assert gradients["k"][0, 1].any()


def test_recall_improves():
    W0, eta, frames = make(H=1, D=8, F=8, T=40)
    for n in ("k", "v"):
        frames[n] = frames[n][:, :, :4].repeat(1, 1, 10, 1)
    _, state = naive.lact(W0, eta, **frames, chunk_size=4)

    def loss(W):
        pairs = (frames[n][0, :, t] for t in range(4) for n in ("k", "v"))
        return sum(
            float(naive.inner_loss(W, k, v, False)) for k, v in zip(pairs, pairs, strict=True)
        )

    assert loss({n: w[0] for n, w in state.W.items()}) < loss(W0) - 1


@pytest.mark.parametrize("settings", [*SETTINGS, dict(residual=True)])
def test_outer_gradients_reach_everything(settings):
    W0, eta, frames = make(B=2, r=2, T=8)
    leaves = W0 | {"eta": eta} | frames
    for x in leaves.values():
        x.requires_grad_()
    o, state = naive.lact(W0, eta, **frames, chunk_size=3, **settings)
    with torch.no_grad():
        quiet, _ = naive.lact(W0, eta, **frames, chunk_size=3, **settings)
    torch.testing.assert_close(o, quiet, atol=1e-13, rtol=0)
    if not settings.get("momentum", True):
        del leaves["m"]
    weights = [*state.W.values(), *state.D.values()]
    loss = o.square().sum() + sum(w.square().sum() for w in weights)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    for n, g in zip(leaves, gradients, strict=True):
        assert torch.isfinite(g).all(), n
        assert g.abs().max() > 1e-6, n


@pytest.mark.parametrize("settings", [dict(), dict(muon=False, residual=True)])
def test_gradcheck(settings):
    W0, eta, frames = make(H=1, r=2, D=2, F=3, T=5)
    leaves = W0 | {"eta": eta} | frames

    def run(*values):
        x = dict(zip(leaves, values, strict=True))
        weights, eta = {n: x.pop(n) for n in W0}, x.pop("eta")
        o, state = naive.lact(weights, eta, **x, chunk_size=2, **settings)
        return o, *state.W.values(), *state.D.values()

    values = [x.requires_grad_() for x in leaves.values()]
    assert torch.autograd.gradcheck(run, values, eps=1e-6, atol=1e-5, fast_mode=True)


def test_imports_none_of_the_fast_forms():
    tree = ast.parse(Path(naive.__file__).read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "." for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    allowed = ("__future__", "collections", "typing", "torch", "jaxtyping")
    assert {n for n in names if n.split(".")[0] not in allowed} == set()
