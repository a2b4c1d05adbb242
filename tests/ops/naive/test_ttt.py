"""The definitions, checked by hand: no autograd here, gradients are differences of the loss."""

import ast
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from moshi_ttt.ops.naive import ttt as naive

NAIVE = {"ttt_linear": naive.ttt_linear, "ttt_mlp": naive.ttt_mlp}


def make(name, *, H=2, D=3, C=2, B=1, T=5, seed=0):
    gen = torch.Generator().manual_seed(seed)

    def rand(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=gen, dtype=torch.float64)

    hidden = 4 * D if name == "ttt_mlp" else D
    W0 = {"W1": rand(H, D, hidden, scale=0.6), "b1": rand(H, hidden, scale=0.3)}
    if name == "ttt_mlp":
        W0 |= {"W2": rand(H, hidden, D, scale=0.4), "b2": rand(H, D, scale=0.3)}
    args = dict(gamma=1 + rand(H, D, scale=0.2), beta=rand(H, D, scale=0.2))
    args |= dict(delta=rand(C, scale=0.2), decay=torch.full((H,), 0.25, dtype=torch.float64))
    frames = {n: torch.nn.functional.normalize(rand(B, H, T, D), dim=-1) for n in "qk"}
    frames |= {"v": rand(B, H, T, D), "eta": rand(B, H, T).sigmoid() / D}
    return W0, args, frames


def by_differences(name, W0, args, frames, head):
    """One head of row 0 in numpy: the equations, the inner gradient by central differences."""
    W0 = {n: w[head].numpy() for n, w in W0.items()}
    gamma, beta = args["gamma"][head].numpy(), args["beta"][head].numpy()
    delta, decay = args["delta"].numpy(), float(args["decay"][head])
    q, k, v = (frames[n][0, head].numpy() for n in "qkv")
    eta = frames["eta"][0, head].numpy()

    def f(x, W):
        z = x @ W["W1"] + W["b1"]
        if name == "ttt_linear":
            return z
        inner = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
        return (0.5 * z * (1 + np.tanh(inner))) @ W["W2"] + W["b2"]

    def norm(z):
        return gamma * (z - z.mean()) / np.sqrt(z.var() + 1e-6) + beta

    def loss(W, s):
        return 0.5 * ((norm(f(k[s], W)) - (v[s] - k[s])) ** 2).sum()

    def gradient(W, s, step=1e-6):
        out = {n: np.zeros_like(w) for n, w in W.items()}
        for n, w in W.items():
            for at in np.ndindex(w.shape):
                up, down = w.copy(), w.copy()
                up[at] += step
                down[at] -= step
                out[n][at] = (loss(W | {n: up}, s) - loss(W | {n: down}, s)) / (2 * step)
        return out

    outputs, W, C = [], W0, len(delta)
    for begin in range(0, len(q), C):
        for s in range(begin, min(begin + C, len(q))):
            t = s - begin
            steps = [(eta[i], gradient(W, i)) for i in range(begin, s + 1)]
            tau = max(0.0, 1 / (t + 1) + delta[t])
            W_t = {n: w - tau * sum(e * g[n] for e, g in steps) for n, w in W.items()}
            outputs.append(q[s] + norm(f(q[s], W_t)))
        if t == C - 1:
            W = {n: w - decay * (w - W0[n]) for n, w in W_t.items()}
    return np.stack(outputs), W


@pytest.mark.parametrize("name", NAIVE)
def test_equals_the_equations_with_the_gradient_by_differences(name):
    W0, args, frames = make(name)
    o, state = NAIVE[name](W0, **args, **frames)
    for head in range(2):
        expected, W = by_differences(name, W0, args, frames, head)
        np.testing.assert_allclose(o[0, head].numpy(), expected, atol=1e-8)
        for n, w in W.items():
            np.testing.assert_allclose(state.W[n][0, head].numpy(), w, atol=1e-8)
    assert state.pos == [5]
    assert len(state.pairs[0]) == 1


def test_one_frame_of_one_head_by_hand():
    # z = k W1 + b1 = (1, -1): mean 0, var 1, LN(z) = z up to eps. With r = (0, 0), u = z - r = z,
    # and the gradient at z, (u - mean(u) - z mean(u z)) / sigma, is 0: a scale cannot be learned.
    W0 = {"W1": torch.tensor([[[1.0, -1.0], [0.0, 0.0]]]), "b1": torch.zeros(1, 2)}
    ones, zeros = torch.ones(1, 2), torch.zeros(1, 2)
    k = torch.tensor([[[[1.0, 0.0]]]])
    eta = torch.full((1, 1, 1), 0.5)
    o, state = naive.ttt_linear(W0, ones, zeros, torch.zeros(1), None, k, k, k, eta)
    torch.testing.assert_close(o[0, 0, 0], torch.tensor([2.0, -1.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(state.W["W1"][0], W0["W1"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAIVE)
def test_two_calls_are_one_and_rows_are_strangers(name):
    W0, args, frames = make(name, B=2, T=7, C=3)
    whole, end = NAIVE[name](W0, **args, **frames)
    first, mid = NAIVE[name](W0, **args, **frames, lengths=[4, 1])
    assert mid.pos == [4, 1]
    assert not first[0, :, 4:].any()
    assert not first[1, :, 1:].any()
    rest = {n: torch.stack([x[0, :, 4:6], x[1, :, 1:3]]) for n, x in frames.items()}
    second, mid = NAIVE[name](W0, **args, **rest, state=mid)
    assert torch.equal(torch.cat([first[0, :, :4], second[0]], 1), whole[0, :, :6])
    assert torch.equal(torch.cat([first[1, :, :1], second[1]], 1), whole[1, :, :3])
    assert mid.pos == [6, 3]
    assert end.pos == [7, 7]


@pytest.mark.parametrize("name", NAIVE)
def test_outer_gradients_reach_everything(name):
    W0, args, frames = make(name, B=2, T=5)
    leaves = {**W0, **args, **frames}
    for x in leaves.values():
        x.requires_grad_()
    o, state = NAIVE[name](W0, **args, **frames)
    with torch.no_grad():
        quiet, _ = NAIVE[name](W0, **args, **frames)
    assert torch.equal(o, quiet)
    loss = o.square().sum() + sum(w.square().sum() for w in state.W.values())
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    for n, g in zip(leaves, gradients, strict=True):
        assert torch.isfinite(g).all(), n
        assert g.abs().max() > 1e-6, n


def test_imports_none_of_the_fast_forms():
    tree = ast.parse(Path(naive.__file__).read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "." for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    allowed = ("__future__", "collections", "typing", "torch", "jaxtyping")
    assert {n for n in names if n.split(".")[0] not in allowed} == set()
