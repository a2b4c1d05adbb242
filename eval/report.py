"""What an evaluation found, for people: tables, one sentence, and the picture."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from eval.stats import RANGES, SCALAR

FRAME_SECONDS = 0.08
HEADLINE = "codebook0"
FEWEST_SPEAKERS = 6
"""With fewer, even speakers who all agree do so by chance in more than 5 % of cases (2 / 2^n)."""
_SHORT = {"off": "writing off (proves nothing)"}

Results = dict[str, Any]
"""What `eval.summary.summarise` returns."""


def range_table(results: Results) -> list[list[str]]:
    """Rows of cells: codebook 0 by position for each main arm, and the paired difference.

    The difference is of the memory that is kept to the one that is reset every window; of a model
    without memory, to its base.
    """
    arms = [a for a in ("base", "kept", "reset", "trained") if a in results["arms"]]
    difference = main_difference(results)
    header = ["windows", "frames", *(arm_label(results, arm) for arm in arms)]
    if difference is not None:
        header.append(f"{difference['arm']} - {difference['minus']} [95 %]")
    rows = [header]
    for name, (start, end) in RANGES.items():
        if name == "1x-end":
            continue
        window = results["window_frames"]
        last = "end" if end is None else str(end * window)
        row = [name, f"{start * window}-{last}"]
        row += [_number(_estimate(results["arms"][arm], name)["mean"]) for arm in arms]
        if difference is not None:
            row.append(_interval(_estimate(difference, name)))
        rows.append(row)
    return rows


def arm_table(results: Results) -> list[list[str]]:
    """Rows of cells: every arm over 1x to 4x of the window, and what the first is better by."""
    rows = [["arm", "codebook 0", "perplexity", "codebooks 1-7", "text", "kept - it [95 %]"]]
    against = {d["minus"]: d for d in results["differences"]}
    if results["differences"]:
        rows[0][-1] = f"{results['differences'][0]['arm']} - it [95 %]"
    for name, arm in results["arms"].items():
        mean = {k: arm["ranges"][k][SCALAR]["mean"] for k in arm["ranges"]}
        rows.append(
            [
                arm_label(results, name),
                _number(mean["codebook0"]),
                f"{math.exp(mean['codebook0']):.2f}" if mean["codebook0"] < 700 else "-",
                _number(mean["codebooks1_7"]),
                _number(mean["text"]),
                _interval(_estimate(against[name], SCALAR)) if name in against else "",
            ]
        )
    return rows


def main_difference(results: Results) -> dict[str, Any] | None:
    """Kept minus reset; without those, the first there is."""
    found = {(d["arm"], d["minus"]): d for d in results["differences"]}
    return found.get(("kept", "reset")) or next(iter(found.values()), None)


def verdict(results: Results) -> str:
    """One sentence that follows from the numbers, whoever wins."""
    difference = main_difference(results)
    if difference is None:
        return "No verdict: there is nothing to compare with."
    found = _estimate(difference, SCALAR)
    names = {
        "kept": "the memory that is kept",
        "reset": "the one reset every window",
        "base": "the stock base",
        "trained": "the trained model",
    }
    one, other = (names.get(difference[k], difference[k]) for k in ("arm", "minus"))
    if not math.isfinite(found["mean"]):
        return f"No verdict: from 1x to 4x of the window, {found['reason']}."
    speakers = len({item["speaker"] for item in results["items"]})
    size = f"{abs(found['mean']):.4f} nats a frame"
    interval = f"95 % interval {found['low']:+.4f} to {found['high']:+.4f}"
    where = f"eyond the window (1x to 4x), over {found['n']} recordings"
    if speakers < FEWEST_SPEAKERS or not math.isfinite(found["low"]):
        return (
            f"No verdict: b{where}, {one} differs by {found['mean']:+.4f} nats a frame from "
            f"{other}, but {speakers} speakers are too few to judge by; it takes {FEWEST_SPEAKERS}."
        )
    if found["high"] < 0:
        said = f"{one} predicts codebook 0 better than {other}, by {size} ({interval})"
    elif found["low"] > 0:
        said = f"{one} predicts codebook 0 WORSE than {other}, by {size} ({interval})"
    else:
        said = (
            f"no difference is shown between {one} and {other}: {found['mean']:+.4f} nats a frame "
            f"({interval})"
        )
    return f"B{where}, {said}."


def notes(results: Results) -> list[str]:
    """What is missing from the tables, and why; one line each."""
    total = len(results["items"])
    spans: dict[tuple[str, str], dict[str, None]] = {}
    for arm in results["arms"].values():
        for kind, ranges in arm["ranges"].items():
            for span, found in ranges.items():
                reason = found["reason"]
                if not reason and found["n"] < total:
                    reason = f"{found['n']} of {total} recordings have it"
                if reason:
                    spans.setdefault((kind, reason), {})[span] = None
    kinds: dict[tuple[str, str], list[str]] = {}
    for (kind, reason), names in spans.items():
        where = "" if len(names) == len(RANGES) else f" from {', '.join(names)}"
        kinds.setdefault((where, reason), []).append(kind)
    return [f"{', '.join(k)}{where}: {reason}" for (where, reason), k in kinds.items()]


def render(results: Results, table: Callable[[list[list[str]]], str]) -> str:
    """The whole report: both tables, the verdict, what is missing, and how it was measured.

    Args:
        results: of `eval.summary.summarise`.
        table: `as_text` or `as_markdown`.
    """
    window, items = results["window_frames"], results["items"]
    parts = [
        f"NLL of codebook 0 in nats by position; attention sees {window} frames "
        f"({window * FRAME_SECONDS:g} s), the window:",
        table(range_table(results)),
        "Every arm from 1x to 4x of the window; NLL in nats, perplexity of codebook 0:",
        table(arm_table(results)),
        verdict(results),
    ]
    if missing := notes(results):
        parts.append("Not there: " + "; ".join(missing) + ".")
    boot = results["bootstrap"]
    speakers = len({item["speaker"] for item in items})
    parts.append(
        f"{len(items)} recordings of {speakers} speakers, means over recordings, 95 % intervals by "
        f"bootstrap over {boot['over']} ({boot['resamples']} resamples, seed {boot['seed']}). "
        + _measured(results)
    )
    return "\n\n".join(parts)


def _measured(results: Results) -> str:
    lines = [
        f"Calls of {results['frames_per_call']} frames took, in ms a frame of 80 ms (p50/p95/p99):"
    ]
    times = []
    for name, arm in results["arms"].items():
        ms = arm["ms_per_frame"]
        times.append(f"{name} {ms['p50']:.2f}/{ms['p95']:.2f}/{ms['p99']:.2f}")
    lines.append(", ".join(times) + ".")
    kept = results["arms"].get("kept")
    if kept is not None:
        norms = [max(blocks.values()) for blocks in kept["state_norm"].values()]
        moved = [max(blocks.values()) for blocks in kept["state_moved"].values()]
        lines.append(
            f"Fast weights at the end, largest block: norm {min(norms):.3g} to {max(norms):.3g}, "
            f"distance from W0 {min(moved):.3g} to {max(moved):.3g}."
        )
    return " ".join(lines)


def as_text(rows: list[list[str]]) -> str:
    """Columns aligned for a terminal."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def as_markdown(rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "| --- |" + " ---: |" * (len(rows[0]) - 1))
    return "\n".join(lines)


def _estimate(part: dict[str, Any], name: str) -> dict[str, Any]:
    return part["ranges"][HEADLINE][name]


def arm_label(results: Results, arm: str) -> str:
    """An arm's name in a table or legend."""
    return _SHORT.get(arm) or str(results["arms"][arm]["label"])


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"


def _interval(found: dict[str, Any]) -> str:
    if not math.isfinite(found["mean"]):
        return "-"
    if not math.isfinite(found["low"]):
        return f"{found['mean']:+.4f} [no interval]"
    return f"{found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"
