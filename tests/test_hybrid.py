"""Splice: gate 0 is stock Moshi, streaming is training, checkpointing keeps gradients."""

import functools

import pytest
import torch
from moshi.models.lm import LMGen, LMModel
from moshi.modules.transformer import StreamingTransformer, StreamingTransformerLayer

from moshi_ttt.config import TTTConfig
from moshi_ttt.hybrid import (
    HybridLMModel,
    HybridStreamingTransformer,
    HybridStreamingTransformerLayer,
    hybrid_layers,
    splice,
    unsplice,
)
from moshi_ttt.lora import add_lora
from moshi_ttt.memory import MEMORIES
from moshi_ttt.ring import widen_kv_rings
from moshi_ttt.states import attach_ttt_states, save_ttt_states
from tests.small import randomise_memories, small_lm

FAMILIES = list(MEMORIES)
PLACES = [
    {"placement": placement, "projection": projection}
    for placement in ("parallel", "after_attention")
    for projection in ("own", "shared")
]
every_place = pytest.mark.parametrize("place", PLACES, ids=lambda p: "-".join(p.values()))


def config(**values):
    return TTTConfig(**({"layers": "all", "chunk_size": 5, "num_heads": 2} | values))


def codes_for(lm, batch, frames, seed=0):
    g = torch.Generator().manual_seed(seed)
    audio = torch.randint(0, lm.card, (batch, lm.n_q, frames), generator=g)
    text = torch.randint(4, lm.text_card, (batch, 1, frames), generator=g)
    return torch.cat([text, audio], 1)


def spliced(family="ttt_mlp", dtype=torch.float64, norm="rms_norm", **values):
    lm = small_lm(norm=norm)
    splice(lm, config(memory=family, **values))
    randomise_memories(lm)
    return lm.to(dtype).eval()


@torch.no_grad()
def hidden_in_pieces(lm, sequence, sizes):
    """Temporal transformer in streaming form, `sizes` frames a call."""
    out = []
    with lm.streaming(sequence.shape[0]):
        widen_kv_rings(lm.transformer, max(sizes))
        at = 0
        for size in sizes:
            out.append(lm.forward_text(sequence[..., at : at + size])[0])
            at += size
    return torch.cat(out, 1)


# -- gate 0 ---------------------------------------------------------------------------------------


def without_memory(dtype):
    """In float32 with a LoRA that does something."""
    torch.manual_seed(1)
    lm = small_lm(norm="rms_norm_f32").to(dtype).eval()
    if dtype == torch.float32:
        add_lora(lm, 4, 2.0)
        for name, p in lm.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
    return lm


@torch.no_grad()
def all_it_says(lm):
    """Logits of a forward, hidden states of a stream, and sampled tokens."""
    codes = codes_for(lm, 2, 32)  # the ring of 20 frames wraps
    out = lm(codes)
    hidden = hidden_in_pieces(lm, codes[..., :23], [1] * 23)
    torch.manual_seed(7)
    gen = LMGen(lm)
    with gen.streaming(2):
        steps = [gen.step(codes[:, 9:, t : t + 1]) for t in range(12)]
    tokens = torch.cat([s for s in steps if s is not None], -1)
    return out.text_logits, out.logits[out.mask], hidden, tokens


