"""What the tests of the monitor have in common."""

import pytest
import torch

from moshi_ttt.lanes import attach_lanes
from moshi_ttt.memory import MEMORIES
from moshi_ttt.states import save_ttt_states, ttt_blocks
from tests.small import small_hybrid

every_memory = pytest.mark.parametrize("family", list(MEMORIES))
MORE = {"ttt_mlp": {"write_every": 2}, "atlas": {"muon": True}, "lact": {"stacked": 2}}
LAYER = "transformer.layers.1"


def hybrid(family, **more):
    return small_hybrid(memory=family, **(MORE.get(family, {}) | more))


def one_memory(family, seed=0, **more):
    lm = hybrid(family, **more)
    memory = next(iter(ttt_blocks(lm).values())).memory
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 20, memory.width, generator=generator)
    return memory, x


def norm(tensors):
    return torch.stack([t.flatten(2).square().sum(-1) for t in tensors]).sum(0).sqrt()


def train_call(lm, codes, watching=None):
    """Two micro-batches on lanes, forward and backward: outputs, gradients, states."""
    attach_lanes(lm, len(codes))
    lm.train()
    outs = []
    for piece in codes.split(10, -1):
        out = lm(piece)
        outs.append(out.text_logits.detach())
        out.text_logits.float().square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}
    return outs, gradients, save_ttt_states(lm)
