"""Ten hours of frames: a memory that still learns at the end, and a state that does not grow.

`pytest -m slow tests/test_hours.py --log-cli-level=INFO` shows the figures for eval/LOG.md.
"""

import logging
import resource
import time

import pytest
import torch
import torch.nn.functional as F

from moshi_ttt.config import DEFAULT_BASE_LR
from tests.contract import MEMORIES_UNDER_TEST, clone, stream

EPISODE, EPISODES = 2000, 225  # frames with one content, contents: 450 000 frames are 10 h
C, D, HEADS = 16, 16, 2
logger = logging.getLogger(__name__)


def episode(gen, base_lr):
    """Keys whose values are one random linear map of them, and queries that are never keys."""
    normal = torch.randn(HEADS, 2 * EPISODE, D, generator=gen)
    k, q = F.normalize(normal, dim=-1).split(EPISODE, dim=1)
    to_value = torch.randn(HEADS, D, D, generator=gen)
    right = F.layer_norm(q @ to_value, (D,), eps=1e-6)
    v = k + F.layer_norm(k @ to_value, (D,), eps=1e-6)
    twice = [x.repeat(2, 1, 1)[None] for x in (q, k, v, right)]  # heads with decay, heads without
    eta = torch.full((1, 2 * HEADS, EPISODE), base_lr * 0.5 / D)
    return dict(zip("qkv", twice[:3], strict=True)) | {"eta": eta}, twice[3]


def loss_of(o, q, right):
    """`1/2 || prediction - right ||^2 / D` of queries not seen before: 1 at chance. [2, frames]."""
    each = 0.5 * (o - q - right).square().mean(-1)[0]
    return each.view(2, HEADS, -1).mean(1)


@pytest.mark.slow
@pytest.mark.parametrize("memory", MEMORIES_UNDER_TEST, ids=repr)
def test_ten_hours(memory, record_property):
    gen = torch.Generator().manual_seed(0)
    slow = {}
    for name, shape in memory.shapes(D).items():
        w0 = 0.02 * torch.randn(HEADS, *shape, generator=gen) * (len(shape) == 2)
        slow[name] = w0.repeat(2, *[1] * len(shape))
    slow |= {"gamma": torch.ones(2 * HEADS, D), "beta": torch.zeros(2 * HEADS, D)}
    slow |= {"delta": torch.zeros(C), "decay": torch.tensor([1e-3] * HEADS + [0.0] * HEADS)}
    p = memory.op.Params(**slow)
    state, begin = memory.op.init_state(p, 1), time.monotonic()
    losses, norms, resident = [], [], []
    with torch.no_grad():
        frames, _ = episode(gen, DEFAULT_BASE_LR[memory.name])
        head_start = {n: x[:, :, :7] for n, x in frames.items()}  # changes fall inside a chunk
        _, state = memory.op.chunk(p, state, **head_start)
        for _ in range(EPISODES):
            frames, right = episode(gen, DEFAULT_BASE_LR[memory.name])
            before = state
            o, state = memory.op.chunk(p, state, **frames)
            loss = loss_of(o, frames["q"], right)
            fresh = loss[:, -EPISODE // 4 :]
            losses.append([loss.mean(-1).tolist(), fresh.mean(-1).tolist()])  # numbers, not storage
            size = sum(getattr(state, n)[0].flatten(1).square().sum(1) for n in memory.shapes(D))
            norms.append(size.sqrt().view(2, HEADS).mean(1).tolist())
            resident.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        minutes = (time.monotonic() - begin) / 60
        streamed, last = stream(memory, slow, frames, clone(before))

    whole, fresh = torch.tensor(losses).unbind(1)  # [episodes, (decay, plain)], its last quarter
    norm = torch.tensor(norms)
    tenth = EPISODES // 10
    settled = slice(3 * tenth, 5 * tenth)  # from 3 h on: 8 time constants of the decay
    figures = {"minutes": minutes, "growth_kb": resident[-1] - resident[settled.start]}
    for i, kind in enumerate(("decay", "plain")):
        figures[f"{kind} loss, first hour"] = fresh[:tenth, i].mean()
        figures[f"{kind} loss, settled"] = fresh[settled, i].mean()
        figures[f"{kind} loss, tenth hour"] = fresh[-tenth:, i].mean()
        figures[f"{kind} loss of whole episodes, settled"] = whole[settled, i].mean()
        figures[f"{kind} loss of whole episodes, tenth hour"] = whole[-tenth:, i].mean()
        for hour in (1, 3, 5, 10):
            figures[f"{kind} norm, hour {hour}"] = norm[hour * EPISODES // 10 - 1, i]
    figures["streamed against chunked, last 2000 frames"] = (streamed - o).abs().max()
    for name, value in figures.items():
        record_property(name, float(value))
        logger.info("%s: %s = %.4g", memory.name, name, float(value))

    assert all(torch.isfinite(x).all() for x in (whole, norm, *state, *last))
    assert state.pos.tolist() == last.pos.tolist() == [7 + EPISODE * EPISODES]
    for loss in (fresh, whole):
        was, ends = loss[settled, 0].mean(), loss[-tenth:, 0].mean()
        assert abs(ends - was) <= 0.1 * was
    assert fresh[-tenth:, 0].mean() < 0.5
    assert abs(norm[-tenth:, 0].mean() / norm[settled, 0].mean() - 1) < 0.05
    assert resident[-1] - resident[settled.start] < 16 * 1024  # kB
    assert (streamed - o).abs().max() <= 1e-4