@functools.cache
def stock_says(dtype):
    return all_it_says(without_memory(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_place
@pytest.mark.parametrize("family", FAMILIES)
def test_gate_zero_is_stock_to_the_bit(dtype, place, family):
    lm = without_memory(dtype)
    splice(lm, config(memory=family, **place))
    for wanted, got in zip(stock_says(dtype), all_it_says(lm), strict=True):
        assert torch.equal(wanted, got)


def test_the_gate_zero_test_can_fail():
    stock, lm = small_lm().eval(), small_lm().eval()
    lm.load_state_dict(stock.state_dict())
    splice(lm, config())
    randomise_memories(lm)
    codes = codes_for(lm, 1, 20)
    assert (stock(codes).text_logits - lm(codes).text_logits).abs().max() > 1e-3


# -- what splice does and refuses -----------------------------------------------------------------


def test_splice_says_what_it_did_and_unsplice_undoes_it():
    lm = small_lm().eval()
    keys, codes = set(lm.state_dict()), codes_for(lm, 1, 20)
    before = lm(codes).text_logits
    done = splice(lm, config(layers=[1]))
    assert done.layers == [1]
    assert isinstance(lm, HybridLMModel)
    assert isinstance(lm.transformer, HybridStreamingTransformer)
    assert isinstance(lm.transformer.layers[1], HybridStreamingTransformerLayer)
    assert type(lm.transformer.layers[0]) is StreamingTransformerLayer
    new = set(lm.state_dict()) - keys
    assert keys <= set(lm.state_dict())
    assert all(k.startswith("transformer.layers.1.seq_modeling_block.") for k in new)
    assert done.parameters == sum(lm.state_dict()[k].numel() for k in new)
    randomise_memories(lm)
    assert not torch.equal(lm(codes).text_logits, before)
    unsplice(lm)
    assert type(lm) is LMModel
    assert type(lm.transformer) is StreamingTransformer
    assert {type(x) for x in lm.transformer.layers} == {StreamingTransformerLayer}
    assert set(lm.state_dict()) == keys
    assert torch.equal(lm(codes).text_logits, before)
    with lm.streaming(1):
        lm.forward_text(codes[..., :1])


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"layers": [0, 9]}, "layer 9 is out of range"),
        ({"layers": "every:7"}, "matches none"),
        ({"layers": []}, "empty"),
        ({"layers": [1, 1]}, "twice"),
        ({"layers": "most"}, "most"),
        ({"num_heads": 5}, "5"),
        ({"layers": 5}, "layers 5 is not 'all'"),
        ({"memory": ["lact"]}, "memory .* is unknown"),
        ({"projection": None}, "projection None is unknown"),
        ({"state_passing": "no"}, "state_passing must be true or false, got 'no'"),
        ({"persistent_states": 0}, "persistent_states must be true or false, got 0"),
        ({"decay": "0.1"}, "decay must be a number, got '0.1'"),
        ({"base_lr": float("inf")}, "base_lr must be a number, got inf"),
        ({"base_lr": True}, "base_lr must be a number, got True"),
    ],
)
def test_a_bad_configuration_leaves_the_model_alone(values, text):
    lm = small_lm()
    keys = set(lm.state_dict())
    with pytest.raises(ValueError, match=text):
        splice(lm, config(**values))
    assert type(lm) is LMModel
    assert set(lm.state_dict()) == keys


def test_streaming_and_spliced_models_are_refused():
    lm = small_lm().eval()
    with lm.streaming(1), pytest.raises(ValueError, match="streaming"):
        splice(lm, config())
    assert type(lm) is LMModel
    splice(lm, config())
    with pytest.raises(ValueError, match="already"):
        splice(lm, config())
    with lm.streaming(1), pytest.raises(ValueError, match="streaming"):
        unsplice(lm)
    unsplice(lm)
    with pytest.raises(ValueError, match="no memory"):
        unsplice(lm)


def test_splicing_after_a_stream_starts_the_memory_too():
    lm = small_lm().eval()
    codes = codes_for(lm, 1, 4)
    with lm.streaming(1), torch.no_grad():
        lm.forward_text(codes[..., :1])
    splice(lm, config())
    with lm.streaming(1), torch.no_grad():
        for t in range(4):
            lm.forward_text(codes[..., t : t + 1])
        saved = save_ttt_states(lm)
    assert all(block["streaming"]["fast.pos"].item() == 4 for block in saved.values())


def test_norm_of_after_attention_starts_as_norm1():
    lm = small_lm()
    torch.nn.init.normal_(lm.transformer.layers[0].norm1.alpha)
    splice(lm, config(placement="after_attention"))
    layer = lm.transformer.layers[0]
    assert torch.equal(layer.seq_modeling_block.norm.alpha, layer.norm1.alpha)


