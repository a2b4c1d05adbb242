"""Contract rules of TTT-Linear and TTT-MLP (see the package)."""

import torch
import torch.nn.functional as F

from moshi_ttt.ops.naive import ttt as naive

SHAPES = {
    "ttt_linear": lambda D: {"W1": (D, D), "b1": (D,)},
    "ttt_mlp": lambda D: {"W1": (D, 4 * D), "b1": (4 * D,), "W2": (4 * D, D), "b2": (D,)},
}
SLOW = ("gamma", "beta", "delta", "decay")


def slow(name, rand, H, D, C, settings):
    """Some tau are clamped, no gate is closed."""
    scale, decay = settings.get("scale", 1.0), settings.get("decay", 0.3)
    out = {}
    for weight, shape in SHAPES[name](D).items():
        out[weight] = rand(H, *shape) * (shape[0] ** -0.5 if len(shape) == 2 else 0.3)
    out["gamma"] = scale * (1 + 0.2 * rand(H, D))
    out["beta"] = 0.2 * rand(H, D)
    out["delta"] = 0.2 * rand(C)
    if C > 2:
        out["delta"][1] = -0.7  # 1/2 - 0.7 < 0: clamped
    heads = torch.linspace(0.5, 1.0, H, dtype=out["beta"].dtype)
    out["decay"] = None if decay is None else decay * heads
    out["write_every"] = settings.get("write_every", 1)
    return out


def frames(rand, B, H, T, D):
    q, k = (F.normalize(rand(B, H, T, D), dim=-1) for _ in range(2))
    return {"q": q, "k": k, "v": rand(B, H, T, D), "eta": rand(B, H, T).sigmoid() / D}


def definition(name, slow, frames, state, lengths):
    W0 = {n: slow[n] for n in SHAPES[name](1)}
    rest = {n: slow[n] for n in SLOW}
    run, every = getattr(naive, name), slow["write_every"]
    return run(W0, **rest, **frames, state=state, lengths=lengths, write_every=every)


def fast(name, slow, state, stale):
    make = _linear_rows if name == "ttt_linear" else _mlp_rows
    C, (H, D) = len(slow["delta"]), slow["gamma"].shape
    nothing = slow["gamma"].new_zeros(H, D)
    rows = {}
    for b, pairs in enumerate(state.pairs):
        W = {n: w[b] for n, w in state.W.items()}
        made = [make(W, slow["gamma"], slow["beta"], *pair) for pair in pairs]
        empty = make(W, slow["gamma"], slow["beta"], nothing, nothing, nothing[:, 0])
        for n, like in empty.items():
            unused = [torch.full_like(like, stale).detach()] * (C - len(made))
            row = torch.stack([x[n] for x in made] + unused, dim=1)
            rows.setdefault(n, []).append(row)
    return state.W | {n: torch.stack(x) for n, x in rows.items()}


def used(slow, state):
    slots = torch.arange(len(slow["delta"])) < (state.pos % len(slow["delta"]))[:, None]
    return dict.fromkeys(set(state._fields) & {"k", "g1", "x2", "g2"}, slots[:, None, :, None])


def steady(frames):
    """Gates with which the memory learns what it hears again and again."""
    return {"eta": torch.full_like(frames["eta"], 0.5 / frames["q"].shape[-1])}


def learned(at_first):
    """An inner loss below which it has."""
    return 0.5 * at_first


def loss(name, slow, state, b, k, v):
    f = naive.linear if name == "ttt_linear" else naive.mlp
    W = {n: w[b] for n, w in state.W.items()}
    return naive.inner_loss(f, W, slow["gamma"], slow["beta"], k, v)


def _linear_rows(W, gamma, beta, k, v, eta):
    z1 = naive.linear(k, W)
    r = v - k
    (g1,) = _gradient(lambda d1: _half_square(z1 + d1, gamma, beta, r), z1)
    return {"k": k, "g1": eta[:, None] * g1}


def _mlp_rows(W, gamma, beta, k, v, eta):
    z1 = torch.einsum("hd,hdf->hf", k, W["W1"]) + W["b1"]
    r = v - k

    def loss(d1, d2):
        hidden = F.gelu(z1 + d1, approximate="tanh")
        z2 = torch.einsum("hf,hfd->hd", hidden, W["W2"]) + W["b2"]
        return _half_square(z2 + d2, gamma, beta, r)

    g1, g2 = _gradient(loss, z1, k)
    x2 = F.gelu(z1, approximate="tanh")
    return {"k": k, "g1": eta[:, None] * g1, "x2": x2, "g2": eta[:, None] * g2}


def _half_square(z, gamma, beta, r):
    return 0.5 * (naive.layer_norm(z, gamma, beta) - r).square().sum()


def _gradient(loss, *like):
    """The gradient of `loss` to a shift of its layers' pre-activations, at no shift."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        shifts = [torch.zeros_like(x, requires_grad=True) for x in like]
        return torch.autograd.grad(loss(*shifts), shifts, create_graph=create_graph)


def wrong_tau(monkeypatch):
    monkeypatch.setattr(naive, "tau", lambda delta, t: torch.clamp(1 / (t + 2) + delta[t], min=0))


def unclamped_tau(monkeypatch):
    monkeypatch.setattr(naive, "tau", lambda delta, t: 1 / (t + 1) + delta[t])


def decay_to_zero(monkeypatch):
    right = naive.forget
    monkeypatch.setattr(
        naive,
        "forget",
        lambda W, W0, d: right(W, {n: torch.zeros_like(w) for n, w in W.items()}, d),
    )


def shifted_grid(monkeypatch):
    right = naive.init_state
    monkeypatch.setattr(naive, "init_state", lambda W0, B: right(W0, B)._replace(pos=[1] * B))


def bias_not_written(monkeypatch):
    right = naive.inner_gradient
    monkeypatch.setattr(
        naive, "inner_gradient", lambda *a: {n: g * (n[0] != "b") for n, g in right(*a).items()}
    )


def sum_of_the_loss_not_half(monkeypatch):
    right = naive.inner_loss
    monkeypatch.setattr(naive, "inner_loss", lambda *a: 2 * right(*a))


def another_chunk_is_written(monkeypatch):
    right = naive.writes
    monkeypatch.setattr(naive, "writes", lambda c, N: right(c + 1, N + 1))


def every_second_chunk_of_N_is_written(monkeypatch):
    monkeypatch.setattr(naive, "writes", lambda c, N: (c + 1) % (2 * N) == 0)


BREAKS = (
    wrong_tau,
    unclamped_tau,
    decay_to_zero,
    shifted_grid,
    bias_not_written,
    sum_of_the_loss_not_half,
    another_chunk_is_written,
    every_second_chunk_of_N_is_written,
)
