"""An Atlas of any setting, its frames, and its definition beside it."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from moshi_ttt.ops import atlas
from moshi_ttt.ops.naive import atlas as naive

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
