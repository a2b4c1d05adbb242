"""A model in training, and all of it that an evaluation must leave alone."""

import random

import numpy as np
import torch

from moshi_ttt.hybrid import HybridLMModel, carry_kv
from moshi_ttt.lanes import attach_lanes, lanes_of
from moshi_ttt.states import ttt_blocks
from tests.eval.tiny_lm import make_codes, make_lm


def in_training(memory="ttt_mlp"):
    """A model with two lanes that hold something, in mixed modes."""
    lm = make_lm(memory)
    carry_kv(lm)
    attach_lanes(lm, 2)
    lm.train()
    lm.out_norm.eval()
    lm(make_codes(9, batch=2, holes=False))
    return lm


def facts(lm):
    """Everything that scoring must leave alone, by name."""
    found = {f"weight {n}": t.clone() for n, t in lm.state_dict().items()}
    found |= {f"mode {n}": m.training for n, m in lm.named_modules()}
    found |= {f"gradient {n}": p.grad is None for n, p in lm.named_parameters()}
    found |= {
        f"streaming {n}": getattr(m, "_streaming_state", None) is None
        for n, m in lm.named_modules()
    }
    for name, lanes in lanes_of(lm).items():
        found |= {f"lanes {name} {n}": t for n, t in lanes.tensors().items()}
        found |= {f"lanes {name} slot": (lanes.slot, lanes.linked, lanes.batch_size)}
    if isinstance(lm, HybridLMModel):
        found |= {f"rate {n}": b.memory.lr_scale for n, b in ttt_blocks(lm).items()}
    else:  # beartype, which checks shapes under pytest only, draws from it in a memory's ops
        found["python"] = random.getstate()
    found["torch"] = torch.get_rng_state()
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 (the global one is what is meant)
    return found | {"numpy": torch.from_numpy(keys.astype(np.int64)), "numpy at": (name, rest)}


def assert_untouched(before, after):
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if torch.is_tensor(value) else value == after[name]
        assert same, name
