"""What the tests of sessions have in common."""

import torch

from moshi_ttt import session
from moshi_ttt.engine import Engine
from tests.small import small_lm, small_mimi, small_tokenizer
from tests.stream.streams import CARD, hybrid

CUT = 26  # beyond the attention window, in the middle of a chunk


def engine_for(lm=None, mimi_seed=0, **options):
    return Engine(lm or hybrid(), small_mimi(seed=mimi_seed), small_tokenizer(), **options)


def run(engine, frames):
    said = [(f.pcm.clone(), f.tokens.clone()) for f in map(engine.step, frames)]
    return torch.cat([pcm for pcm, _ in said], 1), torch.stack([t for _, t in said], 2)


def snapshot(engine):
    tensors, values = session._split(session._live(engine))
    return {k: t.clone() for k, t in tensors.items()}, values, torch.get_rng_state()


def same(a, b):
    return (
        a[1] == b[1]
        and torch.equal(a[2], b[2])
        and all(torch.equal(a[0][k], b[0][k]) for k in a[0])
    )


def first_logits(engine, frame):
    seen = []
    engine.gen.on_text_logits_hook = lambda logits: seen.append(logits.clone())
    engine.step(frame)
    return seen[0]


def stock(seed=0):
    return small_lm(seed=seed, text_card=CARD).eval()
