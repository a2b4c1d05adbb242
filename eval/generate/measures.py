"""What minutes of free speech are like: entropy, repetition, level, silence, state; and change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from eval.generate.running import Array, Plan, Run
from eval.stats import RESAMPLES, SEED, estimate, mean_of
from eval.verdict import FEWEST_SPEAKERS as FEWEST_STREAMS
from moshi_ttt.sound import FRAME

SILENT_DBFS = -50.0
"""A frame of 80 ms below this RMS is silent."""
NGRAMS = (1, 2, 3, 4)
MEASURES = {
    "entropy": "entropy of codebook 0 as drawn (nats)",
    "code_entropy": "entropy of its codes, counted (nats)",
    **{f"distinct_{n}": f"distinct {n}-grams of codebook 0" for n in NGRAMS},
    **{f"before_{n}": f"{n}-grams said in an earlier bin" for n in NGRAMS},
    "level_dbfs": "level (dBFS, RMS)",
    "silence": f"silent frames (under {SILENT_DBFS:g} dBFS)",
    "state_norm": "norm of the fast weights",
    "state_moved": "their distance from W0",
}
JUDGED = ("entropy", "distinct_2", "level_dbfs", "silence")
"""What a verdict is given on, fixed beforehand."""
QUARTER = 4

Codes = NDArray[np.int64]


def distinct(codes: Codes, n: int) -> float:
    """Distinct n-grams over n-grams of [T] codes; NaN where there is none."""
    grams = _grams(codes, n)
    return len(np.unique(grams)) / len(grams) if len(grams) else float("nan")


def said_before(codes: Codes, earlier: Codes, n: int) -> float:
    """Share of the n-grams of [T] codes that are among those of `earlier`; NaN without any."""
    both = _grams(np.concatenate([earlier, codes]), n)  # of one numbering
    old, new = both[: max(0, len(earlier) - n + 1)], both[len(earlier) :]
    return float(np.isin(new, old).mean()) if len(old) and len(new) else float("nan")


def counted_entropy(codes: Codes) -> float:
    """Nats, of how often each of [T] codes occurs; at most log T, and low for few codes."""
    _, counts = np.unique(codes, return_counts=True)
    share = counts / counts.sum()
    return float(np.abs((share * np.log(share)).sum()))


def level(power: Array) -> float:
    """dBFS, RMS over frames of that mean square; minus infinity for digital silence."""
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(power.mean()))


def silence(power: Array) -> float:
    """Share of frames whose RMS is below `SILENT_DBFS`."""
    return float((power < 10 ** (SILENT_DBFS / 10)).mean())


def _grams(codes: Codes, n: int) -> Codes:
    """A number for each n-gram; within a call the same number is the same n-gram."""
    if len(codes) < n:
        return np.zeros(0, np.int64)
    _, small = np.unique(codes, return_inverse=True)
    weights = (int(small.max()) + 1) ** np.arange(n)  # 2048 ** 4 is far from 2 ** 63
    return sliding_window_view(small, n) @ weights


def measured(run: Run, plan: Plan) -> dict[str, Any]:
    """All measures of an arm by bin, and why where one is missing.

    Returns:
        `measures[name]` with `streams` [streams, bins] and `mean` [bins], NaN where it cannot be
        computed, and then `missing[name][bin, from 1]` says why; `blocks[kind][block]` [streams,
        bins], kind `state_norm` or `state_moved`.
    """
    bins = -(-plan.frames // plan.bin_frames)
    values = {name: np.full((plan.streams, bins), np.nan) for name in MEASURES}
    missing: dict[str, dict[str, str]] = {}
    for b in range(bins):
        start, end = b * plan.bin_frames, (b + 1) * plan.bin_frames
        there = run.codes.shape[1]
        if there < end:
            why = run.broken or f"only {there - start} of {plan.bin_frames} frames"
            for name in MEASURES:
                missing.setdefault(name, {})[str(b + 1)] = why
            continue
        for s in range(plan.streams):
            for name, value in _of_bin(run, s, start, end).items():
                if np.isfinite(value):
                    values[name][s, b] = value
                else:
                    missing.setdefault(name, {})[str(b + 1)] = _why(name, s, b)
    blocks: dict[str, dict[str, Array]] = {
        "state_norm": run.state_norm, "state_moved": run.state_moved
    }  # fmt: skip
    for kind, found in blocks.items():
        if not found and not run.broken:
            missing[kind] = {"all": "the model has no memory"}
        for norms in found.values():
            squares = np.nan_to_num(values[kind][:, : norms.shape[1]]) ** 2
            values[kind][:, : norms.shape[1]] = np.sqrt(squares + norms**2)
    return {
        "measures": {
            name: {"mean": [mean_of(column) for column in v.T], "streams": v.tolist()}
            for name, v in values.items()
        },
        "missing": missing,
        "blocks": {k: {n: v.tolist() for n, v in found.items()} for k, found in blocks.items()},
    }


def _of_bin(run: Run, stream: int, start: int, end: int) -> dict[str, float]:
    codes, power = run.codes[stream], run.power[stream, start:end]
    valid = codes[start:end][codes[start:end] >= 0]  # a row may have nothing to say at first
    earlier = codes[:start][codes[:start] >= 0]
    return {
        "entropy": float(run.entropy[stream, start:end].mean()),
        "code_entropy": counted_entropy(valid) if len(valid) else float("nan"),
        **{f"distinct_{n}": distinct(valid, n) for n in NGRAMS},
        **{f"before_{n}": said_before(valid, earlier, n) for n in NGRAMS},
        "level_dbfs": level(power),
        "silence": silence(power),
    }


def _why(name: str, stream: int, number: int) -> str:
    if name.startswith("before") and number == 0:
        return "nothing was said before"
    if name == "level_dbfs":
        return f"stream {stream + 1} is digital silence: minus infinity"
    return f"stream {stream + 1} has too few codes"


def summarise(arms: dict[str, dict[str, Any]], plan: Plan, reference: str) -> dict[str, Any]:
    """Add to each arm how its last quarter differs from its first, and that less the reference's.

    Args:
        arms: name -> label, letter and what `measured` gave; `change` and `against` are added.
        plan: of all.
        reference: name of the arm without memory.

    Returns:
        The results: the arms, the plan, and what `change` is over.
    """
    bins = plan.frames // plan.bin_frames
    part = max(1, bins // QUARTER)
    moved: dict[str, dict[str, Array]] = {}
    for name, arm in arms.items():
        found = {m: np.array(arm["measures"][m]["streams"])[:, :bins] for m in JUDGED}
        first, last = (
            # a stream that lacks a bin has no mean: none is over fewer bins than the others'
            {m: v[:, cut].mean(1) for m, v in found.items()}
            for cut in (slice(0, part), slice(bins - part, bins))
        )
        if bins < 2:
            last = {m: np.full_like(v, np.nan) for m, v in last.items()}
        moved[name] = {m: last[m] - first[m] for m in JUDGED}
        arm["change"] = {
            m: {
                "first": mean_of(first[m]),
                "last": mean_of(last[m]),
                **_estimate(moved[name][m], bins, arm["missing"].get(m)),
            } for m in JUDGED
        }  # fmt: skip
    for name, arm in arms.items():
        arm["against"] = {} if name == reference else {
            m: _estimate(
                moved[name][m] - moved[reference][m], bins,
                arm["missing"].get(m) or arms[reference]["missing"].get(m),
            ) for m in JUDGED
        }  # fmt: skip
    return {
        "frames": plan.frames,
        "bin_frames": plan.bin_frames,
        "window_frames": plan.window,
        "streams": plan.streams,
        "seed": plan.seed,
        "sampling": vars(plan.sampling),
        "heard_frames": -(-len(plan.heard) // FRAME),
        "silent_dbfs": SILENT_DBFS,
        "quarter": {"first": [1, part], "last": [bins - part + 1, bins]},
        "reference": reference,
        "bootstrap": {"over": "streams", "resamples": RESAMPLES, "seed": SEED},
        "arms": arms,
    }


def _estimate(moved: Array, bins: int, missing: dict[str, str] | None) -> dict[str, Any]:
    """A mean over streams; with an interval if there are enough of them, else why not."""
    why = next(iter((missing or {}).values()), "") if bins > 1 else "there is one whole bin only"
    found = estimate(moved, [str(s) for s in range(len(moved))], why)
    nan = float("nan")
    if 0 < found.n < FEWEST_STREAMS:
        lost = f", {len(moved) - found.n} lack it: {why}" if found.n < len(moved) else ""
        few = f"{found.n} streams are too few for an interval (it takes {FEWEST_STREAMS}){lost}"
        found = replace(found, low=nan, high=nan, reason=few)
    elif found.n < len(moved):
        found = replace(found, reason=why)
    return found.to_dict()
