"""What goes from segment to segment: memory and attention, by value, exactly and row by row."""

import gc
import itertools

import pytest
import torch
from moshi.models.lm import LMModel
from moshi.models.lm_utils import _delay_sequence
from moshi.modules.transformer import StreamingTransformer, StreamingTransformerLayer

from eval.perplexity import score
from moshi_ttt import lanes, states
from moshi_ttt.hybrid import carry_kv, splice, stop_carrying_kv, unsplice
from moshi_ttt.lanes import Lanes
from moshi_ttt.memory import MEMORIES
from moshi_ttt.states import attach_ttt_states, preserved_ttt_states, save_ttt_states
from tests.small import CONTEXT, randomise_memories, small_hybrid, small_lm
from tests.test_hybrid import codes_for

FAMILIES = list(MEMORIES)
FRAMES = 3 * CONTEXT + 5  # attention's window has long been left at the end


def double(**values):
    return small_hybrid(lm={"norm": "rms_norm"}, **values).double()


def sequence_of(lm, codes):
    initial = lm._get_initial_token().expand(len(codes), -1, -1)
    return torch.cat([initial, _delay_sequence(lm.delays, codes, initial)], 2)


def segment(lm, sequence, start, stop):
    """Logits of a piece of a delayed sequence, flat over heads: [B, stop - start, N]."""
    hidden, text = lm.forward_text(sequence[..., start:stop])
    audio = lm.forward_depformer_training(sequence[..., start + 1 : stop + 1], hidden)
    return torch.cat([text, audio.flatten(1, 1)], 1).transpose(1, 2).flatten(2)


def pieces(lm, sequence, cuts):
    edges = itertools.pairwise([0, *cuts, sequence.shape[-1] - 1])
    return torch.cat([segment(lm, sequence, a, b) for a, b in edges], 1)


def loss(y):
    return y.square().mean()


def gradients(lm):
    return {n: p.grad for n, p in lm.named_parameters()}


def assert_close(got, want, tolerance=1e-11):
    assert got.keys() == want.keys()
    assert sum(g is not None and g.abs().max() > 0 for g in want.values()) > 20
    for name, gradient in want.items():
        assert (gradient is None) == (got[name] is None), name
        if gradient is not None:
            bound = tolerance * (1 + gradient.abs().max())
            assert (gradient - got[name]).abs().max() < bound, name


# -- the memory alone ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_two_segments_of_a_memory_equal_one(family):
    """Outputs and state; gradients of the second up to the cut: the first is given as a state."""
    block = double(memory=family).transformer.layers[0].seq_modeling_block
    x = torch.randn(2, 23, 32, dtype=torch.float64)
    whole, end = block(x)
    block._lanes = Lanes(2, 1, torch.device("cpu"))
    parts = []
    for piece in (x[:, :9], x[:, 9:]):
        y, after = block(piece, *block._lanes.enter(2))
        block._lanes.leave(after)
        parts.append(y)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-13
    kept, _ = block._lanes.enter(2)
    found, wanted = (dict(lanes.named_tensors(s)) for s in (kept, end))
    assert all(torch.allclose(found[n], w, rtol=0, atol=1e-13) for n, w in wanted.items())
    assert not any(t.requires_grad for t in found.values())

    # the whole, its graph cut by hand at frame 9
    loss(parts[1]).backward()
    cut = gradients(block)
    block.zero_grad()
    _, state = block(x[:, :9])
    state = lanes.map_tensors(lambda t: t.detach(), state)
    loss(block(x[:, 9:], state)[0]).backward()
    for name, want in gradients(block).items():
        want = torch.zeros_like(cut[name]) if want is None else want  # W0, where only a start
        assert torch.equal(cut[name], want), name
    assert cut["memory.conv_weight"].abs().max() > 0


# -- the whole model -------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_keys_and_values_segments_equal_the_whole_recording(family, checkpointing):
    """Loss, logits and state against one call and against a stream; segments no multiple of C."""
    lm = double(memory=family)
    lm.transformer.checkpointing = checkpointing
    codes = codes_for(lm, 2, FRAMES)
    sequence = sequence_of(lm, codes)
    whole = segment(lm, sequence, 0, FRAMES)
    attach_ttt_states(lm, 2)
    pieces(lm, sequence, [])
    wanted = save_ttt_states(lm)
    carry_kv(lm)
    attach_ttt_states(lm, 2)
    got = pieces(lm, sequence, [7, 18, 37, 38, 57])
    assert (got - whole).abs().max() < 1e-8
    for name, saved in save_ttt_states(lm).items():
        for key, tensor in saved["lanes"].items():
            whole = wanted[name]["lanes"][key]
            assert torch.allclose(tensor, whole, rtol=0, atol=1e-8), key
    lanes.detach_lanes(lm)
    nll = torch.stack([n.values[0] for n in score(lm, list(codes), rows=2, frames_per_call=9)])
    logits = got[..., : lm.text_linear.out_features]
    mine = torch.nn.functional.cross_entropy(logits.mT, codes[:, 0], reduction="none")
    assert (mine - nll).abs().max() < 1e-8


