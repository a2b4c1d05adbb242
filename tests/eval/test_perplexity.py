import pytest
import torch
import torch.nn.functional as F

from eval.perplexity import score, writing_off
from moshi_ttt.ring import widen_kv_rings
from moshi_ttt.states import (
    attach_ttt_states,
    reset_ttt_states,
    save_ttt_states,
    ttt_blocks,
)
from tests.eval.tiny_lm import CONTEXT, make_codes, make_lm


def forward_nll(lm, codes):
    """The NLL of `LMModel.forward`, NaN outside its masks."""
    with torch.no_grad():
        out = lm(codes)
    rows = []
    for k in range(9):
        row_logits = out.text_logits[:, 0] if k == 0 else out.logits[:, k - 1]
        mask = out.text_mask[:, 0] if k == 0 else out.mask[:, k - 1]
        row = torch.full(mask.shape, float("nan"), dtype=row_logits.dtype)
        row[mask] = F.cross_entropy(row_logits[mask], codes[:, k][mask], reduction="none")
        rows.append(row)
    return torch.stack(rows, 1)


def assert_same(a, b, tolerance=1e-8):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance, equal_nan=True)


@pytest.fixture
def lm():
    return make_lm()


@pytest.mark.parametrize("memory", [None, "ttt_linear", "ttt_mlp"])
@pytest.mark.parametrize("frames_per_call", [1, 7, 32])
def test_score_is_forward(memory, frames_per_call):
    lm, codes = make_lm(memory), make_codes(5 * CONTEXT + 3, batch=2)
    wanted = forward_nll(lm, codes)
    got = score(lm, codes, frames_per_call=frames_per_call)
    assert got.values.dtype == torch.float64
    assert got.values.shape == (2, 9, codes.shape[-1])
    assert_same(got.values, wanted)
    assert torch.isnan(got.values[:, 2:, -1]).all()  # cut off by the delays
    assert torch.isnan(got.values[:, 3, 2]).all()  # no code there
    assert torch.isfinite(got.values[:, :2]).all()


def test_memory_is_written_and_matters(lm):
    codes = make_codes(4 * CONTEXT)
    kept = score(lm, codes)
    with writing_off(lm):
        off = score(lm, codes)
    assert (kept.values - off.values).nan_to_num().abs().max() > 1e-3
    assert all(moved[-1] > 0.01 for moved in kept.state_moved.values())
    assert all(block.memory.lr_scale == 1.0 for block in ttt_blocks(lm).values())
    assert_same(score(lm, codes).values, kept.values, 0)


def fail_with_writing_off(lm):
    with writing_off(lm):
        assert all(block.memory.lr_scale == 0.0 for block in ttt_blocks(lm).values())
        raise RuntimeError("inside")


def test_writing_off_comes_back_after_an_error(lm):
    with pytest.raises(RuntimeError, match="inside"):
        fail_with_writing_off(lm)
    assert all(block.memory.lr_scale == 1.0 for block in ttt_blocks(lm).values())


def test_rows_of_different_lengths_are_scored_as_alone(lm):
    lengths = torch.tensor([29, 12, 40])
    codes = make_codes(40, batch=3)
    for row, length in enumerate(lengths):
        codes[row, :, length:] = -1
    together = score(lm, codes, lengths, frames_per_call=7).values
    for row, length in enumerate(lengths):
        alone = score(lm, codes[row : row + 1, :, :length], frames_per_call=7).values
        assert_same(together[row : row + 1, :, :length], alone)
        assert torch.isnan(together[row, :, length:]).all()


