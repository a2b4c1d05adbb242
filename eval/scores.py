"""One arm: a model's NLL of every recording of a panel."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from moshi.models.lm import LMModel
from torch import Tensor

from eval.keep import Found, Keep
from eval.perplexity import FRAMES_PER_CALL, Nll, Progress, score
from eval.stats import Array

KINDS = ("codebook0", "codebooks1_7", "text")
BROKEN = "the NLL is no number"
"""Why a mean is missing of which all scores are broken."""


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

    @property
    def frames(self) -> int:
        """Length in frames of 80 ms."""
        return self.codes.shape[-1]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what is scored."""
        digest = hashlib.sha256(f"{list(self.codes.shape)} {self.text_known}".encode())
        digest.update(self.codes.long().contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass
class Scores:
    """One arm's scores, one a recording, in the order of the items.

    Attributes:
        found: what was found of each.
        missing: why recordings may have fewer scored frames than they have frames; empty if none.
        kept: how many were not scored now, but had been kept.
    """

    found: list[Found] = field(default_factory=list)
    missing: str = ""
    kept: int = 0

    @property
    def nll(self) -> dict[str, list[Array]]:
        """Kind -> one array an item, [frames scored]; NaN where undefined."""
        return {kind: [found.nll[kind] for found in self.found] for kind in KINDS}

    @property
    def ms_per_frame(self) -> list[float]:
        """Of every call."""
        return [ms for found in self.found for ms in found.ms_per_frame]

    @property
    def broken(self) -> bool:
        """Whether an NLL is no number that should be one."""
        return any(found.broken for found in self.found)

    def refuse_broken(self, items: Sequence[Item]) -> None:
        """See that every NLL that should be there is a finite number.

        Raises:
            FloatingPointError: naming the first recording and place where it is not.
        """
        for item, found in zip(items, self.found, strict=True):
            if found.broken:
                raise FloatingPointError(f"{item.name}: {found.broken}")


def evaluate(
    lm: LMModel,
    items: Sequence[Item],
    *,
    rows: int = 1,
    frames_per_call: int = FRAMES_PER_CALL,
    reset_every: int | None = None,
    history: Sequence[Item] | None = None,
    keep: Keep | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score every item in a fresh context of its own; the model is left as it was.

    Args:
        lm: stock or spliced.
        items: any.
        rows: items at a time.
        frames_per_call: frames of one call.
        reset_every: see `eval.perplexity.score`.
        history: one more item for each, likewise.
        keep: where scores are kept as they come; what is there already is not scored again.
        progress: called with numbers of frames.
    """
    others = [None] * len(items) if history is None else [other.digest for other in history]
    names = [f"{item.digest} {other}" for item, other in zip(items, others, strict=True)]
    scored: dict[int, Found] = {}
    for index, name in enumerate(names):
        found = keep.get(name) if keep is not None else None
        if found is not None:
            scored[index] = found
            if progress is not None:
                progress(items[index].frames)
    waiting = [index for index in range(len(items)) if index not in scored]

    def done(place: int, nll: Nll) -> None:
        index = waiting[place]
        scored[index] = _found(nll, items[index].text_known)
        if keep is not None:
            keep.put(names[index], scored[index])

    if waiting:
        score(
            lm,
            [items[i].codes.long() for i in waiting],
            rows=min(rows, len(items)),  # as many when fewer are left: the same shapes
            frames_per_call=frames_per_call,
            reset_every=reset_every,
            history=None if history is None else [history[i].codes.long() for i in waiting],
            progress=progress,
            done=done,
        )
    found = [scored[index] for index in range(len(items))]
    return Scores(found, kept=len(items) - len(waiting))


def _found(nll: Nll, text_known: bool) -> Found:
    values = nll.values.double().numpy()
    if nll.broken:
        values = np.full_like(values, np.nan)
    others = values[2:]
    known = np.isfinite(others)
    mean = np.where(known, others, 0.0).sum(0) / np.maximum(known.sum(0), 1)
    return Found(
        nll={
            "codebook0": values[1],
            "codebooks1_7": np.where(known.any(0), mean, np.nan),
            "text": values[0] if text_known else np.full_like(values[0], np.nan),
        },
        ms_per_frame=nll.ms_per_frame,
        state_norm={name: norms[-1] for name, norms in nll.state_norm.items()},
        state_moved={name: norms[-1] for name, norms in nll.state_moved.items()},
        broken=nll.broken,
    )