def test_float32_segments_equal_the_whole_recording():
    lm = small_hybrid()
    sequence = sequence_of(lm, codes_for(lm, 2, FRAMES))
    whole = segment(lm, sequence, 0, FRAMES)
    carry_kv(lm)
    attach_ttt_states(lm, 2)
    assert (pieces(lm, sequence, [17, 34, 51]) - whole).abs().max() < 1e-5


def test_without_keys_and_values_the_next_segment_differs():
    """So that the test above can fail; the memory alone is no stand-in for the window."""
    lm = double()
    sequence = sequence_of(lm, codes_for(lm, 2, FRAMES))
    whole = segment(lm, sequence, 0, FRAMES)
    attach_ttt_states(lm, 2)
    got = pieces(lm, sequence, [30])
    assert (got[:, :30] - whole[:, :30]).abs().max() < 1e-8
    assert (got[:, 30:] - whole[:, 30:]).abs().max() > 1e-2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_linked_segments_have_the_gradient_of_one(checkpointing):
    """Through three segments, and after the link the next has none through the edge."""
    lm = double()
    sequence = sequence_of(lm, codes_for(lm, 2, FRAMES))
    loss(segment(lm, sequence, 0, FRAMES)).backward()
    want = gradients(lm)
    lm.zero_grad()
    lm.transformer.checkpointing = checkpointing
    carry_kv(lm)
    attach_ttt_states(lm, 2)
    with lanes.linked_segments(lm):
        loss(pieces(lm, sequence, [19, 45])).backward()
    assert_close(gradients(lm), want, 1e-7)  # moshi's RoPE is float32
    lm.zero_grad()
    w0 = lm.transformer.layers[1].seq_modeling_block.memory.W1
    for value in (v for held in lanes.lanes_of(lm).values() for v in held.values):
        assert not any(t.requires_grad for _, t in lanes.named_tensors(value))
    loss(segment(lm, sequence, 0, 9)).backward()
    assert w0.grad is not None  # decay towards W0 reaches every segment


def test_unlinked_segments_cut_the_gradient_and_recompute_writes_nothing():
    """Two backwards after both forwards, recomputed: as without, and the lanes move once."""
    found = []
    for checkpointing in (False, True):
        lm = double()
        lm.transformer.checkpointing = lm.depformer.checkpointing = checkpointing
        carry_kv(lm)
        attach_ttt_states(lm, 2)
        sequence = sequence_of(lm, codes_for(lm, 2, 41))
        losses = [loss(segment(lm, sequence, a, b)) for a, b in ((0, 23), (23, 41))]
        before = save_ttt_states(lm)
        losses[0].backward()
        losses[1].backward()
        after = save_ttt_states(lm)
        for name, saved in before.items():
            assert all(torch.equal(t, after[name]["lanes"][k]) for k, t in saved["lanes"].items())
            assert saved["lanes"]["fast.pos"].tolist() == [41, 41]
        found.append(gradients(lm))
    assert_close(found[1], found[0])


def test_a_reset_row_equals_a_new_row():
    lm = double()
    carry_kv(lm)
    attach_ttt_states(lm, 2)
    sequence = sequence_of(lm, codes_for(lm, 2, 60))
    segment(lm, sequence, 0, 30)
    lanes.reset_lanes(lm, torch.tensor([False, True]))
    mixed = segment(lm, sequence, 30, 60)
    on = segment(lm, sequence, 30, 60)
    attach_ttt_states(lm, 2)
    new = segment(lm, sequence, 30, 60)
    assert (mixed[1] - new[1]).abs().max() < 1e-12
    assert (mixed[0] - new[0]).abs().max() > 1e-3
    assert (mixed[1] - on[1]).abs().max() > 1e-3


