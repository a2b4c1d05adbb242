"""What an evaluation found, for people: tables and sentences, whatever they are written in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from eval.generalisation import generalisation_notes, generalisation_table
from eval.stats import RANGES, SCALAR
from eval.tables import Rows, as_markdown, as_text, fact_rows
from eval.verdict import HEADLINE, Results, findings, interval, judged, verdict

UNITS = (
    "Numbers are nats a frame, teacher-forced, less is better; attention sees {window} frames, the "
    "window; codebook 0 unless it says otherwise."
)
KIND_NAMES = {"codebook0": "codebook 0", "codebooks1_7": "codebooks 1-7", "text": "text"}


def range_table(results: Results, kind: str = HEADLINE) -> Rows:
    """NLL by position for each main arm, and the paired difference.

    The difference is of the memory that is kept to the one that is reset every window; of a model
    without memory, to its base.
    """
    arms = [a for a in ("base", "kept", "reset", "trained") if a in results["arms"]]
    difference = main_difference(results)
    header = ["windows", "frames", *(results["arms"][arm]["label"] for arm in arms)]
    if difference is not None:
        header.append(f"{difference['arm']} - {difference['minus']} [95 %]")
    rows = [header]
    for name, (start, end) in RANGES.items():
        if name == "1x-end":
            continue
        window = results["window_frames"]
        last = "end" if end is None else str(end * window)
        row = [name, f"{start * window}-{last}"]
        row += [_number(results["arms"][arm]["ranges"][kind][name]["mean"]) for arm in arms]
        if difference is not None:
            row.append(_interval(difference["ranges"][kind][name]))
        rows.append(row)
    return rows


def arm_table(results: Results, kind: str = HEADLINE) -> Rows:
    """Every arm over 1x to 4x of the window and beyond, and what the first is better by."""
    first = next((d["arm"] for d in results["differences"]), "kept")
    against = {d["minus"]: d for d in results["differences"] if d["arm"] == first}
    rows = [["", "arm", SCALAR, "perplexity", f"{first} - it [95 %]", "4x-end", f"{first} - it"]]
    for name, arm in results["arms"].items():
        scalar, beyond = (arm["ranges"][kind][span]["mean"] for span in (SCALAR, "4x-end"))
        row = [f"({arm['letter']})" if arm["letter"] else "", arm["label"], _number(scalar)]
        row.append(f"{math.exp(scalar):.2f}" if scalar < 700 else "-")  # exp overflows; NaN: no
        ranges = against[name]["ranges"][kind] if name in against else None
        row.append(_interval(ranges[SCALAR]) if ranges else "")
        row.append(_number(beyond))
        row.append(_interval(ranges["4x-end"]) if ranges else "")
        rows.append(row)
    return rows


def main_difference(results: Results) -> dict[str, Any] | None:
    """Kept minus reset; without those, the first there is."""
    found = {(d["arm"], d["minus"]): d for d in results["differences"]}
    return found.get(("kept", "reset")) or next(iter(found.values()), None)


def kinds(results: Results) -> list[str]:
    """The kinds of NLL that some arm has; the others are in `notes`."""
    return [
        kind
        for kind in KIND_NAMES
        if any(e["n"] for arm in results["arms"].values() for e in arm["ranges"][kind].values())
    ]


def notes(results: Results) -> list[str]:
    """What is missing from the tables, and why, or is not alike; one line each."""
    total = len(results["items"])
    spans: dict[tuple[str, str], dict[str, None]] = {}
    for arm in results["arms"].values():
        for kind, ranges in arm["ranges"].items():
            for span, found in ranges.items():
                reason = found["reason"]
                if not reason and found["n"] < total:
                    reason = f"{arm['label']}: {found['n']} of {total} recordings have it"
                if reason:
                    spans.setdefault((kind, reason), {})[span] = None
    names: dict[tuple[str, str], list[str]] = {}
    for (kind, reason), found in spans.items():
        where = "" if len(found) == len(RANGES) else f" from {', '.join(found)}"
        names.setdefault((where, reason), []).append(kind)
    lines = [f"{', '.join(k)}{where}: {reason}" for (where, reason), k in names.items()]
    frames = [item["frames"] for item in results["items"]]
    if min(frames) < max(frames):
        lines.append(
            f"curves end with the shortest recording, of {min(frames)} frames; the longest has "
            f"{max(frames)}"
        )
    for arm in results["arms"].values():
        lines += [f"{arm['label']}, {item}: {why}" for item, why in arm["broken"].items()]
    lines += [f"{f['name']} was left out: {f['reason']}" for f in results.get("failed", [])]
    return lines + results.get("left_out", []) + results.get("unlike", [])


def render(results: Results) -> str:
    """For a terminal, where the last lines are read first: tables, then the verdict."""
    parts = [
        UNITS.format(window=results["window_frames"]),
        as_text(range_table(results)),
        *_tables(results, as_text),
        *_lengths(results, as_text),
        verdict(results),
        _bullets(conditions(results)),
        measured(results),
        _bullets(notes(results)),
    ]
    return "\n\n".join(part for part in parts if part)


def markdown(results: Results, title: str, pictures: Sequence[str]) -> str:
    """A document: the verdict first, then pictures and all tables.

    Args:
        results: of `eval.summary.summarise`, with whatever else is known.
        title: of the document.
        pictures: names of files beside it.
    """
    missing = notes(results)
    parts = [f"# {title}", f"**{verdict(results)}**", _bullets(conditions(results))]
    parts += [UNITS.format(window=results["window_frames"])]
    parts += [f"![{name.split('.')[0].replace('_', ' ')}]({name})" for name in pictures]
    for kind in kinds(results):
        parts += [f"By position, {KIND_NAMES[kind]}:", as_markdown(range_table(results, kind))]
    parts += [*_tables(results, as_markdown), *_lengths(results, as_markdown)]
    parts += ["Not there, or not alike:", _bullets(missing)] if missing else []
    parts += [measured(results)]
    if facts := results.get("facts"):
        parts.append(as_markdown(fact_rows(facts)))
    return "\n\n".join(part for part in parts if part) + "\n"


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _tables(results: Results, table: Callable[[Rows], str]) -> list[str]:
    parts: list[str] = []
    for kind in kinds(results):
        parts.append(f"Every arm from 1x to 4x of the window and beyond, {KIND_NAMES[kind]}:")
        parts.append(table(arm_table(results, kind)))
    return parts


def _lengths(results: Results, table: Callable[[Rows], str]) -> list[str]:
    if "length" not in results:
        return []
    return [
        "Length generalisation, perplexity of codebook 0 over so many training segments:",
        table(generalisation_table(results["length"])),
        _bullets(generalisation_notes(results["length"])),
    ]


def conditions(results: Results) -> list[str]:
    """The findings behind the verdict, one line each; none where there is no memory to judge."""
    if not judged(results):
        return []
    marks = {True: "holds", False: "does not hold", None: "open"}
    return [f"{marks[f.holds]}: {f.text}" for f in findings(results)]


def measured(results: Results) -> str:
    """How it was measured: statistics, time of a frame, and what the memories did."""
    items, boot = results["items"], results["bootstrap"]
    speakers = len({item["speaker"] for item in items})
    lines = [
        f"{len(items)} recordings of {speakers} speakers, means over recordings, 95 % intervals by "
        f"bootstrap over {boot['over']} ({boot['resamples']} resamples, seed {boot['seed']}).",
        f"Calls of {results['frames_per_call']} frames, {results['rows']} recordings at a time, "
        "took in ms a frame (of 80 ms; p50/p95/p99):",
    ]
    times = []
    for name, arm in results["arms"].items():
        ms = arm["ms_per_frame"]
        times.append(f"{name} {ms['p50']:.2f}/{ms['p95']:.2f}/{ms['p99']:.2f}")
    lines.append(", ".join(times) + ".")
    kept = results["arms"].get("kept")
    if kept is not None and kept["state_norm"]:
        norms = [max(blocks.values()) for blocks in kept["state_norm"].values()]
        moved = [max(blocks.values()) for blocks in kept["state_moved"].values()]
        lines.append(
            f"Fast weights at the end, largest block: norm {min(norms):.3g} to {max(norms):.3g}, "
            f"distance from W0 {min(moved):.3g} to {max(moved):.3g}."
        )
    if memory := results.get("memory_bytes"):
        start, end = (memory[when] / 2**20 for when in ("start", "end"))
        lines.append(f"Memory at start and end: {start:,.0f} and {end:,.0f} MiB.")
    broken = sum(len(arm["broken"]) for arm in results["arms"].values())
    lines.append(f"Recordings with an NLL that is no number: {broken}.")
    return " ".join(lines)


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"


def _interval(found: dict[str, Any]) -> str:
    return f"{found['mean']:+.4f} {interval(found)}" if math.isfinite(found["mean"]) else "-"
