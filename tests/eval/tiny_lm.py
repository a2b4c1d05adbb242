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


def make_lm(memory="ttt_mlp", *, dtype=torch.float64, seed=0, **config):
    """A tiny Moshi in which nothing is at its neutral value; `memory=None` is a stock one."""
    # rms_norm_f32 rounds to float32, and may round a difference away
    lm = small_lm(seed=seed, norm="rms_norm", card=24, text_card=40, context=CONTEXT).eval()
    if memory is not None:
        splice(lm, TTTConfig(memory=memory, layers="all", chunk_size=4, num_heads=2, **config))
        randomise_memories(lm, seed=seed)
    return lm.to(dtype)