def test_another_history_changes_the_loss():
    """Also beyond the window of attention, where only the memory knows it."""
    lm = double()
    carry_kv(lm)
    one, two = (sequence_of(lm, codes_for(lm, 1, FRAMES, seed)) for seed in (0, 1))
    # the same last window and segment behind another beginning
    two = torch.cat([two[..., : FRAMES - 2 * CONTEXT], one[..., FRAMES - 2 * CONTEXT :]], -1)
    ends = []
    for sequence in (one, two):
        attach_ttt_states(lm, 1)
        ends.append(pieces(lm, sequence, [20, 40])[:, -5:])
    assert (ends[0] - ends[1]).abs().max() > 1e-6


def test_slots_have_lanes_of_their_own():
    lm = double()
    carry_kv(lm)
    sequences = [sequence_of(lm, codes_for(lm, 1, 30, seed)) for seed in range(3)]
    attach_ttt_states(lm, 3)
    together = pieces(lm, torch.cat(sequences), [13])
    wanted = {n: held.tensors() for n, held in lanes.lanes_of(lm).items()}
    attach_ttt_states(lm, 1, slots=3)
    for (a, b), (slot, sequence) in itertools.product([(0, 13), (13, 30)], enumerate(sequences)):
        lanes.use_slot(lm, slot)
        y = segment(lm, sequence, a, b)
        assert (y - together[slot : slot + 1, a:b]).abs().max() < 1e-12
    for name, held in lanes.lanes_of(lm).items():
        tensors = held.tensors()
        assert tensors.pop("fresh").shape == (3, 1)
        for key, tensor in tensors.items():
            assert (tensor - wanted[name][key]).abs().max() < 1e-12, key


def test_lanes_are_saved_and_loaded_on_other_slots_exactly():
    lm = double()
    carry_kv(lm)
    sequence = sequence_of(lm, codes_for(lm, 4, 45))
    attach_ttt_states(lm, 2, slots=2)
    for slot in range(2):
        lanes.use_slot(lm, slot)
        segment(lm, sequence[2 * slot : 2 * slot + 2], 0, 33)
    saved = {n: held.tensors() for n, held in lanes.lanes_of(lm).items()}
    want = []
    for slot in range(2):
        lanes.use_slot(lm, slot)
        want.append(segment(lm, sequence[2 * slot : 2 * slot + 2], 33, 45))
    for rows, slots in ((4, 1), (1, 4)):
        attach_ttt_states(lm, rows, slots)
        for name, module in lanes.lane_holders(lm).items():
            tensors = saved[name] | {"fresh": saved[name]["fresh"].view(slots, rows)}
            module._lanes = Lanes.load(tensors, module.lane_value(), torch.device("cpu"))
        got = []
        for slot in range(slots):
            lanes.use_slot(lm, slot)
            got.append(segment(lm, sequence[rows * slot : rows * (slot + 1)], 33, 45))
        assert (torch.cat(got) - torch.cat(want)).abs().max() < 1e-12


def test_what_happens_on_the_side_leaves_lanes_as_they_were():
    lm = double()
    carry_kv(lm)
    attach_ttt_states(lm, 2)
    sequence = sequence_of(lm, codes_for(lm, 2, 40))
    segment(lm, sequence, 0, 25)
    with preserved_ttt_states(lm):
        segment(lm, sequence, 25, 31)
    got = segment(lm, sequence, 25, 40)
    attach_ttt_states(lm, 2)
    segment(lm, sequence, 0, 25)
    assert torch.equal(got, segment(lm, sequence, 25, 40))


def test_an_inactive_memory_neither_reads_nor_writes():
    lm = double()
    stock = small_lm(norm="rms_norm").double()
    codes = codes_for(lm, 1, 12)
    attach_ttt_states(lm, 1)
    for block in states.ttt_blocks(lm).values():
        block.active = False
    assert torch.equal(lm(codes).text_logits, stock(codes).text_logits)
    assert all(held.values == [None] for held in lanes.lanes_of(lm).values())
    for block in states.ttt_blocks(lm).values():
        block.active = True
    assert not torch.equal(lm(codes).text_logits, stock(codes).text_logits)


def test_a_detached_memory_learns_nothing_but_its_gate():
    """What the ablation breaks."""
    lm = double(detach_memory_output=True)
    loss(segment(lm, sequence_of(lm, codes_for(lm, 1, 12)), 0, 12)).backward()
    block = lm.transformer.layers[0].seq_modeling_block
    assert [n for n, p in block.named_parameters() if p.grad is not None] == ["gate"]
    assert block.gate.grad.abs().max() > 0


