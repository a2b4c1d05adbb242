"""A tiny model with nothing at its neutral value, and codes for it."""

import torch

from moshi_ttt.config import TTTConfig
from moshi_ttt.hybrid import splice
from tests.small import randomise_memories, small_lm

CONTEXT = 8


def make_codes(frames, batch=1, seed=1, *, holes=True):
    gen = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 24, (batch, 17, frames), generator=gen)
    codes[:, 0] = torch.randint(0, 40, (batch, frames), generator=gen)
    if holes:
        codes[:, 3, 2] = -1
    return codes


def make_recordings(*lengths, seed=1):
    """Codes [17, T] of each length, all different, some with a hole."""
    return [
        make_codes(frames, seed=seed + i, holes=frames > 2 and i % 2 == 0)[0]
        for i, frames in enumerate(lengths)
    ]


def make_lm(memory="ttt_mlp", *, dtype=torch.float64, seed=0, lm=None, **config):
    """A tiny Moshi in which nothing is at its neutral value; `memory=None` is a stock one."""
    # rms_norm_f32 rounds to float32, and may round a difference away
    sizes = {"norm": "rms_norm", "card": 24, "text_card": 40, "context": CONTEXT} | (lm or {})
    lm = small_lm(seed=seed, **sizes).eval()
    if memory is not None:
        config = {"layers": "all", "chunk_size": 4, "num_heads": 2} | config
        splice(lm, TTTConfig(memory=memory, **config))
        randomise_memories(lm, seed=seed)
    return lm.to(dtype)
