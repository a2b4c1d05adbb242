"""One optimizer step: micro-batches, missing text, non-finite values, the states it leaves."""

import math

import pytest
import torch

from finetune.loss import loss_sums
from finetune.optim import Group, MasterAdamW
from finetune.step import NonFiniteError, memory_metrics, state_norms, train_step
from moshi_ttt.states import attach_ttt_states, detach_ttt_states, save_ttt_states, ttt_blocks
from tests.finetune.test_loss import FRAMES, WEIGHTS, batch, segment
from tests.small import small_hybrid, small_lm

ROWS = [segment(0), segment(1, frames=6), segment(2, text=False), segment(3, frames=3)]
CUTS = {
    "1x4": [batch(*ROWS)],
    "4x1": [batch(row) for row in ROWS],
    "2x2": [batch(*ROWS[:2]), batch(*ROWS[2:])],
}


class Recording(MasterAdamW):
    """AdamW that keeps the gradients it was given."""

    def __init__(self, lm, lr=1e-3):
        self.names = {id(p): n for n, p in lm.named_parameters()}
        super().__init__([Group("all", lr, 0.0, list(lm.parameters()))], (0.9, 0.95))

    def step(self, max_norm):
        grads = {self.names[id(p)]: p.grad for p, _ in self.pairs}
        self.grads = {n: g.clone() for n, g in grads.items() if g is not None}
        return super().step(max_norm)


def step(lm, batches, **values):
    optimizer = Recording(lm)
    given = {"max_norm": 1.0, "step": 1} | values
    return train_step(lm, batches, optimizer, WEIGHTS, **given), optimizer.grads


def double(**values):
    return small_hybrid(lm={"norm": "rms_norm"}, **values).double()


def test_how_a_batch_is_cut_changes_nothing():
    """In float64, but for Moshi's RoPE, which computes in float32."""
    found = {name: step(double(), cut) for name, cut in CUTS.items()}
    want, grads = found["1x4"]
    assert any(g.abs().max() > 0 for n, g in grads.items() if n.endswith("W1"))
    for got, gradients in found.values():
        assert got.loss == pytest.approx(want.loss, rel=1e-12)
        assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-7)
        assert got.tokens == want.tokens
        assert got.sums.means() == pytest.approx(want.sums.means(), rel=1e-12)
        assert gradients.keys() == grads.keys()
        for name, gradient in gradients.items():
            bound = 1e-7 * (1 + grads[name].abs().max())
            assert (gradient - grads[name]).abs().max() < bound, name


def test_the_mean_of_the_micro_batches_means_would_be_something_else():
    """So that the test above can fail."""
    lm = double()
    means = []
    for part in CUTS["4x1"]:
        text, audio, sums = loss_sums(lm, part.codes, part.text_mask, WEIGHTS)
        means.append((audio / sums.weight[1]).item() + (text / max(1, sums.weight[0])).item())
    assert abs(sum(means) / 4 - step(lm, CUTS["1x4"])[0].loss) > 1e-2


def test_the_loss_is_what_is_differentiated():
    lm, part = double(), CUTS["1x4"][0]
    text, audio, sums = loss_sums(lm, part.codes, part.text_mask, WEIGHTS)
    loss = text / sums.weight[0] + audio / sums.weight[1]
    result, grads = step(lm, CUTS["1x4"])
    assert result.loss == pytest.approx(loss.item(), rel=1e-12)
    fresh = double()
    text, audio, _ = loss_sums(fresh, part.codes, part.text_mask, WEIGHTS)
    (text / sums.weight[0] + audio / sums.weight[1]).backward()
    wanted = {n: p.grad for n, p in fresh.named_parameters() if p.grad is not None}
    assert wanted.keys() == grads.keys()
    assert all(torch.allclose(wanted[n], grads[n], rtol=1e-9, atol=1e-12) for n in grads)


def test_without_any_text_the_text_head_is_left_alone():
    lm = small_lm()
    before = lm.text_linear.weight.clone()
    audio = lm.linears[0].weight.clone()
    result, grads = step(lm, [batch(ROWS[2])])
    assert math.isfinite(result.loss)
    assert math.isnan(result.sums.means()["nll_text"])
    assert "text_linear.weight" not in grads
    assert torch.equal(lm.text_linear.weight, before)
    assert not torch.equal(lm.linears[0].weight, audio)


def test_a_loss_that_is_no_number_names_step_and_recordings_and_updates_nothing():
    lm = small_lm()
    with torch.no_grad():  # only the second recording has text token 63 as an input
        lm.text_emb.weight[63] = math.nan
    good, bad = segment(0), segment(9)
    for row in (good, bad):
        row.codes[0].clamp_(max=62)
    bad.codes[0, 1] = 63
    before = {n: p.clone() for n, p in lm.named_parameters()}
    with pytest.raises(NonFiniteError, match=r"step 17: loss is nan on recording9\.wav from 0\.7"):
        step(lm, [batch(good), batch(bad)], step=17)
    for name, p in lm.named_parameters():
        assert torch.equal(p.nan_to_num(7), before[name].nan_to_num(7)), name
        assert p.grad is None, name


