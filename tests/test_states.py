"""Saving what a memory has learned. Every test first shows that there is something to save."""

import pytest
import torch

import finetune
import moshi_ttt.states as states
from moshi_ttt.config import TTTConfig
from moshi_ttt.hybrid import hybrid_layers, splice
from moshi_ttt.lanes import named_tensors
from moshi_ttt.memory import MEMORIES
from tests.small import randomise_memories, small_lm
from tests.test_hybrid import codes_for

FAMILIES = list(MEMORIES)


def spliced(family="ttt_mlp", **values):
    torch.manual_seed(2)
    lm = small_lm(norm="rms_norm")
    splice(lm, TTTConfig(memory=family, layers="all", chunk_size=5, num_heads=2, **values))
    randomise_memories(lm)
    return lm.double().eval()


def tensors(saved, part):
    return {
        f"{block}.{name}": tensor
        for block, entry in saved.items()
        for name, tensor in (entry[part] or {}).items()
    }


def assert_equal(a, b, part):
    a, b = tensors(a, part), tensors(b, part)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def assert_moved(lm, saved, part):
    """There is something in the state, and it is not W0."""
    found = tensors(saved, part)
    assert found
    for name, block in states.ttt_blocks(lm).items():
        start = block.memory.init_state(1)
        for weight in block.memory.op.WEIGHTS:
            moved = found[f"{name}.fast.{weight}"] - getattr(start.fast, weight).detach()
            assert moved.abs().max() > 1e-6
        assert found[f"{name}.fast.pos"].min() > 0


@torch.no_grad()
def stream(lm, codes):
    return torch.cat([lm.forward_text(codes[..., t : t + 1])[1] for t in range(codes.shape[-1])], 2)


def loss_of(lm, codes):
    out = lm(codes)
    return out.text_logits.square().mean() + out.logits[out.mask].square().mean()


