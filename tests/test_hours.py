"""Ten hours of frames: a memory that still learns at the end, and a state that does not grow.

`pytest -m slow tests/test_hours.py --log-cli-level=INFO` shows the figures for eval/LOG.md.
"""

import logging
import resource
import time
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from tests.contract import Memory, clone, params, stream

EPISODE, EPISODES = 2000, 225  # frames with one content, contents: 450 000 frames are 10 h
C, D, HEADS = 16, 16, 2
logger = logging.getLogger(__name__)


class Run(NamedTuple):
    """One family: two heads as it starts, and two in another variant on the same content."""

    name: str
    variants: tuple[str, str]
    slow: dict
    gates: dict
    learned: float
    """A loss below which it has; 1 is chance."""
    silu: bool = False
    """Whether q and k come out of a SiLU."""
    residual: bool = True
    """Whether a query is part of its output."""


def heads(x, y):
    return torch.tensor([x] * HEADS + [y] * HEADS)


def start(gen, *shape, std):
    """Of a fast weight: the same for both variants."""
    return std * torch.randn(HEADS, *shape, generator=gen).repeat(2, *[1] * len(shape))


def ttt(gen, name):
    """Learning rates as at the memory's start: half of `base_lr / D`."""
    hidden = D if name == "ttt_linear" else 4 * D
    slow = {"W1": start(gen, D, hidden, std=0.02), "b1": torch.zeros(2 * HEADS, hidden)}
    if name == "ttt_mlp":
        slow |= {"W2": start(gen, hidden, D, std=0.02), "b2": torch.zeros(2 * HEADS, D)}
    slow |= {"gamma": torch.ones(2 * HEADS, D), "beta": torch.zeros(2 * HEADS, D)}
    slow |= {"delta": torch.zeros(C), "decay": heads(1e-3, 0.0)}
    eta = torch.full((2 * HEADS, 1), 0.5 * (1.0 if name == "ttt_linear" else 0.1) / D)
    return Run(name, ("decay 1e-3", "decay 0"), slow, {"eta": eta}, 0.5)


def lact(gen):
    """`Wg = L R + 0.5 I` with a full L R; gates as at the memory's start."""
    slow = {n: start(gen, 1, D, D, std=0.5 * D**-0.5) + 0.5 * torch.eye(D) for n in ("Wg", "Wu")}
    slow |= {"Wo": start(gen, 1, D, D, std=D**-0.5), "eta": heads(0.05, 0.15), "chunk_size": C}
    half = torch.full((2 * HEADS, 1), 0.5)
    gates = {"lr": torch.full((2 * HEADS, 1, 3), 1e-3), "m": half, "w": half}
    return Run("lact", ("eta 0.05", "eta 0.15"), slow, gates, 0.7, silu=True, residual=False)


def atlas(gen, *, deep):
    """Gates as at the start with `base_lr: 1`; at 0.1 a deep one learns too slowly here."""
    W1 = start(gen, D, 4 * D if deep else 2 * D, std=0.02)
    slow = {"W1": W1, "W2": start(gen, 4 * D, 2 * D, std=(2 * D) ** -0.5) if deep else None}
    slow |= {"coef": torch.tensor([1.0, 0.5**0.5]).repeat(2 * HEADS, 1), "proj": None}
    slow |= {"chunk_size": C, "window": 8}
    half = torch.full((2 * HEADS, 1), 0.5)
    gates = {"alpha": 1 - heads(1e-4, 0.0).view(-1, 1), "eta": half * half / (C * 8)}
    gates |= {"theta": half, "gamma": half}
    return Run("atlas", ("alpha 0.9999", "alpha 1"), slow, gates, 0.5, residual=deep)


RUNS = {
    "ttt_linear": lambda gen: ttt(gen, "ttt_linear"),
    "ttt_mlp": lambda gen: ttt(gen, "ttt_mlp"),
    "lact": lact,
    "atlas": lambda gen: atlas(gen, deep=True),
    "atlas linear": lambda gen: atlas(gen, deep=False),
}


def episode(gen, run):
    """Keys whose values are one random linear map of them, and queries that are never keys."""
    normal = torch.randn(HEADS, 2 * EPISODE, D, generator=gen)
    x = F.normalize(F.silu(normal) if run.silu else normal, dim=-1)
    y = F.layer_norm(x @ torch.randn(HEADS, D, D, generator=gen), (D,), eps=1e-6)
    y = y - y.mean(1, keepdim=True)  # what is the same for all keys is nothing to recall
    (k, q), (v, right) = x.split(EPISODE, 1), y.split(EPISODE, 1)
    frames = {"q": q, "k": k, "v": k + v if run.residual else v}
    frames = {n: x.repeat(2, 1, 1)[None] for n, x in frames.items()}
    for name, gate in run.gates.items():
        frames[name] = gate.expand(2 * HEADS, EPISODE, *gate.shape[2:])[None]
    return frames, right.repeat(2, 1, 1)


