"""Length generalisation: perplexity of recordings cut at 20 lengths, 0.5x to 10x the training's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.arms import Arm
from eval.scores import BROKEN, Item, Scores
from eval.stats import RESAMPLES, SEED, estimate, mean_of
from eval.tables import FRAME_SECONDS, Rows
from eval.verdict import FEWEST_SPEAKERS

COUNT, SHORTEST, LONGEST = 20, 0.5, 10.0
NAMED = (1.0, 5.0, 10.0)
"""Factors that are reported by themselves; they lie between those of the curve."""

Generalisation = dict[str, Any]
"""What `generalise` returns."""


def factors() -> list[float]:
    """The lengths, in training segments: geometric from 0.5 to 10."""
    return np.geomspace(SHORTEST, LONGEST, COUNT).tolist()


def generalise(
    scores: dict[Arm, Scores], items: Sequence[Item], segment_frames: int
) -> Generalisation:
    """Perplexity of codebook 0 over the first L frames, `exp(mean nats)`, for every length L.

    All lengths are of the same recordings, so that the curve does not bend because short ones drop
    out: those that reach the longest length which enough speakers reach (`FEWEST_SPEAKERS`, or
    all, if there are fewer). Longer lengths are skipped.

    Args:
        scores: arm -> its scores.
        items: the recordings.
        segment_frames: length of a training segment.

    Returns:
        Plain values: `lengths` (factor, frames), `skipped` (with reasons), `recordings`, and for
        each arm `perplexity` (mean, low, high, n, reason) at each length, `named` at 1x, 5x and
        10x, `best` (factor and perplexity), `degradation` (highest over lowest perplexity);
        `covered` are the shortest and the longest factor. NaN, with a reason, where there is none.
    """
    lengths = [(factor, max(1, round(factor * segment_frames))) for factor in factors()]
    enough = min(FEWEST_SPEAKERS, len({item.speaker for item in items}))
    reached = [length for length in lengths if _speakers(items, length[1]) >= enough]
    chosen = [i for i, item in enumerate(items) if reached and item.frames >= reached[-1][1]]
    skipped = [
        {"factor": factor, "frames": frames, "reason": _reason(items, frames, enough)}
        for factor, frames in lengths[len(reached) :]
    ]
    speakers = [items[i].speaker for i in chosen]

    def at(found: Scores, frames: int) -> dict[str, Any]:
        whole = [i for i in chosen if items[i].frames >= frames]
        if not whole or len(whole) < len(chosen):
            return _none(_reason(items, frames, enough))
        values = np.array([mean_of(found.found[i].nll["codebook0"][:frames]) for i in chosen])
        missing = BROKEN if found.broken else "no codebook0 to predict there"
        nats = estimate(values, speakers, missing)
        means = {"mean": _exp(nats.mean), "low": _exp(nats.low), "high": _exp(nats.high)}
        return nats.to_dict() | means

    arms: dict[str, Any] = {}
    for arm, found in scores.items():
        curve = [at(found, frames) for _, frames in reached]
        means = [point["mean"] for point in curve if math.isfinite(point["mean"])]
        best = min(means, default=math.nan)
        arms[arm.name] = {
            "label": arm.label,
            "perplexity": curve,
            "named": {f"{f:g}x": at(found, max(1, round(f * segment_frames))) for f in NAMED},
            "best": {
                "factor": next((r[0] for r, p in zip(reached, curve, strict=True)
                                if p["mean"] == best), math.nan),
                "perplexity": best,
            },
            "degradation": max(means, default=math.nan) / best,
        }  # fmt: skip
    return {
        "segment_frames": segment_frames,
        "lengths": [{"factor": factor, "frames": frames} for factor, frames in reached],
        "covered": [reached[0][0], reached[-1][0]] if reached else [math.nan, math.nan],
        "skipped": skipped,
        "recordings": [items[i].name for i in chosen],
        "bootstrap": {"over": "speakers", "resamples": RESAMPLES, "seed": SEED},
        "arms": arms,
    }


def generalisation_table(found: Generalisation) -> Rows:
    """One line an arm: perplexity at 1x, 5x and 10x, the best, and how much it degrades."""
    rows = [["arm", *(f"{factor:g}x" for factor in NAMED), "best", "at", "highest / lowest"]]
    for arm in found["arms"].values():
        row = [arm["label"], *(_number(arm["named"][f"{factor:g}x"]["mean"]) for factor in NAMED)]
        best = arm["best"]
        row += [_number(best["perplexity"]), _number(best["factor"], "x")]
        rows.append([*row, _number(arm["degradation"])])
    return rows


def generalisation_notes(found: Generalisation) -> list[str]:
    """What is covered and what was skipped, in words."""
    segment, (low, high) = found["segment_frames"], found["covered"]
    lines = [
        f"A training segment is {segment} frames ({segment * FRAME_SECONDS:g} s); "
        + (
            f"covered: {low:g}x to {high:.3g}x, on {len(found['recordings'])} recordings"
            if found["recordings"]
            else "no length is covered"
        )
    ]
    if found["skipped"]:
        names = ", ".join(f"{s['factor']:.3g}x" for s in found["skipped"])
        lines.append(f"skipped: {names}: {found['skipped'][0]['reason']}")
    return lines


def generalisation_metrics(found: Generalisation) -> dict[str, float]:
    """The numbers under flat names, for a log: `kept_ppl_1x`, `kept_degradation`."""
    out: dict[str, float] = {}
    for name, arm in found["arms"].items():
        for length, point in zip(found["lengths"], arm["perplexity"], strict=True):
            out[f"{name}_ppl_{length['factor']:.3g}x"] = point["mean"]
        for factor, point in arm["named"].items():
            out[f"{name}_ppl_{factor}"] = point["mean"]
        out[f"{name}_degradation"] = arm["degradation"]
    return out


def _speakers(items: Sequence[Item], frames: int) -> int:
    return len({item.speaker for item in items if item.frames >= frames})


def _reason(items: Sequence[Item], frames: int, enough: int) -> str:
    longest = max(item.frames for item in items)
    if longest < frames:
        return f"no recording has {frames} frames, the longest has {longest}"
    return (
        f"{_speakers(items, frames)} speakers have recordings of {frames} frames, it takes {enough}"
    )


def _none(reason: str) -> dict[str, Any]:
    return {"mean": math.nan, "low": math.nan, "high": math.nan, "n": 0, "reason": reason}


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.nan


def _number(value: float, unit: str = "") -> str:
    return f"{value:.3g}{unit}" if math.isfinite(value) else "-"
