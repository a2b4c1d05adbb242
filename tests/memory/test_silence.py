"""Ten minutes of a constant sound do not wash out what was learned before.

A layer hears pairs (a key and its value in one frame), then a sound, then keys alone, and is asked
for their values. Digital silence gives constant codes, so a sound is one frame again and again:
silence is one vector, a tone another. Nothing in an equation knows that such frames are worth
little: it is the learned rates that have to close, so the layer is trained first, on sounds of
seconds to minutes, as a run with `state_passing` would: the gradient goes through the last of a
long sound only.
"""

import logging
import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from moshi_ttt.config import TTTConfig
from moshi_ttt.memory import MEMORIES, build_memory

D, SPARE, PAIRS, REPEATS = 16, 8, 8, 8
WIDTH = 2 * D + SPARE  # a key, a value, and what only sounds have
MINUTES = 7500  # frames: ten
KNOWN, SOUNDS = 2, torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(9))
"""Silence and a tone, and a tone that outer training never has."""
WINDOW = 160  # frames of a sound that the gradient goes through
logger = logging.getLogger(__name__)


class Family(NamedTuple):
    """How one family is trained here, until it recalls.

    Attributes:
        steps: of outer training.
        lr: of it; of the learned rates three times as much.
        longest: sounds of training, frames.
        options: of the configuration, where not the defaults.
        spread: factor on W0, which starts small for a layer as narrow as this.
    """

    steps: int
    lr: float
    longest: int = 2000
    options: dict[str, Any] = {}  # noqa: RUF012
    spread: float = 1.0


def layer(name, family):
    """A memory whose projections know keys from values; the rest is as it starts."""
    torch.manual_seed(0)
    config = TTTConfig(name, head_dim=D, **{"conv_width": 1, **family.options})
    memory = build_memory(WIDTH, 1, config)
    with torch.no_grad():
        into, out, eye = memory.qkv_proj.weight.zero_(), memory.o_proj.weight.zero_(), torch.eye(D)
        into[:D, :D] = into[D : 2 * D, :D] = into[2 * D :, D : 2 * D] = out[D : 2 * D] = eye
        for weight in (getattr(memory, n, None) for n in ("W1", "W2")):
            if weight is not None:
                weight.mul_(family.spread)
    return memory


def pairs(gen, rows):
    """Frames of pairs in random order, frames of keys alone, and the values."""
    keys = math.sqrt(D) * F.normalize(torch.randn(rows, PAIRS, D, generator=gen), dim=-1)
    values = F.layer_norm(torch.randn(rows, PAIRS, D, generator=gen), (D,))
    order = torch.rand(rows, REPEATS, PAIRS, generator=gen).argsort(-1).flatten(1)
    both = F.pad(torch.cat([keys, values], -1), (0, SPARE))
    frames = both.gather(1, order.unsqueeze(-1).expand(-1, -1, WIDTH))
    return frames, F.pad(keys, (0, WIDTH - D)), values


def error(y, values):
    """Squared error of what is recalled, relative to that of 0: 1 at chance."""
    return (y[..., D : 2 * D] - values).square().sum() / values.square().sum()


def constant(sound, rows, frames):
    return sound.expand(rows, frames, WIDTH)