def test_a_gradient_that_is_no_number_is_named_and_updates_nothing():
    lm = small_lm()
    lm.text_linear.weight.register_hook(lambda g: g * math.inf)
    before = {n: p.clone() for n, p in lm.named_parameters()}
    with pytest.raises(
        NonFiniteError, match=r"step 3: gradient norm is (nan|inf).*recording0\.wav"
    ):
        step(lm, [batch(ROWS[0])], step=3)
    assert all(torch.equal(p, before[n]) for n, p in lm.named_parameters())


# -- the states that a step leaves -----------------------------------------------------------------


@pytest.mark.parametrize("family", ["ttt_mlp", "ttt_linear"])
def test_the_state_after_a_segment_is_measured(family):
    """By hand: attach, one forward, norms of the fast weights row by row."""
    lm = double(memory=family)
    whole = CUTS["1x4"][0]
    attach_ttt_states(lm, 4)
    with torch.no_grad():
        lm(whole.codes)
    squares, moved = torch.zeros(4).double(), torch.zeros(4).double()
    for saved, block in zip(save_ttt_states(lm).values(), ttt_blocks(lm).values(), strict=True):
        for name in ("W1", "b1", "W2", "b2") if family == "ttt_mlp" else ("W1", "b1"):
            w, start = saved["lanes"][f"fast.{name}"], getattr(block.memory, name)
            squares += w.square().flatten(1).sum(1)
            moved += (w - start).square().flatten(1).sum(1)
    detach_ttt_states(lm)
    assert (moved > 1e-3).all()
    result, _ = step(lm, CUTS["1x4"])
    want = torch.stack([squares.sqrt(), moved.sqrt()])
    assert torch.allclose(result.state_norms, want.detach(), rtol=1e-9)
    metrics = memory_metrics(lm, result)
    assert metrics["state_norm"] == pytest.approx(squares.sqrt().mean().item())
    assert metrics["state_moved"] == pytest.approx(moved.sqrt().mean().item())
    gates = torch.cat([torch.tanh(b.gate) for b in ttt_blocks(lm).values()])
    assert metrics["gate_mean"] == pytest.approx(gates.mean().item(), rel=1e-5)
    assert metrics["gate_std"] == pytest.approx(gates.std().item(), rel=1e-5)


def test_every_segment_starts_from_w0():
    """All rows of all micro-batches are counted, whatever stood in the lanes before."""
    lm = double()
    whole = step(double(), CUTS["1x4"])[0].state_norms
    attach_ttt_states(lm, 4)
    lm(CUTS["1x4"][0].codes.flip(0))
    result, grads = step(lm, CUTS["4x1"])
    assert torch.allclose(result.state_norms, whole, rtol=1e-9)
    want = step(double(), CUTS["4x1"])[1]
    assert all(torch.equal(grads[n], want[n]) for n in want)


def test_measuring_changes_no_gradient():
    """The step attaches lanes; by hand, without any, the gradients are the same to the bit."""
    _, grads = step(double(), [CUTS["1x4"][0]])
    lm, part = double(), CUTS["1x4"][0]
    text, audio, sums = loss_sums(lm, part.codes, part.text_mask, WEIGHTS)
    (audio / sums.weight[1].item() + text / sums.weight[0].item()).backward()
    for name, p in lm.named_parameters():
        assert (p.grad is None) == (name not in grads)
        assert p.grad is None or torch.equal(p.grad, grads[name]), name


def test_a_segment_shorter_than_a_chunk_has_not_moved():
    lm = double(chunk_size=FRAMES + 5)
    norm, moved = step(lm, [batch(ROWS[0])])[0].state_norms[:, 0].tolist()
    assert moved == 0
    assert norm > 0


def test_memories_without_persistent_states_have_no_norm():
    lm = double(persistent_states=False)
    result, _ = step(lm, [batch(ROWS[0])])
    metrics = memory_metrics(lm, result)
    assert math.isnan(metrics["state_norm"])
    assert math.isnan(metrics["state_moved"])
    assert math.isfinite(metrics["gate_std"])
    assert state_norms(lm).shape == (2, 0)


def test_checkpointing_on_and_off_train_the_same():
    """Two steps with the optimizer, lanes attached: float64, all weights."""
    found = []
    for checkpointing in (False, True):
        lm = double()
        lm.transformer.checkpointing = lm.depformer.checkpointing = checkpointing
        optimizer = Recording(lm)
        for number, cut in enumerate([CUTS["2x2"], CUTS["1x4"]], 1):
            train_step(lm.train(), cut, optimizer, WEIGHTS, max_norm=1.0, step=number)
        found.append(lm.state_dict())
    start = double().state_dict()
    for name, want in found[0].items():
        assert (found[1][name] - want).abs().max() < 1e-9, name
    assert sum(not torch.equal(start[n], w) for n, w in found[0].items()) > 20
