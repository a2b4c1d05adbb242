"""One arm: a model's NLL of every recording of a panel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from moshi.models.lm import LMModel
from torch import Tensor

from eval.perplexity import FRAMES_PER_CALL, Nll, score
from eval.stats import Array

KINDS = ("codebook0", "codebooks1_7", "text")
Progress = Callable[[int], object]
"""Called with the number of frames just scored."""


@dataclass(frozen=True)
class Item:
    """A recording to be scored.

    Attributes:
        name: unique among the items.
        speaker: who is heard in it; intervals are drawn over speakers.
        codes: [1 + n_q, T] text, Moshi's codebooks, the user's; -1 is "nothing here".
        text_known: the text row is a transcript; otherwise it is padding, and no target.
    """

    name: str
    speaker: str
    codes: Tensor
    text_known: bool = False


@dataclass
class Scores:
    """One arm's NLL of every item.

    Attributes:
        nll: kind -> one [T] array an item, in the order of the items; NaN where undefined.
        ms_per_frame: of every call.
        state_norm: item -> block -> norm of the fast weights at its end.
        state_moved: item -> block -> norm of their distance from W0 at its end.
    """

    nll: dict[str, list[Array]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    ms_per_frame: list[float] = field(default_factory=list)
    state_norm: dict[str, dict[str, float]] = field(default_factory=dict)
    state_moved: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, item: Item, nll: Nll) -> None:
        """Take in the scores of one item."""
        values = nll.values[0].double().numpy()
        text = values[0] if item.text_known else np.full_like(values[0], np.nan)
        others = values[2:]
        known = np.isfinite(others)
        mean = np.where(known, others, 0.0).sum(0) / np.maximum(known.sum(0), 1)
        self.nll["codebook0"].append(values[1])
        self.nll["codebooks1_7"].append(np.where(known.any(0), mean, np.nan))
        self.nll["text"].append(text)
        self.ms_per_frame += nll.ms_per_frame
        self.state_norm[item.name] = {k: v[-1] for k, v in nll.state_norm.items()}
        self.state_moved[item.name] = {k: v[-1] for k, v in nll.state_moved.items()}


def evaluate(
    lm: LMModel,
    items: Sequence[Item],
    *,
    frames_per_call: int = FRAMES_PER_CALL,
    reset_every: int | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score every item in a fresh context of its own; the model is left as it was.

    Raises:
        FloatingPointError: an NLL is not finite; the message names the item.
    """
    scores = Scores()
    for item in items:
        try:
            nll = score(
                lm,
                item.codes[None].long(),
                frames_per_call=frames_per_call,
                reset_every=reset_every,
            )
        except FloatingPointError as error:
            raise FloatingPointError(f"{item.name}: {error}") from error
        scores.add(item, nll)
        if progress is not None:
            progress(item.codes.shape[-1])
    return scores
