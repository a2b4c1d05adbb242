"""Bytes of a memory counted without numbers: to the byte those of the same call with them."""

import pytest
import torch

from finetune.live_bytes import LiveBytes
from finetune.traced import Traced, carried_by, trace
from moshi_ttt.config import TTTConfig
from moshi_ttt.hybrid import hybrid_layers, splice
from moshi_ttt.lora import add_lora
from moshi_ttt.memory import MEMORIES
from tests.small import small_lm

T = 22
OPTIONS = {
    "ttt_mlp": [{"write_every": 3}],
    "lact": [{"stacked": 2, "residual": True, "low_rank": 0, "momentum": False, "muon": False}],
    "atlas": [{"muon": True}, {"deep": False, "window": 1}, {"polynomial": "outer"}],
}
CASES = [(m, more) for m in MEMORIES for more in ({}, *OPTIONS.get(m, []))]


def layer_of(dtype=torch.float32, **config):
    torch.manual_seed(0)
    lm = small_lm().to(dtype)
    add_lora(lm, 4, 2.0)
    splice(lm, TTTConfig(**{"layers": (0,), "chunk_size": 4, "num_heads": 2, **config}))
    (layer,) = hybrid_layers(lm)
    layer.seq_modeling_block.memory.cast_projections(dtype)
    return layer


def counted(layer, rows, dtype):
    """What `trace` says, of tensors that hold numbers."""
    for p in layer.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    shape = rows, T, layer.self_attn.embed_dim
    normed, h = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(2))
    carried = carried_by(layer, rows, T)
    with LiveBytes() as live:
        y = layer._remember(h.clone(), normed, carried)[0]
        kept = live.peak = live.now
        y.backward(torch.ones_like(y))
    return Traced(kept - y.nbytes, live.peak - kept)


def check(rows=2, dtype=torch.float32, **config):
    layer = layer_of(dtype, **config)
    found = trace(layer, rows, T, dtype, moving=True, attended=True, holds=True)
    assert found == counted(layer, rows, dtype)
    return found


@pytest.mark.parametrize(("memory", "more"), CASES)
def test_every_memory_takes_what_is_counted(memory, more):
    assert check(memory=memory, **more).kept > 0


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wherever_it_is_placed(memory, dtype):
    check(1, dtype, memory=memory)
    check(2, dtype, memory=memory, head_dim=24)
    check(2, dtype, memory=memory, projection="shared", placement="after_attention")


@pytest.mark.parametrize(
    "how",
    [{"writing": False}, {"persistent_states": False}, {"state_passing": False},
     {"detach_memory_output": True}],
)  # fmt: skip
def test_ablations(how):
    check(memory="ttt_linear", **how)


def test_more_rows_are_so_many_times_two():
    layer = layer_of(memory="lact")
    two, five = (
        trace(layer, rows, T, torch.float32, moving=True, attended=True, holds=True)
        for rows in (2, 5)
    )
    assert five == Traced(two.kept * 5 // 2, two.extra * 5 // 2)
    real = counted(layer, 5, torch.float32)
    assert five.kept == pytest.approx(real.kept, rel=0.05)
    assert five.extra == pytest.approx(real.extra, rel=0.05)


def test_what_is_not_learnt_takes_less():
    layer = layer_of(memory="ttt_mlp", projection="shared")

    def found(**how):
        return trace(layer, 2, T, torch.float32, **how).kept

    alone = found(moving=False, attended=False, holds=False)
    assert found(moving=True, attended=True, holds=True) < alone
    for p in layer.self_attn.parameters():
        p.requires_grad_(False)
    assert found(moving=False, attended=False, holds=False) < alone


def test_the_model_is_left_as_it_was():
    layer = layer_of(memory="atlas")
    before = {n: (p, p.clone(), p.grad) for n, p in layer.named_parameters()}
    trace(layer, 2, T, torch.float32, moving=True, attended=True, holds=True)
    for name, p in layer.named_parameters():
        assert p is before[name][0]
        assert torch.equal(p, before[name][1])
        assert p.grad is before[name][2] is None
