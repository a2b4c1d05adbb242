"""Contract rules of LaCT (see the package)."""

import torch
import torch.nn.functional as F

from moshi_ttt.ops.naive import lact as naive

NAMES = ("Wg", "Wu", "Wo")


def slow(name, rand, H, D, C, settings):
    """Hidden width above the head's; a write moves a row by some percent."""
    r, width = settings.get("stacked", 1), D + 2
    out = {"Wg": rand(H, r, width, D), "Wu": rand(H, r, width, D), "Wo": rand(H, r, D, width)}
    out["Wg"], out["Wu"] = (2 * D**-0.5 * out[n] for n in ("Wg", "Wu"))  # rows of length 2
    out["Wo"] = 2 * width**-0.5 * out["Wo"]
    out["eta"] = 0.05 + 0.05 * rand(H).sigmoid()
    options = {n: settings[n] for n in ("momentum", "muon", "residual") if n in settings}
    return out | {"chunk_size": C} | options


def frames(rand, B, H, T, D):
    q, k = (F.normalize(rand(B, H, T, D), dim=-1) for _ in range(2))
    rates = {"lr": 0.1 * rand(B, H, T, 3).exp(), "m": rand(B, H, T).sigmoid()}
    return {"q": q, "k": k, "v": F.silu(rand(B, H, T, D)), **rates, "w": rand(B, H, T).sigmoid()}


def definition(name, slow, frames, state, lengths):
    rest = {n: x for n, x in slow.items() if n not in NAMES}
    return naive.lact({n: slow[n] for n in NAMES}, **rest, **frames, state=state, lengths=lengths)


def fast(name, slow, state, stale):
    H, _, D, _ = slow["Wo"].shape
    C, like = slow["chunk_size"], slow["Wo"]
    shapes = {"k": (H, D), "v": (H, D), "lr": (H, 3), "m": (H,), "w": (H,)}
    rows = {}
    for frames in state.frames:
        parts = zip(*frames, strict=True) if frames else [()] * 5
        for (n, shape), given in zip(shapes.items(), parts, strict=True):
            if n in ("m", "w"):
                row = torch.stack([like.new_zeros(shape), *given]).sum(0)
            else:
                row = torch.stack([*given, *[like.new_full(shape, stale)] * (C - len(frames))], 1)
            rows.setdefault(n, []).append(row)
    carried = {n.replace("W", "D"): x for n, x in state.D.items()}
    if not slow.get("momentum", True):
        carried = {n: x[:, :, :0] for n, x in carried.items()}
    return state.W | carried | {n: torch.stack(x) for n, x in rows.items()}


def used(slow, state):
    slots = torch.arange(slow["chunk_size"]) < (state.pos % slow["chunk_size"])[:, None]
    return dict.fromkeys(("k", "v", "lr"), slots[:, None, :, None])


def steady(frames):
    """Gates with which the memory learns what it hears again and again."""
    return {"w": torch.ones_like(frames["w"])}


def learned(at_first):
    """An inner loss, unbounded below, at which it has."""
    return at_first - 0.5


def loss(name, slow, state, b, k, v):
    W = {n: w[b] for n, w in state.W.items()}
    return naive.inner_loss(W, k, v, slow.get("residual", False))


def normalised_before_the_update(monkeypatch):
    def write(W, W0, D, size, muon):
        move = {n: naive.newton_schulz(d) if muon else d for n, d in D.items()}
        size = size.view(-1, 1, 1, 1)
        return {n: naive.row_normalise(w, W0[n]) + size * move[n] for n, w in W.items()}

    monkeypatch.setattr(naive, "write", write)


def another_sign(monkeypatch):
    right = naive.inner_loss
    monkeypatch.setattr(naive, "inner_loss", lambda *a: -right(*a))


def rates_in_another_order(monkeypatch):
    monkeypatch.setattr(naive, "RATES", ("Wu", "Wg", "Wo"))


def no_row_norm(monkeypatch):
    monkeypatch.setattr(naive, "row_normalise", lambda U, start: U)


def no_write_gate(monkeypatch):
    right = naive.write
    monkeypatch.setattr(
        naive, "write", lambda W, W0, D, size, muon: right(W, W0, D, 1.5 * size, muon)
    )


def shifted_grid(monkeypatch):
    right = naive.init_state
    monkeypatch.setattr(naive, "init_state", lambda W0, B: right(W0, B)._replace(pos=[1] * B))


BREAKS = (
    normalised_before_the_update,
    another_sign,
    rates_in_another_order,
    no_row_norm,
    no_write_gate,
    shifted_grid,
)
