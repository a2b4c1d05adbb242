"""The arms of a comparison, scored on the same recordings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

from moshi.models.lm import LMModel

from eval.perplexity import FRAMES_PER_CALL, writing_off
from eval.scores import Item, Progress, Scores, evaluate
from eval.summary import summarise
from moshi_ttt.hybrid import HybridLMModel

MEMORY_ARMS = ("kept", "reset", "off")
"""What one trained model with a memory gives: see `eval.summary.LABELS`."""


def score_arms(
    lm: LMModel,
    items: Sequence[Item],
    window: int,
    *,
    arms: Iterable[str] = MEMORY_ARMS,
    frames_per_call: int = FRAMES_PER_CALL,
    progress: Progress | None = None,
) -> dict[str, Scores]:
    """The arms that one trained model gives: memory kept, reset every window, writing off.

    A model without memory gives one arm, `"trained"`.
    """
    if not isinstance(lm, HybridLMModel):
        scores = evaluate(lm, items, frames_per_call=frames_per_call, progress=progress)
        return {"trained": scores}
    out: dict[str, Scores] = {}
    for arm in arms:
        with writing_off(lm) if arm == "off" else nullcontext():
            out[arm] = evaluate(
                lm,
                items,
                frames_per_call=frames_per_call,
                reset_every=window if arm == "reset" else None,
                progress=progress,
            )
    return out


def evaluate_arms(
    lm: LMModel,
    base_lm: LMModel | None,
    items: Sequence[Item],
    *,
    arms: Iterable[str] = MEMORY_ARMS,
    training_frames: int | None = None,
    bin_frames: int | None = None,
    frames_per_call: int = FRAMES_PER_CALL,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score a trained model, and its base if there is one at hand, and compare (see `summarise`).

    Nothing of `lm` changes: this may run between two training steps.

    Args:
        lm: the trained model, with its memory or without.
        base_lm: the stock base; None leaves that arm out.
        items: recordings.
        arms: which of `MEMORY_ARMS`.
        training_frames: length of a training segment, to be marked.
        bin_frames: bins of the curves; default 250, at most half a window.
        frames_per_call: frames of one call.
        progress: called after every item and arm.
    """
    window = attention_window(lm)
    scores: dict[str, Scores] = {}
    if base_lm is not None:
        scores["base"] = evaluate(
            base_lm, items, frames_per_call=frames_per_call, progress=progress
        )
    scores |= score_arms(
        lm, items, window, arms=arms, frames_per_call=frames_per_call, progress=progress
    )
    return summarise(
        scores,
        items,
        window,
        training_frames=training_frames,
        bin_frames=bin_frames,
        frames_per_call=frames_per_call,
    )


def attention_window(lm: LMModel) -> int:
    """Frames that the temporal attention sees.

    Raises:
        ValueError: the model's attention has no end.
    """
    if lm.context is None:
        raise ValueError("the model's attention has no window (context is null): nothing to exceed")
    return lm.context