@pytest.mark.parametrize("frames_per_call", [1, 5, 32])
def test_reset_every_is_a_reset_between_frames(lm, frames_per_call):
    codes, every = make_codes(37), 10
    got = score(lm, codes, frames_per_call=frames_per_call, reset_every=every)

    delayed = codes.clone()
    for k, delay in enumerate(lm.delays):
        delayed[:, k] = codes[:, k].roll(delay, dims=-1)
        delayed[:, k, :delay] = 24
    start = torch.tensor([40] + [24] * 16).view(1, 17, 1)
    frames = torch.cat([start, delayed], -1)
    nll = torch.full((9, 37), float("nan"), dtype=torch.float64)
    with torch.no_grad(), lm.streaming(1):
        widen_kv_rings(lm.transformer, 1)
        for t in range(37):
            if t in (10, 20, 30):
                reset_ttt_states(lm)
            hidden, text = lm.forward_text(frames[:, :, t : t + 1])
            after = frames[:, :, t + 1 : t + 2]
            audio = lm.forward_depformer_training(after, hidden)
            for k in range(9):
                target, at = after[0, k, 0], t - lm.delays[k]
                if at >= 0 and target >= 0:
                    logits = text[0, 0, 0] if k == 0 else audio[0, k - 1, 0]
                    nll[k, at] = -logits.log_softmax(-1)[target]
    assert_same(got.values[0], nll)
    assert_same(got.values[..., :9], score(lm, codes).values[..., :9])
    assert (got.values - score(lm, codes).values).nan_to_num().abs().max() > 1e-3


def test_scoring_leaves_no_trace(lm):
    attach_ttt_states(lm, 2)
    lm.train()
    lm.out_norm.eval()
    lm(make_codes(9, batch=2, holes=False))
    before, modes = save_ttt_states(lm), [m.training for m in lm.modules()]
    blocks = ttt_blocks(lm)
    assert all(len(saved["lanes"]) > 1 for saved in before.values())
    rng = torch.get_rng_state()
    score(lm, make_codes(20), reset_every=8)
    assert torch.equal(rng, torch.get_rng_state())
    assert modes == [m.training for m in lm.modules()]
    after = save_ttt_states(lm)
    for name in blocks:
        assert after[name]["streaming"] is None
        for key, tensor in before[name]["lanes"].items():
            assert torch.equal(tensor, after[name]["lanes"][key]), key
    assert all(p.grad is None for p in lm.parameters())


def test_an_error_in_the_middle_leaves_things_as_before(lm, monkeypatch):
    attach_ttt_states(lm, 2)
    lm.train()
    lm(make_codes(9, batch=2, holes=False))
    before = save_ttt_states(lm)
    calls = []

    def broken(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("device lost")
        return type(lm).forward_depformer_training(lm, *args)

    with monkeypatch.context() as patch:
        patch.setattr(lm, "forward_depformer_training", broken)
        with pytest.raises(RuntimeError, match="device lost"):
            score(lm, make_codes(20), frames_per_call=5, reset_every=4)
    assert lm.training
    assert not lm.transformer.is_streaming
    after = save_ttt_states(lm)
    for name, saved in before.items():
        for key, tensor in saved["lanes"].items():
            assert torch.equal(tensor, after[name]["lanes"][key]), key


def test_float32_stays_near_forward():
    lm, codes = make_lm(dtype=torch.float32), make_codes(5 * CONTEXT)
    got = score(lm, codes, frames_per_call=7).values
    assert got.dtype == torch.float32
    assert_same(got, forward_nll(lm, codes), 1e-4)


def test_a_wrong_call_is_refused(lm):
    codes = make_codes(10)
    with pytest.raises(ValueError, match=r"codes must be \[B, 17, T\], got \[1, 9, 10\]"):
        score(lm, codes[:, :9])
    with pytest.raises(ValueError, match="row 5 of the codes holds 24: -1 to 23"):
        score(lm, codes.clone().index_fill_(1, torch.tensor(5), 24))
    with pytest.raises(ValueError, match="lengths must be 1 to 10"):
        score(lm, codes, torch.tensor([11]))
    with pytest.raises(ValueError, match="frames_per_call must be at least 1, got 0"):
        score(lm, codes, frames_per_call=0)
    with pytest.raises(ValueError, match="no memory to reset"):
        score(make_lm(None), codes, reset_every=4)
    with lm.streaming(1), pytest.raises(ValueError, match="is streaming"):
        score(lm, codes)


def test_an_nll_that_is_not_finite_is_an_error(lm):
    with torch.no_grad():
        lm.linears[2].weight[:] = float("inf")
    with pytest.raises(FloatingPointError, match=r"row 0, codebook 3 .* frame 0 is nan"):
        score(lm, make_codes(10, holes=False))