# -- streaming is training ------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "tolerance", "place"),
    [*((torch.float64, 1e-8, place) for place in PLACES), (torch.float32, 1e-5, PLACES[0])],
    ids=str,
)
def test_streams_of_any_pieces_equal_the_offline_forward(family, dtype, tolerance, place):
    lm = spliced(family, dtype, **place)
    frames = 2 * lm.context + 7
    sequence = codes_for(lm, 2, frames)
    with torch.no_grad():
        whole = lm.forward_text(sequence)[0]
    cuts = [1] * 5 + [2, 9, 1, 6]
    sizes = cuts + [11] * ((frames - sum(cuts)) // 11)
    sizes.append(frames - sum(sizes))
    for pieces in ([1] * frames, [s for s in sizes if s]):
        got = hidden_in_pieces(lm, sequence, pieces)
        assert (got - whole).abs().max() < tolerance


@pytest.mark.parametrize("projection", ["own", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lmgen_rows_out_of_step_equal_the_offline_forward(family, projection):
    """B = 3 through LMGen, rows paused at random and one reset on the way, teacher-forced."""
    lm = spliced(family, projection=projection)
    B, frames = 3, 45
    codes = codes_for(lm, B, frames)
    delayed = lm_inputs(lm, codes)
    with torch.no_grad():
        want = lm.forward_text(delayed)[0]
    g = torch.Generator().manual_seed(3)
    seen = []
    gen = LMGen(lm, support_out_of_sync=True)
    at = torch.zeros(B, dtype=torch.long)
    got = torch.full((B, frames, lm.dim), float("nan"), dtype=torch.float64)
    did_reset = False
    with gen.streaming(B):
        while int(at.min()) < frames:
            mask = (torch.rand(B, generator=g) < 0.7) & (at < frames)
            if not did_reset and int(at[1]) == 13:
                row = torch.tensor([False, True, False])
                gen.reset_streaming(row)
                at[1], did_reset = 0, True
            gen.set_exec_mask(mask)
            # step s reads the user's codes of frame s - 1; what is given at step 0 is never read
            given = codes[torch.arange(B), 9:, (at - 1).clamp(0, frames - 1)][..., None]
            force_own_tokens(gen, codes, at)
            out = gen._step(given)
            hidden = out[1][:, 0]
            for b in range(B):
                if mask[b]:
                    got[b, at[b]] = hidden[b]
            at = torch.where(mask, at + 1, at)
            seen.append(mask)
    assert did_reset
    assert torch.stack(seen).float().mean() < 0.95
    assert (got - want).abs().max() < 1e-8


def lm_inputs(lm, codes):
    from moshi.models.lm_utils import _delay_sequence

    initial = lm._get_initial_token().expand(codes.shape[0], -1, -1)
    return torch.cat([initial, _delay_sequence(lm.delays, codes, initial)], 2)[..., :-1]


def force_own_tokens(gen, codes, at):
    """Overwrite what was sampled with the recording's tokens, as in training."""
    state = gen._streaming_state
    cache, size = state.cache, state.cache.shape[2]
    lm = gen.lm_model
    for b in range(cache.shape[0]):
        step = int(at[b])
        for k in range(lm.dep_q + 1):
            source = step - 1 - lm.delays[k]
            if source >= 0:
                cache[b, k, step % size] = codes[b, k, source]


# -- projections ----------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["parallel", "after_attention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_projections_are_the_attentions_own(family, placement):
    """A memory whose own matrices are copies of the attention's computes the same."""
    shared, own = (spliced(family, placement=placement, projection=p) for p in ("shared", "own"))
    copied = 0
    for a, b in zip(hybrid_layers(shared), hybrid_layers(own), strict=True):
        lacks, extra = b.seq_modeling_block.load_state_dict(
            a.seq_modeling_block.state_dict(), strict=False
        )
        assert set(lacks) == {"memory.qkv_proj.weight", "memory.o_proj.weight"}
        assert not extra
        with torch.no_grad():
            memory, attention = b.seq_modeling_block.memory, a.self_attn
            memory.qkv_proj.weight.copy_(attention.in_projs[0].weight)
            memory.o_proj.weight.copy_(attention.out_projs[0].weight)
        copied += memory.qkv_proj.weight.numel() + memory.o_proj.weight.numel()
    codes = codes_for(own, 2, 30)
    want, got = own(codes).text_logits, shared(codes).text_logits
    assert (want - got).abs().max() < 1e-12
    sizes = [sum(p.numel() for p in lm.parameters()) for lm in (own, shared)]
    assert sizes[0] - sizes[1] == copied == 2 * 4 * own.dim**2


def test_shared_projections_learn_through_their_lora():
    lm = small_lm(norm="rms_norm").eval()
    add_lora(lm, 4, 2.0)
    splice(lm, config(projection="shared"))
    randomise_memories(lm)
    layer = next(hybrid_layers(lm))
    keys = layer.self_attn.in_projs[0].lora_B.weight
    with torch.no_grad():
        keys.normal_(std=0.1)
    x = torch.randn(1, 12, lm.dim)
    y, _ = layer._remember(torch.zeros_like(x), x, layer._enter(x))
    (slope,) = torch.autograd.grad(y.square().sum(), keys)
    assert slope.abs().min() > 0


def test_projections_that_cannot_be_shared_are_refused():
    lm = small_lm(kv_repeat=2)
    with pytest.raises(ValueError, match="layer 0: its attention has no q, k, v of one width"):
        splice(lm, config(projection="shared"))
    assert type(lm) is LMModel
    with pytest.raises(ValueError, match="head_dim is 8, but projection 'shared'"):
        config(projection="shared", head_dim=8)


# -- gradient checkpointing and lanes --------------------------------------------------------------


@pytest.mark.parametrize("projection", ["own", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lanes", [False, True])
def test_checkpointing_gives_the_same_gradients(family, lanes, projection):
    """Also with lanes: two segments, both backwards after the second forward."""
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(4)
        lm = spliced(family, projection=projection)
        lm.transformer.checkpointing = checkpointing
        lm.depformer.checkpointing = checkpointing
        lm.train()
        if lanes:
            attach_ttt_states(lm, 2)
        losses = []
        for seed in range(2):
            out = lm(codes_for(lm, 2, 23, seed))
            losses.append(out.text_logits.square().mean() + out.logits[out.mask].square().mean())
        sum(losses).backward()
        grads.append({n: p.grad for n, p in lm.named_parameters()})
    assert any(
        g is not None and g.abs().max() > 0 for n, g in grads[0].items() if n.endswith(("W1", "Wo"))
    )
    for name, want in grads[0].items():
        got = grads[1][name]
        assert (want is None) == (got is None), name
        if want is not None:
            assert (want - got).abs().max() <= 1e-12 * (1 + want.abs().max()), name


def test_outside_the_gradient_nothing_is_checkpointed_and_results_agree():
    lm = spliced()
    codes = codes_for(lm, 1, 12)
    want = lm(codes).text_logits
    lm.transformer.checkpointing = True
    with torch.no_grad():
        assert torch.equal(lm(codes).text_logits, want)
    assert lm.transformer.checkpointing


def test_a_chunk_that_attention_forgets_before_it_is_written_is_refused():
    lm = small_lm()
    with pytest.raises(ValueError, match="chunk_size 21 is above layer 0's attention window of 20"):
        splice(lm, config(memory="lact", chunk_size=21))
    assert type(lm) is LMModel
    splice(lm, config(memory="lact", chunk_size=20))
    splice(small_lm(), config(memory="ttt_mlp", chunk_size=21))  # it reads its own chunk
    splice(small_lm(context=None), config(memory="lact", chunk_size=21))
