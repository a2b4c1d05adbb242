"""From NLL by frame to numbers one may quote: ranges, curves, differences, 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RESAMPLES, SEED = 10_000, 0
"""Of the bootstrap over speakers."""
BLOCK = 500
"""Resamples that are drawn at a time."""
RANGES: dict[str, tuple[int, int | None]] = {
    "0-1x": (0, 1),
    "1x-2x": (1, 2),
    "2x-4x": (2, 4),
    "1x-4x": (1, 4),
    "4x-end": (4, None),
    "1x-end": (1, None),
}
"""Name -> first and last frame in windows; the end None is the recording's own, if that is a window
or more away."""
SCALAR = "1x-4x"
"""The one number fixed beforehand: mean NLL of codebook 0 over this range."""


@dataclass(frozen=True)
class Estimate:
    """A mean over recordings with its interval.

    Attributes:
        mean: NaN if it cannot be computed; then `reason` says why.
        low: lower end of the 95 % interval, likewise.
        high: upper end.
        n: recordings behind the mean.
        reason: what is missing, empty if nothing is.
    """

    mean: float
    low: float
    high: float
    n: int
    reason: str = ""

    def to_dict(self) -> dict[str, float | int | str]:
        """As plain values."""
        return {
            "mean": self.mean,
            "low": self.low,
            "high": self.high,
            "n": self.n,
            "reason": self.reason,
        }


def default_bin(window: int) -> int:
    """Frames of one bin of a curve: 250 (20 s), but at most half a window."""
    return min(250, max(window // 2, 1))


def range_frames(name: str, window: int, frames: int) -> tuple[int, int]:
    """First frame of a range and the one after its last, in a recording of `frames`."""
    start, end = RANGES[name]
    return start * window, frames if end is None else end * window


def range_mean(nll: Array, name: str, window: int, frames: int | None = None) -> float:
    """Mean over the frames of a range; NaN if the recording does not reach its end.

    Args:
        nll: [T] nats, NaN where nothing is predicted.
        name: a key of `RANGES`.
        window: frames that attention sees.
        frames: of the recording, if more than are scored; what was not scored has no mean.
    """
    start, end = range_frames(name, window, frames or len(nll))
    whole = end - start >= window and end <= len(nll)
    return mean_of(nll[start:end]) if whole else float("nan")


def binned(nll: Sequence[Array], bin_frames: int) -> Array:
    """[N, bins] mean of each recording in each whole bin that all recordings reach.

    The curve ends with the shortest recording, so that it never bends because one dropped out.
    """
    bins = min(len(x) for x in nll) // bin_frames
    return np.array(
        [[mean_of(x[i * bin_frames : (i + 1) * bin_frames]) for i in range(bins)] for x in nll]
    ).reshape(len(nll), bins)


def bootstrap(values: Array, speakers: Sequence[str]) -> tuple[Array, Array]:
    """95 % intervals of the column means, by drawing speakers with replacement.

    Percentile interval over `RESAMPLES` draws from `SEED`; all recordings of a drawn speaker come
    with it. NaN values are left out of their column.

    Args:
        values: [N, M], one row a recording.
        speakers: N names.

    Returns:
        Lower and upper ends, [M] each; NaN for a column with fewer than two speakers.
    """
    if len(speakers) != len(values):
        raise ValueError(f"{len(values)} recordings, but {len(speakers)} speakers")
    _, cluster = np.unique(np.asarray(speakers), return_inverse=True)
    groups = int(cluster.max()) + 1
    known = np.isfinite(values)
    sums, counts = np.zeros((2, groups, values.shape[1]))
    np.add.at(sums, cluster, np.where(known, values, 0.0))
    np.add.at(counts, cluster, known)
    means = np.concatenate([_means(drawn, sums, counts) for drawn in _draws(groups)])
    enough = (counts > 0).sum(0) >= 2
    low, high = np.full((2, values.shape[1]), np.nan)
    if enough.any():
        ends = np.nanpercentile(means[:, enough], [2.5, 97.5], axis=0)
        low[enough], high[enough] = ends
    return low, high


def _means(drawn: NDArray[Any], sums: Array, counts: Array) -> Array:
    n = drawn @ counts
    return np.where(n > 0, (drawn @ sums) / np.maximum(n, 1), np.nan)


@lru_cache(maxsize=1)
def _draws(groups: int) -> Sequence[NDArray[Any]]:
    """How often each group is drawn, [RESAMPLES, groups] in blocks; the same for all that is drawn.

    Of thousands of groups the counts are kept in one byte each: a float would take gigabytes.
    """
    rng = np.random.default_rng(SEED)
    chances = np.full(groups, 1 / groups)
    blocks = [rng.multinomial(groups, chances, size=BLOCK) for _ in range(RESAMPLES // BLOCK)]
    return [block.astype(np.float64 if groups <= 1000 else np.uint8) for block in blocks]


def estimate(values: Array, speakers: Sequence[str], missing: str) -> Estimate:
    """Mean of [N] values with its interval; NaN with a reason where there is none.

    Args:
        values: one a recording, NaN where it has none.
        speakers: N names.
        missing: why a recording may have no value, e.g. `"no recording reaches frame 200"`.
    """
    known = np.isfinite(values)
    n = int(known.sum())
    if n == 0:
        nan = float("nan")
        return Estimate(nan, nan, nan, n, missing)
    low, high = bootstrap(values[:, None], speakers)
    few = len({s for s, k in zip(speakers, known, strict=True) if k}) < 2
    reason = "one speaker only: no interval" if few else ""
    return Estimate(float(values[known].mean()), float(low[0]), float(high[0]), n, reason)


def curve(values: Array, speakers: Sequence[str]) -> dict[str, list[float]]:
    """Column means of [N, bins] with their intervals."""
    low, high = bootstrap(values, speakers)
    mean = [mean_of(column) for column in values.T]
    return {"mean": mean, "low": low.tolist(), "high": high.tolist()}


def mean_of(values: Array) -> float:
    """Mean of what is finite; NaN if nothing is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