def loss_of(run, o, q, right):
    """Squared error over that of predicting 0, at the best scale of the prediction: 1 at chance.

    The scale of an output means nothing, a norm follows it; LaCT's inner loss has none at all.

    Returns:
        Of each variant, the mean over its heads.
    """
    p, r = ((o - q if run.residual else o)[0].flatten(1).double(), right.flatten(1).double())
    cosine = (p * r).sum(1) / (p.norm(dim=1) * r.norm(dim=1)).clamp(min=1e-30)
    return (1 - cosine.square()).view(2, HEADS).mean(1)


def norm_of(state, names):
    """Of fast weights, or of momentum, of each variant; NaN where the family has none."""
    if not names:
        return torch.full((2,), torch.nan)
    flat = torch.cat([getattr(state, n)[0].flatten(1) for n in names], 1)
    return flat.norm(dim=1).view(2, HEADS).mean(1)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_ten_hours(name, record_property):
    gen = torch.Generator().manual_seed(0)
    run = RUNS[name](gen)
    memory = Memory(run.name)
    p, op = params(memory, run.slow), memory.op
    state, begin = op.init_state(p, 1), time.monotonic()
    losses, norms, momenta, resident = [], [], [], []
    with torch.no_grad():
        frames, _ = episode(gen, run)
        head_start = {n: x[:, :, :7] for n, x in frames.items()}  # changes fall inside a chunk
        _, state = op.chunk(p, state, **head_start)
        for _ in range(EPISODES):
            frames, right = episode(gen, run)
            before = state
            o, state = op.chunk(p, state, **frames)
            last = slice(-EPISODE // 4, None)
            cut = o[:, :, last], frames["q"][:, :, last], right[:, last]
            whole = loss_of(run, o, frames["q"], right)
            losses.append([whole.tolist(), loss_of(run, *cut).tolist()])  # numbers, not storage
            norms.append(norm_of(state, op.WEIGHTS).tolist())
            momenta.append(norm_of(state, op.MOMENTUM).tolist())
            resident.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        minutes = (time.monotonic() - begin) / 60
        streamed, end = stream(memory, run.slow, frames, clone(before))

    whole, fresh = torch.tensor(losses).unbind(1)  # [episodes, variants], its last quarter
    norm, momentum = torch.tensor(norms), torch.tensor(momenta)
    tenth = EPISODES // 10
    settled = slice(3 * tenth, 5 * tenth)  # from 3 h on: 8 time constants of TTT's decay
    figures = {"minutes": minutes, "growth_kb": resident[-1] - resident[settled.start]}
    for i, variant in enumerate(run.variants):
        figures[f"{variant}: loss, first hour"] = fresh[:tenth, i].mean()
        figures[f"{variant}: loss, settled"] = fresh[settled, i].mean()
        figures[f"{variant}: loss, tenth hour"] = fresh[-tenth:, i].mean()
        figures[f"{variant}: loss of whole episodes, settled"] = whole[settled, i].mean()
        figures[f"{variant}: loss of whole episodes, tenth hour"] = whole[-tenth:, i].mean()
        for hour in (1, 5, 10):
            then = slice((hour - 1) * tenth, hour * tenth)
            figures[f"{variant}: norm of the weights, hour {hour}"] = norm[then, i].mean()
            figures[f"{variant}: norm of the momentum, hour {hour}"] = momentum[then, i].mean()
    figures["streamed against chunked, last 2000 frames"] = (streamed - o).abs().max()
    for key, value in figures.items():
        record_property(key, float(value))
        logger.info("%s: %s = %.4g", name, key, float(value))

    assert all(torch.isfinite(x).all() for x in (whole, norm, *state, *end))
    assert torch.isfinite(momentum).all() == bool(op.MOMENTUM)
    assert state.pos.tolist() == end.pos.tolist() == [7 + EPISODE * EPISODES]
    for loss in (fresh, whole):
        was, ends = loss[settled, 0].mean(), loss[-tenth:, 0].mean()
        assert abs(ends - was) <= 0.1 * was
    assert fresh[-tenth:, 0].mean() < run.learned
    assert abs(norm[-tenth:, 0].mean() / norm[settled, 0].mean() - 1) < 0.05
    if op.MOMENTUM:  # a sum of the last gradients: it changes with the content
        assert abs(momentum[-tenth:, 0].mean() / momentum[settled, 0].mean() - 1) < 0.2
    assert resident[-1] - resident[settled.start] < 16 * 1024  # kB
    assert (streamed - o).abs().max() <= 1e-4