def test_keys_and_values_are_let_go_without_a_collection():
    """A GPU's memory is no reason for Python to look for cycles."""
    lm = small_lm()
    carry_kv(lm)
    lanes.attach_lanes(lm, 2)
    sequence = sequence_of(lm, codes_for(lm, 2, 60))
    gc.collect()
    gc.disable()
    try:
        for start in range(0, 60, 10):
            loss(segment(lm, sequence, start, start + 10)).backward()
        alive = sum(type(x).__name__ == "_Prefix" for x in gc.get_objects())
    finally:
        gc.enable()
    assert alive == 0


def test_keys_and_values_are_copied_only_where_a_row_starts_anew():
    lm = small_lm()
    carry_kv(lm)
    lanes.attach_lanes(lm, 2)
    layer, x = lm.transformer.layers[0], torch.zeros(2, 1, 32)
    segment(lm, sequence_of(lm, codes_for(lm, 2, 30)), 0, 25)
    held = layer._lanes.values[0]
    assert layer._enter(x).kv is held
    lanes.reset_lanes(lm, torch.tensor([False, True]))
    entered = layer._enter(x).kv
    assert torch.equal(entered.k[0], held.k[0])
    assert (entered.k[1] == 0).all()
    assert entered.pos.tolist() == [25, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_lane_that_starts_anew_forgets_numbers_that_are_none(bad):
    lm = double()
    carry_kv(lm)
    attach_ttt_states(lm, 2)
    sequence = sequence_of(lm, codes_for(lm, 2, 40))
    segment(lm, sequence, 0, 25)
    for held in lanes.lanes_of(lm).values():
        for name, tensor in lanes.named_tensors(held.values[0]):
            if not name.endswith("pos"):
                tensor[1] = bad
    lanes.reset_lanes(lm, torch.tensor([False, True]))
    got = segment(lm, sequence, 25, 40)
    assert got.isfinite().all()
    attach_ttt_states(lm, 2)
    assert (got[1] - segment(lm, sequence, 25, 40)[1]).abs().max() < 1e-12


# -- keys and values on any Moshi ------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_stock_moshi_carries_keys_and_values_too(checkpointing):
    lm = small_lm(norm="rms_norm").double()
    sequence = sequence_of(lm, codes_for(lm, 2, FRAMES))
    whole = segment(lm, sequence, 0, FRAMES)
    loss(whole[:, 45:]).backward()
    names = {n for n, p in lm.named_parameters() if p.grad is not None}
    lm.zero_grad()
    keys = set(lm.state_dict())
    bytes_ = carry_kv(lm)
    assert bytes_ == 2 * 2 * (CONTEXT - 1) * 32 * 8  # layers, k and v, frames, width, float64
    assert set(lm.state_dict()) == keys
    assert type(lm) is LMModel
    lm.transformer.checkpointing = checkpointing
    lanes.attach_lanes(lm, 2)
    got = pieces(lm, sequence, [11, 45])
    assert (got - whole).abs().max() < 1e-8
    loss(got[:, 45:]).backward()
    assert {n for n, p in lm.named_parameters() if p.grad is not None} == names
    stop_carrying_kv(lm)
    assert type(lm.transformer) is StreamingTransformer
    assert {type(layer) for layer in lm.transformer.layers} == {StreamingTransformerLayer}
    assert torch.equal(segment(lm, sequence, 0, FRAMES), whole)


def test_carrying_leaves_streams_and_unspliced_models_stock():
    lm, stock = small_lm(), small_lm()
    codes = codes_for(lm, 1, 30)
    from moshi_ttt.config import TTTConfig

    splice(lm, TTTConfig(layers=(1,), num_heads=2))
    randomise_memories(lm)
    before = score(lm, list(codes))[0].values
    carry_kv(lm)
    lanes.attach_lanes(lm, 1)
    assert torch.equal(score(lm, list(codes))[0].values.nan_to_num(), before.nan_to_num())
    unsplice(lm)
    assert {type(layer) for layer in lm.transformer.layers} == {StreamingTransformerLayer}
    assert torch.equal(lm(codes).text_logits, stock(codes).text_logits)


def test_without_a_window_there_is_nothing_to_carry():
    lm = small_lm(context=None)
    with pytest.raises(ValueError, match="context is null"):
        carry_kv(lm)
    assert {type(layer) for layer in lm.transformer.layers} == {StreamingTransformerLayer}
