"""The loss: which tokens count, how much, and that cutting the batch changes nothing."""

import math

import pytest
import torch
import torch.nn.functional as F

from finetune.data.corpus import Segment
from finetune.data.loader import Batch
from finetune.loss import LossWeights, loss_sums, token_weights, total_weight
from tests.small import small_hybrid, small_lm

FRAMES = 14
WEIGHTS = LossWeights(first_codebook=7.0, text_padding=0.25)
PADDING, END_OF_PADDING = 3, 0


def segment(seed, frames=FRAMES, text=True):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 64, (17, frames), generator=g)
    codes[0] = torch.randint(4, 64, (frames,), generator=g)
    codes[0, 1:4] = PADDING
    codes[0, 4:5] = END_OF_PADDING
    return Segment(codes, text, f"recording{seed}.wav", seed)


def batch(*segments):
    return Batch.collate(segments, FRAMES)


@pytest.fixture
def mixed():
    """A whole segment, a short one, one without transcript, and one of a few frames."""
    return [segment(0), segment(1, frames=6), segment(2, text=False), segment(3, frames=3)]


def test_weights_are_those_of_moshis_own_masks(mixed):
    """What moshi's forward masks has weight 0, all else has more."""
    lm, whole = small_lm(), batch(*mixed)
    text, audio = token_weights(lm, whole.codes, whole.text_mask, WEIGHTS)
    with torch.no_grad():
        out = lm(whole.codes)
    assert torch.equal(audio > 0, out.mask)
    assert torch.equal(text > 0, out.text_mask[:, 0] & whole.text_mask)
    assert not out.mask.all()
    assert out.logits.isnan().any()  # at the positions cut off: they must not get into a sum
    delays = lm.delays[1:9]
    assert max(delays) > 0
    for k, delay in enumerate(delays):
        assert (audio[0, k, FRAMES - delay :] == 0).all()
        assert (audio[0, k, : FRAMES - delay] > 0).all()
    assert (audio[1, :, 6:] == 0).all()  # -1: nothing there
    assert (audio[1, :, :5] > 0).all()  # the short recording is used
    assert (text[2] == 0).all()


def test_the_loss_is_the_straightforward_one(mixed):
    lm = small_lm(norm="rms_norm").double()
    whole = batch(*mixed)
    text_loss, audio_loss, sums = loss_sums(lm, whole.codes, whole.text_mask, WEIGHTS)
    out = lm(whole.codes)
    text = audio = 0.0
    nll = {"text": [], "first": [], "others": []}
    for b, row in enumerate(mixed):
        for t in range(row.codes.shape[1]):
            if row.text_known:
                token = int(row.codes[0, t])
                value = -F.log_softmax(out.text_logits[b, 0, t], -1)[token].item()
                text += value * (0.25 if token in (PADDING, END_OF_PADDING) else 1.0)
                nll["text"].append(value)
            for k in range(8):
                if t >= FRAMES - lm.delays[1 + k]:
                    continue
                value = -F.log_softmax(out.logits[b, k, t], -1)[row.codes[1 + k, t]].item()
                audio += value * (7.0 if k == 0 else 1.0)
                nll["others" if k else "first"].append(value)
    assert text_loss.item() == pytest.approx(text, rel=1e-12)
    assert audio_loss.item() == pytest.approx(audio, rel=1e-12)
    want = [sum(v) / len(v) for v in nll.values()]
    assert list(sums.means().values()) == pytest.approx(want, rel=1e-12)
    assert sums.count.tolist() == [len(v) for v in nll.values()]


@pytest.mark.parametrize("key", ["first_codebook", "text_padding"])
def test_each_weight_changes_the_loss(mixed, key):
    lm, whole = small_lm(), batch(*mixed)
    one = loss_sums(lm, whole.codes, whole.text_mask, LossWeights(1.0, 1.0))
    two = loss_sums(lm, whole.codes, whole.text_mask, LossWeights(**{"text_padding": 1.0, key: 2}))
    which = 0 if key == "text_padding" else 1
    assert two[which] > one[which]
    assert torch.equal(two[1 - which], one[1 - which])


def test_total_weight_is_that_of_the_sums(mixed):
    lm, whole = small_lm(), batch(*mixed)
    parts = [batch(row) for row in mixed]
    total = total_weight(lm, [(p.codes, p.text_mask) for p in parts], WEIGHTS)
    sums = loss_sums(lm, whole.codes, whole.text_mask, WEIGHTS)[2]
    assert torch.equal(total, sums.weight)


def test_padding_adds_nothing(mixed):
    """A short row padded with -1 has the NLL that it has alone (Moshi is causal)."""
    lm = small_hybrid(lm={"norm": "rms_norm"}).double()
    padded, alone = batch(mixed[1]), Batch.collate([mixed[1]], 6)
    one = loss_sums(lm, padded.codes, padded.text_mask, WEIGHTS)[2]
    two = loss_sums(lm, alone.codes, alone.text_mask, WEIGHTS)[2]
    assert torch.allclose(one.nll[:2], two.nll[:2], rtol=1e-6)  # text and codebook 0: no delay
    assert one.count.tolist() == [6, 6, 7 * 6]  # within the frame of the delays, all is predicted
    assert two.count.tolist() == [6, 6, 7 * 5]


def test_without_text_there_is_no_text_loss(mixed):
    lm, whole = small_lm(), batch(*mixed)
    known = loss_sums(lm, whole.codes, whole.text_mask, WEIGHTS)
    none = loss_sums(lm, whole.codes, torch.zeros_like(whole.text_mask), WEIGHTS)
    assert known[0] > 0
    assert none[0] == 0
    assert torch.equal(none[1], known[1])
    means = none[2].means()
    assert math.isnan(means["nll_text"])
    assert math.isfinite(means["nll_codebook0"] + means["nll_codebooks1_7"])
