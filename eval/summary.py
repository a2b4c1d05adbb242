"""What several arms' scores say: means by range and position, paired differences, intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.perplexity import FRAMES_PER_CALL
from eval.scores import KINDS, Item, Scores
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

LABELS = {
    "base": "stock base",
    "kept": "memory kept",
    "reset": "memory reset every window",
    "off": "writing off (proves nothing: a model trained with it misses it everywhere)",
    "trained": "trained model (no memory)",
}
"""Arms that are known by name; any other is a baseline under its own name."""


def summarise(
    scores: dict[str, Scores],
    items: Sequence[Item],
    window: int,
    *,
    training_frames: int | None = None,
    bin_frames: int | None = None,
    frames_per_call: int = FRAMES_PER_CALL,
) -> dict[str, Any]:
    """Means by range and position for every arm, and paired differences, with 95 % intervals.

    Returns:
        Plain values (NaN where something cannot be computed, with a `reason` beside it):
        `arms[name]` with `ranges[kind][range]`, `curve[kind]`, `recordings[item][kind][range]`;
        `differences` of the memory that is kept to each other arm; `window_frames` and so on.

    Raises:
        ValueError: no items, or two of one name.
    """
    if not items or len({item.name for item in items}) < len(items):
        raise ValueError(f"items must be there, and of different names: {[i.name for i in items]}")
    bin_frames = bin_frames or default_bin(window)
    speakers = [item.speaker for item in items]
    lengths = [item.codes.shape[-1] for item in items]
    tables = {arm: _by_range(s, window) for arm, s in scores.items()}
    bins = {
        arm: {kind: binned(s.nll[kind], bin_frames) for kind in KINDS} for arm, s in scores.items()
    }
    missing = {name: _why_missing(name, window, max(lengths)) for name in RANGES}
    estimates = _Estimates(speakers, missing, any(item.text_known for item in items))
    first = "kept" if "kept" in scores else "trained"
    return {
        "window_frames": window,
        "training_frames": training_frames,
        "bin_frames": bin_frames,
        "frames_per_call": frames_per_call,
        "bootstrap": {"over": "speakers", "resamples": RESAMPLES, "seed": SEED},
        "scalar": {"kind": "codebook0", "range": SCALAR, "frames": [window, 4 * window]},
        "items": [
            {"name": i.name, "speaker": i.speaker, "frames": n}
            for i, n in zip(items, lengths, strict=True)
        ],
        "arms": {
            arm: {
                "label": LABELS.get(arm, arm),
                "ranges": estimates.of(tables[arm]),
                "curve": {k: curve(bins[arm][k], speakers) for k in KINDS},
                "recordings": {
                    item.name: {k: {n: float(v[i]) for n, v in t.items()} for k, t in table.items()}
                    for i, item in enumerate(items)
                },
                "nan_in_valid_places": 0,  # `score` raises at the first one
                "ms_per_frame": _percentiles(s.ms_per_frame),
                "state_norm": s.state_norm,
                "state_moved": s.state_moved,
            }
            for arm, s, table in ((a, scores[a], tables[a]) for a in scores)
        },
        "differences": [
            {
                "arm": first,
                "minus": other,
                "ranges": estimates.of(_minus(tables[first], tables[other])),
                "curve": {k: curve(bins[first][k] - bins[other][k], speakers) for k in KINDS},
            }
            for other in scores
            if first in scores and other != first
        ],
    }


Table = dict[str, dict[str, Array]]  # kind -> range -> [N]


@dataclass(frozen=True)
class _Estimates:
    speakers: list[str]
    missing: dict[str, str]
    text_known: bool

    def of(self, table: Table) -> dict[str, dict[str, Any]]:
        return {
            kind: {
                name: estimate(values, self.speakers, self._reason(kind, name)).to_dict()
                for name, values in ranges.items()
            }
            for kind, ranges in table.items()
        }

    def _reason(self, kind: str, name: str) -> str:
        if kind == "text" and not self.text_known:
            return "no transcript"
        return self.missing[name] or f"no {kind} to predict there"


def _by_range(scores: Scores, window: int) -> Table:
    return {
        kind: {
            name: np.array([range_mean(nll, name, window) for nll in scores.nll[kind]])
            for name in RANGES
        }
        for kind in KINDS
    }


def _minus(a: Table, b: Table) -> Table:
    return {kind: {name: a[kind][name] - b[kind][name] for name in a[kind]} for kind in a}


def _why_missing(name: str, window: int, longest: int) -> str:
    _, end = range_frames(name, window, max(longest, RANGES[name][0] * window + 1))
    if end <= longest:
        return ""
    return f"no recording reaches frame {end}: the longest has {longest}"


def _percentiles(values: list[float]) -> dict[str, float]:
    p50, p95, p99 = np.percentile(values, [50, 95, 99]).tolist()
    return {"p50": p50, "p95": p95, "p99": p99}
