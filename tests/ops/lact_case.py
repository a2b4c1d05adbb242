"""Random LaCT memories, their definition's state as a fast state, and what is compared of them."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from moshi_ttt.ops import lact
from moshi_ttt.ops.naive import lact as naive
from tests.contract import assert_near

OPTIONS = {
    "plain": {},
    "wide": {"width": 9},
    "no muon": {"muon": False},
    "no momentum": {"momentum": False},
    "neither": {"muon": False, "momentum": False},
    "stacked": {"r": 2},
    "stacked residual": {"r": 2, "residual": True},
    "three, no muon": {"r": 3, "residual": True, "muon": False},
    "residual, no momentum": {"residual": True, "momentum": False},
}
NAMES = ("q", "k", "v", "lr", "m", "w")


def case(seed=0, *, B=2, H=2, T=9, D=6, width=5, C=4, r=1, size=2, dtype=torch.float64, **options):
    """Random slow weights, frames and options; eta at most 0.1."""
    gen = torch.Generator().manual_seed(seed)

    def rand(*shape, f=torch.randn):
        return f(*shape, generator=gen, dtype=torch.float64).to(dtype)

    W0 = {
        "Wg": rand(H, r, width, D) * D**-0.5,
        "Wu": rand(H, r, width, D) * D**-0.5,
        "Wo": rand(H, r, D, width) * size,
    }
    eta = 0.02 + 0.08 * rand(H, f=torch.rand)
    q, k = (F.normalize(rand(B, H, T, D), dim=-1) for _ in range(2))
    v = F.silu(rand(B, H, T, D))
    lr, m, w = rand(B, H, T, 3, f=torch.rand), *(rand(B, H, T, f=torch.rand) for _ in range(2))
    frames = dict(zip(NAMES, (q, k, v, lr, m, w), strict=True))
    options = {"momentum": True, "muon": True, "residual": False, **options, "chunk_size": C}
    return SimpleNamespace(W0=W0, eta=eta, frames=frames, options=options, C=C, B=B, T=T)


def params(c):
    return lact.Params(**c.W0, eta=c.eta, **c.options)


def define(c, frames=None, state=None, lengths=None):
    """The definition on the same arguments."""
    frames = c.frames if frames is None else frames
    return naive.lact(c.W0, c.eta, **frames, **c.options, state=state, lengths=lengths)


def fast_state(c, state, stale=0.0):
    """The fast state that means what the definition's `state` means; `stale` fills unused rows."""
    H, D = c.eta.shape[0], c.W0["Wo"].shape[2]
    rows = {n: [] for n in ("k", "v", "lr", "m", "w")}
    for frames in state.frames:
        columns = list(zip(*frames, strict=True)) if frames else [[]] * 5
        for name, column, width in zip(("k", "v", "lr"), columns, (D, D, 3), strict=False):
            unused = [c.eta.new_full((H, width), stale)] * (c.C - len(column))
            rows[name].append(torch.stack([*column, *unused], 1))
        for name, column in zip(("m", "w"), columns[3:], strict=True):
            rows[name].append(torch.stack([*column, c.eta.new_zeros(H)]).sum(0))
    D = [x if c.options["momentum"] else x[:, :, :0] for x in state.D.values()]
    tensors = {n: torch.stack(x) for n, x in rows.items()}
    return lact.State(*state.W.values(), *D, **tensors, pos=torch.tensor(state.pos))


def meaning(c, state):
    """What a fast state means: its buffers' unused rows at 0."""
    used = (torch.arange(c.C) < (state.pos % c.C)[:, None])[:, None, :, None]
    rows = {n: torch.where(used, getattr(state, n), 0) for n in ("k", "v", "lr")}
    return state._replace(**rows)._asdict()


def assert_same_state(c, actual, expected, tolerance):
    wanted = meaning(c, fast_state(c, expected))
    for name, x in meaning(c, actual).items():
        if name == "pos":
            assert torch.equal(x, wanted[name])
        else:
            assert_near(x.detach(), wanted[name].detach(), tolerance, f"state {name}")


def leaves(c, state):
    """Every tensor that a call depends on, made a leaf of its own, in place."""
    found = {}

    def leaf(name, x):
        found[name] = x.detach().clone().requires_grad_()
        return found[name]

    c.W0 = {n: leaf(n, x) for n, x in c.W0.items()}
    c.eta = leaf("eta", c.eta)
    c.frames = {n: leaf(n, x) for n, x in c.frames.items()}
    W = {n: leaf(f"state {n}", x) for n, x in state.W.items()}
    D = {n: leaf(f"state D of {n}", x) for n, x in state.D.items()}
    frames = [
        [tuple(leaf(f"row {b} {t} {n}", x) for n, x in zip(NAMES[1:], frame, strict=True))
         for t, frame in enumerate(row)]
        for b, row in enumerate(state.frames)
    ]  # fmt: skip
    return found, naive.State(W, D, frames, state.pos)


def random_weights(tensors):
    gen = torch.Generator().manual_seed(9)
    return [torch.randn(x.shape, generator=gen, dtype=x.dtype) for x in tensors]


def outputs_and_gradients(o, state, found, cotangents=None):
    tensors = [o, *(x for x in state[:-1] if x.numel())]
    cotangents = random_weights(tensors) if cotangents is None else cotangents
    total = torch.stack([(x * y).sum() for x, y in zip(tensors, cotangents, strict=True)]).sum()
    grads = torch.autograd.grad(total, list(found.values()), allow_unused=True)
    pairs = zip(found.items(), grads, strict=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in pairs}


def assert_same_gradients(actual, expected, tolerance):
    for name, wanted in expected.items():
        error = (actual[name] - wanted).abs().max() if wanted.numel() else 0
        largest = wanted.abs().max() if wanted.numel() else 0
        # Muon forgets the size of a lone gradient: what is left of it for lr is rounding
        assert error <= tolerance * largest + 1e-13, f"gradient of {name}: {error:.1e}"
