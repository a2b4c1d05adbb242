"""Weighted cross-entropy over text and codebooks, divided by the weight of the whole step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel
from torch import Tensor, nn

from finetune.world import World


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

    def over(self, world: World) -> Sums:
        """Sums over all ranks."""
        parts = (self.loss, self.weight, self.nll, self.count)
        total = world.sum(torch.cat(parts)).split([len(p) for p in parts])
        return Sums(*total)

    def means(self) -> dict[str, float]:
        """Mean NLL in nats by kind of token; NaN where there was none."""
        mean = (self.nll / self.count).tolist()
        return dict(zip(("nll_text", "nll_codebook0", "nll_codebooks1_7"), mean, strict=True))


class TeacherForced(nn.Module):
    """A Moshi as the trainer sees it: delayed sequences in, logits of the next step out.

    Args:
        lm: goes on from the lanes that are attached to it.
    """

    def __init__(self, lm: LMModel) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, sequence: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, 17, T + 1]` -> logits of steps 1 to T: text `[B, T, N]`, audio `[B, dep_q, T, M]`.

        With a whole recording they are those of `LMModel.forward`, not yet put back in time.
        """
        hidden, text = self.lm.forward_text(sequence[..., :-1])
        return text[:, 0], self.lm.forward_depformer_training(sequence[..., 1:], hidden)


def token_weights(
    lm: LMModel, targets: Tensor, text_known: Tensor, weights: LossWeights
) -> tuple[Tensor, Tensor]:
    """Weight of every target token: 0 where there is nothing to predict.

    An initial token (a delayed codebook's first steps) and -1 are no targets; the text of a
    recording without transcript is not known.

    Args:
        lm: for its padding ids, cards and number of predicted codebooks.
        targets: [B, 17, T], delayed.
        text_known: [B, T] steps whose text is a target.
        weights: how much a token counts.

    Returns:
        Weights of the text [B, T] and of the predicted codebooks [B, dep_q, T].
    """
    text = targets[:, 0]
    padding = (text == lm.text_padding_token_id) | (text == lm.end_of_text_padding_id)
    text_weight = torch.where(padding, weights.text_padding, 1.0)
    text_weight = text_weight * ((text >= 0) & (text < lm.text_card) & text_known)
    audio = targets[:, lm.audio_offset : lm.audio_offset + lm.dep_q]
    audio_weight = ((audio >= 0) & (audio < lm.card)).to(text_weight.dtype)
    audio_weight[:, 0] *= weights.first_codebook
    return text_weight, audio_weight


def total_weight(lm: LMModel, batches: list[tuple[Tensor, Tensor]], weights: LossWeights) -> Tensor:
    """Weight of text and audio tokens over the micro-batches of a step, [2] float64."""
    total = torch.zeros(2, dtype=torch.float64)
    for sequence, text_known in batches:
        text, audio = token_weights(lm, sequence[..., 1:], text_known, weights)
        total += torch.stack([text.sum().double().cpu(), audio.sum().double().cpu()])
    return total


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def loss_sums(
    model: TeacherForced, sequence: Tensor, text_known: Tensor, weights: LossWeights
) -> tuple[Tensor, Tensor, Sums]:
    """One forward through the model.

    Returns:
        The weighted sums of NLL of text and of audio (to differentiate), and detached `Sums`.
    """
    text_logits, logits = model(sequence)
    lm, targets = model.lm, sequence[..., 1:]
    text_weight, audio_weight = token_weights(lm, targets, text_known, weights)
    text_on, audio_on = text_weight > 0, audio_weight > 0
    text_nll = F.cross_entropy(
        _wide(text_logits[text_on]), targets[:, 0][text_on], reduction="none"
    )
    audio = targets[:, lm.audio_offset : lm.audio_offset + lm.dep_q]
    audio_nll = F.cross_entropy(_wide(logits[audio_on]), audio[audio_on], reduction="none")
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