def train(memory, family):
    gen = torch.Generator().manual_seed(0)
    named = list(memory.named_parameters())
    rates, rest = ([p for n, p in named if n.startswith("lr_") == is_it] for is_it in (True, False))
    groups = [{"params": rest, "lr": family.lr}, {"params": rates, "lr": 3 * family.lr}]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=family.steps, pct_start=0.1
    )
    for i in range(family.steps):
        frames, keys, values = pairs(gen, 16)
        length = int(family.longest ** torch.rand(1, generator=gen).item())
        heard = torch.cat([frames, constant(SOUNDS[i % KNOWN], 16, length)], 1)
        state, cut = memory.init_state(16), max(0, length - WINDOW)
        if cut:
            with torch.no_grad():
                _, state = memory(heard[:, :-WINDOW], state)
            heard = heard[:, -WINDOW:]
        y, _ = memory(torch.cat([heard, keys], 1), state)
        optimizer.zero_grad()
        error(y[:, -PAIRS:], values).backward()
        torch.nn.utils.clip_grad_norm_(memory.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def recalls(memory, frames, rows=8):
    """Of each of `SOUNDS`: error at keys after so many frames of it, and part of values nearest."""
    content, keys, values = pairs(torch.Generator().manual_seed(7), rows)
    content, keys, values = (x.repeat(len(SOUNDS), 1, 1) for x in (content, keys, values))
    sound = SOUNDS.repeat_interleave(rows, 0).unsqueeze(1)
    _, state = memory(content, memory.init_state(len(sound)))
    for begin in range(0, frames, 500):
        _, state = memory(constant(sound, len(sound), min(500, frames - begin)), state)
    y, _ = memory(keys, state)
    nearest = torch.cdist(y[..., D : 2 * D], values).argmin(-1) == torch.arange(PAIRS)
    of_each = zip(*(x.split(rows) for x in (y, values, nearest.float())), strict=True)
    return [(error(a, b).item(), right.mean().item()) for a, b, right in of_each]


@torch.no_grad()
def nothing_heard(memory):
    _, keys, values = pairs(torch.Generator().manual_seed(7), 8)
    return error(memory(keys, memory.init_state(8))[0], values).item()


def said(name, what, found):
    """Figures for eval/LOG.md: `--log-cli-level=INFO`."""
    each = ", ".join(f"{wrong:.3f} ({part:.2f} nearest)" for wrong, part in found)
    logger.info("%s: %s: %s", name, what, each)
    return found


MORE = 0.4
"""Error that ten minutes may add; measured: up to 0.19 (eval/LOG.md)."""
NEED_RATES = ("lact", "atlas")
"""A constant pair's gradient dies in TTT, once it is learned; Muon forgets how small it is."""
QUICK = {
    "ttt_linear": Family(60, 1e-2),
    "ttt_mlp": Family(80, 1e-2, options={"base_lr": 0.5}, spread=8.0),
    "lact": Family(120, 1e-2, options={"momentum": False}),
    "atlas": Family(40, 3e-3, options={"base_lr": 1.0}),
}
LONG = QUICK | {
    "ttt_linear": Family(300, 1e-2, MINUTES),
    "ttt_mlp": Family(300, 1e-2, MINUTES, {"base_lr": 0.5}, 8.0),
    # its momentum writes what is left of the pairs while a sound lasts: short ones open the gate
    "lact": Family(800, 1e-2, MINUTES),
    "atlas": Family(120, 3e-3, MINUTES, {"base_lr": 1.0}),
}


def hold(name, family):
    memory = layer(name, family)
    train(memory, family)
    (before, nearest), *_ = said(name, "no sound", recalls(memory, 0))
    found = said(name, "10 min of silence, a tone, an unknown one", recalls(memory, MINUTES))
    assert before < 0.5
    assert nearest > 0.9
    assert nothing_heard(memory) > 1.2
    for wrong, nearest in found[:KNOWN]:
        assert wrong < before + MORE
        assert nearest > 0.75  # chance is 1 / 8
    # so that this can fail: what the rates do not know is written, and the pairs are gone
    assert not found[KNOWN][0] < before + MORE  # nor is NaN
    if name in NEED_RATES:
        with torch.no_grad():
            memory.lr_weight.zero_()
        open_rates = said(name, "rates the same for all frames", recalls(memory, MINUTES))
        assert not any(wrong < before + MORE for wrong, _ in open_rates)


def test_every_family_is_here():
    assert QUICK.keys() == LONG.keys() == MEMORIES.keys()


@pytest.mark.parametrize(
    "name",
    [
        "ttt_mlp",
        "atlas",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("ttt_linear", "lact")),
    ],
)
def test_ten_minutes_of_a_constant_sound_wash_nothing_out(name):
    hold(name, QUICK[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_ten_minutes_wash_nothing_out_of_a_layer_trained_longer(name):
    hold(name, LONG[name])
