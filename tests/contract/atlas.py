"""Contract rules of Atlas (see the package)."""

import torch
import torch.nn.functional as F

from moshi_ttt.ops.naive import atlas as naive

NAMES = ("W1", "W2")


def slow(name, rand, H, D, C, settings):
    """Coefficients away from where they start; the projection narrower than the head."""
    polynomial, deep = settings.get("polynomial", "elementwise"), settings.get("deep", True)
    R = D - 2 if polynomial == "outer" else D
    P, width = (D if polynomial == "none" else D + R), 2 * D
    out = {"W1": rand(H, D, width if deep else P), "W2": rand(H, width, P) if deep else None}
    out = {n: None if w is None else w * w.shape[-1] ** -0.5 for n, w in out.items()}
    out["coef"] = None if polynomial == "none" else 0.8 + 0.2 * rand(H, 2)
    size = D * (D + 1) // 2
    out["proj"] = rand(H, R, size) * size**-0.5 if polynomial == "outer" else None
    muon = settings.get("muon", False)
    return out | {"chunk_size": C, "window": settings["window"], "muon": muon}


def frames(rand, B, H, T, D):
    q, k = (F.normalize(rand(B, H, T, D), dim=-1) for _ in range(2))
    gates = {n: rand(B, H, T).sigmoid() for n in ("alpha", "eta", "theta", "gamma")}
    gates["alpha"] = 1 - 0.3 * gates["alpha"]
    gates["eta"] = gates["eta"] / (4 * D)
    return {"q": q, "k": k, "v": rand(B, H, T, D), **gates}


def definition(name, slow, frames, state, lengths):
    W0 = {n: slow[n] for n in NAMES if slow[n] is not None}
    rest = {n: x for n, x in slow.items() if n not in NAMES}
    return naive.atlas(W0, **rest, **frames, state=state, lengths=lengths)


def fast(name, slow, state, stale):
    H, D, _ = slow["W1"].shape
    keep, like, rows = slow["window"] - 1, slow["W1"], {}
    for pairs in state.pairs:
        parts = zip(*pairs, strict=True) if pairs else [()] * 3
        shapes = {"k": (H, D), "v": (H, D), "gamma": (H,)}
        for (n, shape), given in zip(shapes.items(), parts, strict=True):
            absent = like.new_full(shape, 0.0 if n == "gamma" else stale)
            row = [*[absent] * (keep - len(pairs)), *given]
            empty = like.new_zeros(H, 0, *shape[1:])
            rows.setdefault(n, []).append(torch.stack(row, 1) if row else empty)
    out = {n: torch.stack(x) for n, x in rows.items()}
    for ending, part in (("", state.W), ("s", state.start)):
        out |= {f"{n}{ending}": part.get(n, like.new_zeros(len(state.pos), H, 0, 0)) for n in NAMES}
    momentum = {"S1": state.S["W1"], "S2": state.S.get("W2", out["W2"])}
    return out | momentum


def used(slow, state):
    keep = slow["window"] - 1
    there = torch.arange(keep) >= keep - state.pos[:, None]
    return {n: there[:, None, :, None] for n in ("k", "v")} | {"gamma": there[:, None]}


def steady(frames):
    """Gates with which the memory learns what it hears again and again."""
    gates = {"alpha": 1.0, "eta": 0.01, "theta": 0.3, "gamma": 1.0}
    return {n: torch.full_like(frames[n], x) for n, x in gates.items()}


def learned(at_first):
    """An inner loss below which it has."""
    return 0.5 * at_first


def loss(name, slow, state, b, k, v):
    W = {n: w[b] for n, w in state.W.items()}
    return naive.inner_loss(W, slow["coef"], slow["proj"], k, v)


def half_of_the_loss(monkeypatch):
    right = naive.inner_loss
    monkeypatch.setattr(naive, "inner_loss", lambda *a: 0.5 * right(*a))


def a_window_too_short(monkeypatch):
    right = naive.band
    monkeypatch.setattr(naive, "band", lambda pairs, n: right(pairs, n - 1) or list(pairs[-1:]))


def a_window_too_long(monkeypatch):
    right = naive.band
    monkeypatch.setattr(naive, "band", lambda pairs, n: right(pairs, n + 1))


def no_forgetting(monkeypatch):
    right = naive.write
    monkeypatch.setattr(
        naive, "write", lambda W, S, alpha, eta, muon: right(W, S, alpha * 0 + 1, eta, muon)
    )


def momentum_after_the_gradient(monkeypatch):
    right = naive.momentum
    monkeypatch.setattr(naive, "momentum", lambda S, g, theta: right(S, right(S, g, theta), theta))


def shifted_grid(monkeypatch):
    right = naive.init_state
    monkeypatch.setattr(naive, "init_state", lambda W0, B: right(W0, B)._replace(pos=[1] * B))


BREAKS = (
    half_of_the_loss,
    a_window_too_short,
    a_window_too_long,
    no_forgetting,
    momentum_after_the_gradient,
    shifted_grid,
)
