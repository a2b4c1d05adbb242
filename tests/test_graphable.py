"""What a CUDA graph forbids, shown without a GPU: on the meta device nothing can be read.

A tensor there has no data, so `.item()`, `.tolist()` and a branch on a tensor raise, as they would
while a graph is captured; and every operation is watched for a tensor that was made elsewhere.
"""

import dataclasses

import pytest
import torch
from moshi.models.lm import LMGen
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from moshi_ttt.memory import MEMORIES
from moshi_ttt.monitor import StreamMonitor
from moshi_ttt.ops import stream
from moshi_ttt.ops.grid import Grid
from moshi_ttt.states import ttt_blocks
from tests.small import small_hybrid

META = torch.device("meta")
every_memory = pytest.mark.parametrize("family", list(MEMORIES))


class OnlyOnMeta(TorchDispatchMode):
    """Refuse an operation that reads or makes a tensor elsewhere; empty ones are harmless."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            if isinstance(x, torch.Tensor) and x.numel():
                assert x.device.type == "meta", f"{func} has a tensor on {x.device}"
        return out


def on_meta(**config):
    """With two codebooks each way: every other one is the same operations."""
    lm = small_hybrid(lm={"n_q": 4, "dep_q": 2, "delays": [0, 0, 1, 0, 1]}, **config)
    lm.to(torch.bfloat16)
    for block in ttt_blocks(lm).values():
        block.float().memory.cast_projections(torch.bfloat16)
    return lm.to(META)


def stream_two_rows(lm, frames=6, monitored=False):
    gen = LMGen(lm, support_out_of_sync=True)
    ones = torch.ones(2, dtype=torch.bool, device=META)
    with gen.streaming(2), OnlyOnMeta():
        watched = StreamMonitor(lm, 2, 1) if monitored else None
        rings = [] if watched is None else [w.x for w in watched._watches.values()]
        places = [block._streaming_state.memory for block in ttt_blocks(lm).values()]
        for t in range(frames):
            gen.set_exec_mask(ones)
            if t == 3:
                gen.reset_streaming(ones)
            gen.step(torch.zeros(2, 2, 1, dtype=torch.long, device=META))
        for block, place in zip(ttt_blocks(lm).values(), places, strict=True):
            assert block._streaming_state.memory is place
        if watched is not None:
            assert all(w.x is x for w, x in zip(watched._watches.values(), rings, strict=True))


@every_memory
@pytest.mark.parametrize("placement", ["parallel", "after_attention"])
def test_a_streamed_frame_reads_nothing_on_the_host(family, placement):
    """Nor does the monitor that looks on."""
    stream_two_rows(on_meta(memory=family, placement=placement), monitored=True)


@every_memory
def test_a_fresh_state_for_every_frame_reads_nothing_either(family):
    stream_two_rows(on_meta(memory=family, persistent_states=False))


@pytest.mark.parametrize("family", ["ttt_linear", "ttt_mlp"])
def test_a_streamed_frame_whose_chunk_may_not_be_written_reads_nothing_either(family):
    stream_two_rows(on_meta(memory=family, write_every=2))


@pytest.mark.parametrize("decision", ["at_boundary", "writes"])
def test_the_test_can_fail(decision, monkeypatch):
    lm = on_meta(write_every=2)
    monkeypatch.setattr(stream._Masked, decision, lambda self: bool(self.done.any()))
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        stream_two_rows(lm)
    with pytest.raises(AssertionError, match="tensor on cpu"), OnlyOnMeta():
        torch.zeros(1)


@every_memory
@pytest.mark.parametrize("apart", [False, True])
def test_training_makes_every_tensor_on_the_models_device(family, apart, monkeypatch):
    """Host reads are allowed there, of positions and of tau: they get what they would find."""
    of = Grid.of.__func__

    def read_elsewhere(cls, pos, *args):
        with _disable_current_modes():
            here = torch.arange(len(pos)) if apart else torch.zeros(len(pos), dtype=torch.int64)
            grid = of(cls, here, *args)
            moved = {k: v.to(META) for k, v in vars(grid).items() if isinstance(v, torch.Tensor)}
        return dataclasses.replace(grid, **moved)

    lm = on_meta(memory=family, placement="after_attention").train()
    lm.transformer.checkpointing = lm.depformer.checkpointing = True
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: 0.25)
    monkeypatch.setattr(Grid, "of", classmethod(read_elsewhere))
    with OnlyOnMeta():
        out = lm(torch.zeros(2, 5, 10, dtype=torch.long, device=META))
        (out.logits.float().sum() + out.text_logits.float().sum()).backward()
    for name, parameter in lm.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == parameter.dtype, name


def test_streaming_with_a_fresh_state_for_every_frame_is_the_forward_of_each():
    lm = small_hybrid(persistent_states=False)
    block = next(iter(ttt_blocks(lm).values()))
    x = torch.randn(2, 5, 32)
    with torch.no_grad(), lm.streaming(2):
        streamed = torch.cat([block.stream(x[:, t : t + 1]) for t in range(5)], 1)
        alone = [block(x[:, t : t + 1], block.memory.init_state(2))[0] for t in range(5)]
    assert (streamed - torch.cat(alone, 1)).abs().max() < 1e-5