def storage(lm):
    """Address of every tensor of every block's streaming state."""
    return {
        f"{name}.{key}": tensor.data_ptr()
        for name, block in states.ttt_blocks(lm).items()
        for key, tensor in named_tensors(block._streaming_state.memory)
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("frames", [10, 13])
def test_a_stream_is_saved_and_restored_in_place(family, frames):
    lm, codes = spliced(family), codes_for(small_lm(), 2, 40)
    with lm.streaming(2):
        stream(lm, codes[..., :frames])
        saved = states.save_ttt_states(lm)
        assert_moved(lm, saved, "streaming")
        kept = {n: t.clone() for n, t in tensors(saved, "streaming").items()}
        pointers = storage(lm)
        stream(lm, codes[..., frames : frames + 9])
        now = tensors(states.save_ttt_states(lm), "streaming")
        assert any(not torch.equal(now[k], kept[k]) for k in kept)
        assert all(torch.equal(tensors(saved, "streaming")[k], kept[k]) for k in kept)
        states.restore_ttt_states(lm, saved)
        assert_equal(states.save_ttt_states(lm), saved, "streaming")
        after = storage(lm)
        assert after == pointers


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_out_the_restore_changes_the_next_loss(family):
    """Training lanes: evaluate on the side, then go on."""
    losses = {}
    for how in ("undisturbed", "preserved", "disturbed"):
        lm = spliced(family)
        first, side, second = (codes_for(lm, 2, 13, seed) for seed in range(3))
        states.attach_ttt_states(lm, 2)
        loss_of(lm, first)
        assert_moved(lm, states.save_ttt_states(lm), "lanes")
        if how == "preserved":
            with states.preserved_ttt_states(lm):
                loss_of(lm, side)
        elif how == "disturbed":
            loss_of(lm, side)
        losses[how] = loss_of(lm, second).item()
    assert losses["preserved"] == losses["undisturbed"]
    assert losses["disturbed"] != losses["undisturbed"]


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_between_forward_and_backward_is_harmless(family):
    grads = []
    for disturb in (False, True):
        lm = spliced(family)
        states.attach_ttt_states(lm, 2)
        loss_of(lm, codes_for(lm, 2, 13, 0))
        loss = loss_of(lm, codes_for(lm, 2, 13, 1))
        if disturb:
            saved = states.save_ttt_states(lm)
            assert_moved(lm, saved, "lanes")
            loss_of(lm, codes_for(lm, 2, 8, 5))
            states.restore_ttt_states(lm, saved)
        loss.backward()
        grads.append([p.grad for p in lm.parameters()])
    for a, b in zip(*grads, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_restored_when_the_body_raises():
    lm = spliced()
    with lm.streaming(1):
        stream(lm, codes_for(lm, 1, 7))
        before = states.save_ttt_states(lm)
        assert_moved(lm, before, "streaming")
        with pytest.raises(RuntimeError, match="boom"), states.preserved_ttt_states(lm):  # noqa: PT012
            stream(lm, codes_for(lm, 1, 7, 9))
            assert not torch.equal(
                *(tensors(s, "streaming")["transformer.layers.0.seq_modeling_block.fast.k"]
                  for s in (before, states.save_ttt_states(lm)))
            )  # fmt: skip
            raise RuntimeError("boom")
        assert_equal(states.save_ttt_states(lm), before, "streaming")


def test_methods_of_block_layer_and_model_agree():
    lm = spliced()
    states.attach_ttt_states(lm, 1)
    loss_of(lm, codes_for(lm, 1, 8))
    whole = lm.save_ttt_states()
    assert_moved(lm, whole, "lanes")
    layer = next(iter(hybrid_layers(lm)))
    of_layer = layer.save_ttt_states()
    of_block = layer.seq_modeling_block.save_ttt_states()
    assert torch.equal(
        of_layer["seq_modeling_block"]["lanes"]["fast.W1"], of_block["lanes"]["fast.W1"]
    )
    assert_equal(whole, lm.transformer.save_ttt_states() and whole, "lanes")
    loss_of(lm, codes_for(lm, 1, 8, 3))
    lm.restore_ttt_states(whole)
    layer.restore_ttt_states(of_layer)
    layer.seq_modeling_block.restore_ttt_states(of_block)
    assert_equal(lm.save_ttt_states(), whole, "lanes")
    with lm.preserved_ttt_states():
        lm.reset_ttt_states()
    assert_equal(lm.save_ttt_states(), whole, "lanes")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reset_row_equals_a_new_row(family):
    lm = spliced(family)
    codes = codes_for(lm, 2, 30)
    mask = torch.tensor([False, True])
    with lm.streaming(2):
        stream(lm, codes[..., :13])
        saved = states.save_ttt_states(lm)
        assert_moved(lm, saved, "streaming")
        states.reset_ttt_states(lm, mask)
        for name, block in states.ttt_blocks(lm).items():
            now, fresh = block._streaming_state.memory, block.memory.init_state(1)
            assert now.fast.pos.tolist() == [13, 0]
            for field, tensor in now.fast._asdict().items():
                assert torch.equal(tensor[1], getattr(fresh.fast, field)[0])
                assert torch.equal(tensor[0], saved[name]["streaming"][f"fast.{field}"][0])
    # lanes: row 1 starts over and equals a model that never heard the first segment
    first, second = codes[..., :13], codes[..., 13:]
    states.attach_ttt_states(lm, 2)
    lm(first)
    states.reset_ttt_states(lm, mask)
    mixed = lm(second).text_logits
    states.attach_ttt_states(lm, 2)
    fresh = lm(second).text_logits
    assert torch.allclose(mixed[1], fresh[1], atol=1e-12, rtol=0)
    assert (mixed[0] - fresh[0]).abs().max() > 1e-6


def test_a_fresh_row_gives_its_gradient_to_w0():
    lm = spliced(decay=0.0)  # decay towards W0 would give it one in every row
    states.attach_ttt_states(lm, 2)
    loss_of(lm, codes_for(lm, 2, 8))
    w0 = lm.transformer.layers[0].seq_modeling_block.memory.W1
    loss_of(lm, codes_for(lm, 2, 8, 1)).backward()
    assert w0.grad is None or w0.grad.abs().max() == 0
    states.reset_ttt_states(lm, torch.tensor([True, False]))
    loss_of(lm, codes_for(lm, 2, 8, 1)).backward()
    assert w0.grad.abs().max() > 0


def test_without_persistence_every_call_is_fresh_and_nothing_is_saved():
    lm = spliced(persistent_states=False)
    codes = codes_for(lm, 1, 9)
    assert all(v is None for v in states.save_ttt_states(lm).values())
    with pytest.raises(ValueError, match="persistent_states"):
        states.attach_ttt_states(lm, 1)
    first = lm(codes).text_logits
    assert torch.equal(lm(codes).text_logits, first)
    with lm.streaming(1):
        saved = states.save_ttt_states(lm)
        stream(lm, codes)
        assert all(v is None for v in saved.values())
        states.restore_ttt_states(lm, saved)
    with pytest.raises(ValueError, match="persistent_states"):
        states.restore_ttt_states(lm, states.save_ttt_states(spliced()))


def test_refusals_touch_nothing():
    lm = spliced()
    with lm.streaming(2):
        stream(lm, codes_for(lm, 2, 7))
        before = states.save_ttt_states(lm)
        assert_moved(lm, before, "streaming")
        cases = {
            "chunk_size": other_state(2, chunk_size=7),
            "base_lr": other_state(2, base_lr=0.5),
            "shape": other_state(3),
            "not streaming": None,
        }
        for text in ("chunk_size", "base_lr", "shape"):
            with pytest.raises(ValueError, match=text):
                states.restore_ttt_states(lm, cases[text])
        damaged = states.save_ttt_states(lm)
        last = list(damaged)[-1]
        damaged[last]["streaming"].pop("fast.W1")
        with pytest.raises(ValueError, match=r"fast\.W1"):
            states.restore_ttt_states(lm, damaged)
        with pytest.raises(ValueError, match="blocks"):
            states.restore_ttt_states(lm, {"elsewhere": None})
        assert_equal(states.save_ttt_states(lm), before, "streaming")
    with pytest.raises(ValueError, match="not streaming"):
        states.restore_ttt_states(lm, before)
    with pytest.raises(ValueError, match="no memory"):
        states.save_ttt_states(small_lm())


def other_state(rows, **values):
    values = {"chunk_size": 5} | values
    torch.manual_seed(2)
    lm = small_lm(norm="rms_norm")
    splice(lm, TTTConfig(layers="all", num_heads=2, **values))
    lm.double().eval()
    with lm.streaming(rows):
        stream(lm, codes_for(lm, rows, 7))
        return states.save_ttt_states(lm)


def test_finetune_hands_out_the_same_functions():
    for name in finetune.__all__:
        assert getattr(finetune, name) is getattr(states, name)


def test_lanes_of_another_batch_size_are_refused():
    lm = spliced()
    states.attach_ttt_states(lm, 2)
    with pytest.raises(ValueError, match="2 rows"):
        lm(codes_for(lm, 3, 6))
    states.detach_ttt_states(lm)
    lm(codes_for(lm, 3, 6))
