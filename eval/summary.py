"""What several arms' scores say: means by range and position, paired differences, intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.arms import KEPT, RESET, SHUFFLED, TRAINED, Arm
from eval.perplexity import FRAMES_PER_CALL
from eval.scores import BROKEN, KINDS, Item, Scores
from eval.stats import (
    RANGES,
    RESAMPLES,
    SCALAR,
    SEED,
    Array,
    binned,
    curve,
    default_bin,
    estimate,
    range_frames,
    range_mean,
)


def summarise(
    scores: dict[Arm, Scores],
    items: Sequence[Item],
    window: int,
    *,
    training_frames: int | None = None,
    bin_frames: int | None = None,
    frames_per_call: int = FRAMES_PER_CALL,
    rows: int = 1,
) -> dict[str, Any]:
    """Means by range and position for every arm, and paired differences, with 95 % intervals.

    Returns:
        Plain values (NaN where something cannot be computed, with a `reason` beside it):
        `arms[name]` with `ranges[kind][range]`, `curve[kind]`, `recordings[item][kind][range]`,
        `broken[item]` (why an item has no scores there); `differences` of the memory that is kept
        to each other arm, and of the shuffled history to the reset; `window_frames` and so on.

    Raises:
        ValueError: no items, or two of one name.
    """
    if not items or len({item.name for item in items}) < len(items):
        raise ValueError(f"items must be there, and of different names: {[i.name for i in items]}")
    bin_frames = bin_frames or default_bin(window)
    speakers = [item.speaker for item in items]
    lengths = [item.frames for item in items]
    tables = {arm.name: _by_range(s, window, lengths) for arm, s in scores.items()}
    bins = {
        arm.name: {kind: binned(s.nll[kind], bin_frames) for kind in KINDS}
        for arm, s in scores.items()
    }
    missing = {name: _why_missing(name, window, max(lengths)) for name in RANGES}
    estimates = _Estimates(speakers, missing, any(item.text_known for item in items))
    said = {arm.name: BROKEN if s.broken else s.missing for arm, s in scores.items()}
    return {
        "window_frames": window,
        "training_frames": training_frames,
        "bin_frames": bin_frames,
        "frames_per_call": frames_per_call,
        "rows": rows,
        "bootstrap": {"over": "speakers", "resamples": RESAMPLES, "seed": SEED},
        "scalar": {"kind": "codebook0", "range": SCALAR, "frames": [window, 4 * window]},
        "items": [
            {"name": i.name, "speaker": i.speaker, "frames": n}
            for i, n in zip(items, lengths, strict=True)
        ],
        "arms": {
            arm.name: {
                "label": arm.label,
                "letter": arm.letter,
                "mode": arm.mode,
                "checkpoint": str(arm.checkpoint) if arm.checkpoint else None,
                "ranges": estimates.of(tables[arm.name], said[arm.name]),
                "curve": {k: curve(bins[arm.name][k], speakers) for k in KINDS},
                "recordings": {
                    item.name: {
                        kind: {name: float(values[i]) for name, values in table.items()}
                        for kind, table in tables[arm.name].items()
                    }
                    for i, item in enumerate(items)
                },
                "broken": {
                    item.name: found.broken
                    for item, found in zip(items, s.found, strict=True)
                    if found.broken
                },
                "ms_per_frame": _percentiles(s.ms_per_frame),
                "state_norm": _by_item(items, [found.state_norm for found in s.found]),
                "state_moved": _by_item(items, [found.state_moved for found in s.found]),
            }
            for arm, s in scores.items()
        },
        "differences": [
            {
                "arm": first,
                "minus": other,
                "ranges": estimates.of(
                    _minus(tables[first], tables[other]), said[first] or said[other]
                ),
                "curve": {
                    k: curve(_curve_minus(bins[first][k], bins[other][k]), speakers) for k in KINDS
                },
            }
            for first, other in _pairs(list(tables))
        ],
    }


def _pairs(names: list[str]) -> list[tuple[str, str]]:
    """What is compared: the memory that is kept with all else; what a foreign history is worth."""
    first = KEPT.name if KEPT.name in names else TRAINED.name
    pairs = [(first, other) for other in names if first in names and other != first]
    if SHUFFLED.name in names and RESET.name in names:
        pairs.append((SHUFFLED.name, RESET.name))
    return pairs


Table = dict[str, dict[str, Array]]  # kind -> range -> [N]


@dataclass(frozen=True)
class _Estimates:
    speakers: list[str]
    missing: dict[str, str]
    text_known: bool

    def of(self, table: Table, missing: str) -> dict[str, dict[str, Any]]:
        return {
            kind: {
                name: estimate(values, self.speakers, self._reason(kind, name, missing)).to_dict()
                for name, values in ranges.items()
            }
            for kind, ranges in table.items()
        }

    def _reason(self, kind: str, name: str, missing: str) -> str:
        if kind == "text" and not self.text_known:
            return "no transcript"
        return self.missing[name] or missing or f"no {kind} to predict there"


def _by_range(scores: Scores, window: int, lengths: list[int]) -> Table:
    return {
        kind: {
            name: np.array(
                [
                    range_mean(nll, name, window, frames)
                    for nll, frames in zip(scores.nll[kind], lengths, strict=True)
                ]
            )
            for name in RANGES
        }
        for kind in KINDS
    }


def _by_item(items: Sequence[Item], values: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {item.name: value for item, value in zip(items, values, strict=True) if value}


def _minus(a: Table, b: Table) -> Table:
    return {kind: {name: a[kind][name] - b[kind][name] for name in a[kind]} for kind in a}


def _curve_minus(a: Array, b: Array) -> Array:
    bins = min(a.shape[1], b.shape[1])
    return a[:, :bins] - b[:, :bins]


def _why_missing(name: str, window: int, longest: int) -> str:
    _, end = range_frames(name, window, max(longest, (RANGES[name][0] + 1) * window))
    if end <= longest:
        return ""
    return f"no recording reaches frame {end}: the longest has {longest}"


def _percentiles(values: list[float]) -> dict[str, float]:
    p50, p95, p99 = np.percentile(values, [50, 95, 99]).tolist()
    return {"p50": p50, "p95": p95, "p99": p99}
