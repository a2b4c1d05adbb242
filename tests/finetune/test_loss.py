"""The loss: which tokens count, how much, and that cutting the batch changes nothing."""

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from moshi.models.lm_utils import _delay_sequence

from finetune.data.loader import NOTHING, Batch, Layout
from finetune.loss import LossWeights, TeacherForced, loss_sums, token_weights, total_weight
from tests.small import small_hybrid, small_lm

FRAMES = 14
WEIGHTS = LossWeights(first_codebook=7.0, text_padding=0.25)
PADDING, END_OF_PADDING = 3, 0


class Row(NamedTuple):
    codes: torch.Tensor
    text_known: bool
    name: str
    start: int


def segment(seed, frames=FRAMES, text=True):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 64, (17, frames), generator=g)
    codes[0] = torch.randint(4, 64, (frames,), generator=g)
    codes[0, 1:4] = PADDING
    codes[0, 4:5] = END_OF_PADDING
    return Row(codes, text, f"recording{seed}.wav", seed)


def batch(*rows, frames=FRAMES):
    """Whole recordings, as `Loader` lays them out; moshi's own delays."""
    layout = Layout.of(small_lm())
    sequence = torch.full((len(rows), 17, frames + 1), NOTHING)
    text_mask = torch.zeros(len(rows), frames, dtype=torch.bool)
    for b, row in enumerate(rows):
        length, initial = row.codes.shape[1], layout.initial[None, :, None]
        delayed = _delay_sequence(list(layout.delays), row.codes[None], initial)
        sequence[b, :, : length + 1] = torch.cat([initial, delayed], 2)[0]
        text_mask[b, :length] = row.text_known
    _, _, names, starts = zip(*rows, strict=True)
    begins, lengths = torch.ones(len(rows), dtype=torch.bool), [r.codes.shape[1] for r in rows]
    return Batch(sequence, text_mask, begins, names, starts, tuple(lengths))


def codes_of(rows):
    """Padded and not delayed: what `LMModel.forward` takes."""
    codes = torch.full((len(rows), 17, FRAMES), NOTHING)
    for b, row in enumerate(rows):
        codes[b, :, : row.codes.shape[1]] = row.codes
    return codes


def sums_of(lm, part, weights=None):
    return loss_sums(TeacherForced(lm), part.sequence, part.text_mask, weights or WEIGHTS)


@pytest.fixture
def mixed():
    """A whole segment, a short one, one without transcript, and one of a few frames."""
    return [segment(0), segment(1, frames=6), segment(2, text=False), segment(3, frames=3)]


def test_weights_are_those_of_moshis_own_masks(mixed):
    """What moshi's forward masks has weight 0, all else has more; here still delayed."""
    lm, whole = small_lm(), batch(*mixed)
    text, audio = token_weights(lm, whole.sequence[..., 1:], whole.text_mask, WEIGHTS)
    with torch.no_grad():
        out = lm(codes_of(mixed))
    for b, row in enumerate(mixed):
        end = row.codes.shape[1]  # moshi's masks know no shorter rows: those end earlier here
        for k, delay in enumerate(lm.delays[1:9]):
            assert not (audio[b, k, :delay] > 0).any()
            assert not (audio[b, k, end:] > 0).any()
            mask = out.mask[b, k, : end - delay]
            assert torch.equal(audio[b, k, delay:end] > 0, mask)
            assert mask.all()
    assert torch.equal(text > 0, out.text_mask[:, 0] & whole.text_mask)
    assert max(lm.delays[1:9]) > 0
    assert (text[2] == 0).all()


def test_the_loss_is_the_straightforward_one(mixed):
    lm = small_lm(norm="rms_norm").double()
    whole = batch(*mixed)
    text_loss, audio_loss, sums = sums_of(lm, whole)
    out = lm(codes_of(mixed))
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
                if t >= row.codes.shape[1] - lm.delays[1 + k]:
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
    one = sums_of(lm, whole, LossWeights(1.0, 1.0))
    two = sums_of(lm, whole, LossWeights(**{"text_padding": 1.0, key: 2}))
    which = 0 if key == "text_padding" else 1
    assert two[which] > one[which]
    assert torch.equal(two[1 - which], one[1 - which])


def test_total_weight_is_that_of_the_sums(mixed):
    lm, whole = small_lm(), batch(*mixed)
    parts = [batch(row) for row in mixed]
    total = total_weight(lm, [(p.sequence, p.text_mask) for p in parts], WEIGHTS)
    sums = sums_of(lm, whole)[2]
    assert torch.equal(total, sums.weight)


def test_padding_adds_nothing(mixed):
    """A short row padded with -1 has the NLL that it has alone (Moshi is causal)."""
    lm = small_hybrid(lm={"norm": "rms_norm"}).double()
    one = sums_of(lm, batch(mixed[1]))[2]
    two = sums_of(lm, batch(mixed[1], frames=6))[2]
    assert torch.allclose(one.nll, two.nll, rtol=1e-6)
    assert one.count.tolist() == two.count.tolist() == [6, 6, 7 * 5]


def test_without_text_there_is_no_text_loss(mixed):
    lm, whole = small_lm(), batch(*mixed)
    known = sums_of(lm, whole)
    none = sums_of(lm, replace(whole, text_mask=torch.zeros_like(whole.text_mask)))
    assert known[0] > 0
    assert none[0] == 0
    assert torch.equal(none[1], known[1])
    means = none[2].means()
    assert math.isnan(means["nll_text"])
    assert math.isfinite(means["nll_codebook0"] + means["nll_codebooks1_7"])
