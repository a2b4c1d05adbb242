"""Weighted cross-entropy over text and codebooks, divided by the weight of the whole step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel
from torch import Tensor


@dataclass(frozen=True)
class LossWeights:
    """How much a token counts.

    Attributes:
        first_codebook: weight of codebook 0 against 1 for the others.
        text_padding: weight of a padding token of the text against 1 for the others.
    """

    first_codebook: float = 1.0
    text_padding: float = 0.5


@dataclass
class Sums:
    """Sums over tokens; those of several micro-batches add up.

    Attributes:
        loss: weighted sums of NLL, in nats: text, audio.
        weight: the weights those were summed with: text, audio.
        nll: plain sums of NLL: text, codebook 0, the other codebooks.
        count: tokens behind `nll`.
    """

    loss: Tensor
    weight: Tensor
    nll: Tensor
    count: Tensor

    def __add__(self, other: Sums) -> Sums:
        """Sums over both."""
        return Sums(
            self.loss + other.loss,
            self.weight + other.weight,
            self.nll + other.nll,
            self.count + other.count,
        )

    def means(self) -> dict[str, float]:
        """Mean NLL in nats by kind of token; NaN where there was none."""
        mean = (self.nll / self.count).tolist()
        return dict(zip(("nll_text", "nll_codebook0", "nll_codebooks1_7"), mean, strict=True))


def token_weights(
    lm: LMModel, codes: Tensor, text_known: Tensor, weights: LossWeights
) -> tuple[Tensor, Tensor]:
    """Weight of every target token: 0 where there is nothing to predict.

    A codebook delayed by d steps is not predicted in the last d frames of a segment; a code of -1
    is no target; the text of a recording without transcript is not known.

    Args:
        lm: for its delays, padding ids and number of predicted codebooks.
        codes: [B, 17, T].
        text_known: [B, T] frames whose text is a target.
        weights: how much a token counts.

    Returns:
        Weights of the text [B, T] and of the predicted codebooks [B, dep_q, T].
    """
    frames = codes.shape[-1]
    text = codes[:, 0]
    padding = (text == lm.text_padding_token_id) | (text == lm.end_of_text_padding_id)
    text_weight = torch.where(padding, weights.text_padding, 1.0)
    text_weight = text_weight * ((text != lm.zero_token_id) & text_known)
    offset = lm.audio_offset
    audio = codes[:, offset : offset + lm.dep_q]
    audio_weight = (audio != lm.zero_token_id).to(text_weight.dtype)
    audio_weight[:, 0] *= weights.first_codebook
    for k, delay in enumerate(lm.delays[offset : offset + lm.dep_q]):
        audio_weight[:, k, max(0, frames - delay) :] = 0.0
    return text_weight, audio_weight


def total_weight(lm: LMModel, batches: list[tuple[Tensor, Tensor]], weights: LossWeights) -> Tensor:
    """Weight of text and audio tokens over all micro-batches of a step, [2]."""
    total = torch.zeros(2, dtype=torch.float64)
    for codes, text_known in batches:
        text, audio = token_weights(lm, codes, text_known, weights)
        total += torch.stack([text.sum().double().cpu(), audio.sum().double().cpu()])
    return total


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def loss_sums(
    lm: LMModel, codes: Tensor, text_known: Tensor, weights: LossWeights
) -> tuple[Tensor, Tensor, Sums]:
    """One forward through the model.

    Returns:
        The weighted sums of NLL of text and of audio (to differentiate), and detached `Sums`.
    """
    out = lm(codes)
    text_weight, audio_weight = token_weights(lm, codes, text_known, weights)
    # Logits at positions cut off by the delays are NaN: they are left out before any arithmetic.
    text_on, audio_on = text_weight > 0, audio_weight > 0
    text_nll = F.cross_entropy(
        _wide(out.text_logits[:, 0][text_on]), codes[:, 0][text_on], reduction="none"
    )
    targets = codes[:, lm.audio_offset : lm.audio_offset + lm.dep_q]
    audio_nll = F.cross_entropy(_wide(out.logits[audio_on]), targets[audio_on], reduction="none")
    text_loss = (text_nll * text_weight[text_on]).sum()
    audio_loss = (audio_nll * audio_weight[audio_on]).sum()
    first = torch.zeros_like(audio_on)
    first[:, 0] = True
    first = first[audio_on]
    with torch.no_grad():
        nll = torch.stack([text_nll.sum(), audio_nll[first].sum(), audio_nll[~first].sum()])
        count = torch.stack([text_on.sum(), first.sum(), (~first).sum()])
        weight = torch.stack([text_weight.sum(), audio_weight.sum()])
        sums = Sums(
            torch.stack([text_loss, audio_loss]).detach().double().cpu(),
            weight.double().cpu(),
            nll.double().cpu(),
            count.double().cpu(),
        )
    return text_loss, audio_loss, sums
