"""What was found, as tables for people and as one object for machines."""

from __future__ import annotations

import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.check.findings import ERROR, KINDS, NOTE, Finding
from finetune.check.recording import Checked

LISTED = 20
"""Findings of a kind that are listed unless all are asked for."""
LONGEST = 200
"""Characters of a name or a detail that are shown."""
EDGES = {10: "10 s", 30: "30 s", 60: "1 min", 300: "5 min", 1800: "30 min", 3600: "1 h"}
"""Of the histogram of durations, in seconds."""


def summary(checked: Sequence[Checked]) -> dict[str, Any]:
    """Numbers over some recordings; broken ones count as recordings only."""
    seconds = [c.seconds for c in checked if c.seconds > 0]
    spoken = sum(c.word_seconds for c in checked)
    return {
        "recordings": len(checked),
        "hours": sum(seconds) / 3600,
        "hours_by_channels": {
            name: sum(c.seconds for c in checked if c.channels == n) / 3600
            for n, name in ((1, "mono"), (2, "stereo"))
        },
        "seconds": {
            "min": min(seconds, default=0.0),
            "median": statistics.median(seconds) if seconds else 0.0,
            "max": max(seconds, default=0.0),
        },
        "histogram": _histogram(seconds),
        "sample_rates": dict(sorted(Counter(r for c in checked for r in c.rates).items())),
        "transcripts": sum(c.transcribed for c in checked),
        "words": sum(c.words for c in checked),
        "main_share": sum(c.main_seconds for c in checked) / spoken if spoken else None,
    }


def _histogram(seconds: Sequence[float]) -> dict[str, int]:
    names = [f"under {next(iter(EDGES.values()))}", *(f"from {name}" for name in EDGES.values())]
    counts = dict.fromkeys(names, 0)
    for value in seconds:
        counts[names[sum(value >= edge for edge in EDGES)]] += 1
    return counts


def as_json(checked: Sequence[Checked], findings: Sequence[Finding]) -> dict[str, Any]:
    """Everything, for machines."""
    return {
        "ready": not any(KINDS[f.kind].severity == ERROR for f in findings),
        "summary": summary(checked),
        "manifests": {str(m): summary(c) for m, c in _by_manifest(checked).items()},
        "counts": dict(Counter(f.kind for f in findings)),
        "findings": [
            {
                "kind": f.kind,
                "severity": KINDS[f.kind].severity,
                "manifest": str(f.manifest),
                "line": f.line,
                "file": f.file,
                "detail": f.detail,
                "advice": KINDS[f.kind].advice,
            }
            for f in findings
        ],
    }


def as_text(
    checked: Sequence[Checked], findings: Sequence[Finding], listed: int | None = LISTED
) -> str:
    """Tables, what to fix, and a closing line; `listed` findings of a kind, None for all."""
    parts = [_overview(checked), _rest(summary(checked))]
    if findings:
        parts += [_counts(findings), *_to_fix(findings, listed)]
    parts.append(closing(findings))
    return "\n\n".join(parts)


def closing(findings: Sequence[Finding]) -> str:
    """One line: ready or not."""
    errors = [f for f in findings if KINDS[f.kind].severity == ERROR]
    notes = len(findings) - len(errors)
    more = f" ({several(notes, 'note')})" if notes else ""
    if not errors:
        return f"ready{more}"
    files = len({(f.manifest, f.line, f.file) for f in errors})
    return f"not ready: {several(len(errors), 'problem')} in {several(files, 'file')}{more}"


def several(number: int, what: str) -> str:
    """A number of things, as one says it."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """What the terminal can show of a text: a file's name may hold anything."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _by_manifest(checked: Sequence[Checked]) -> dict[Path, list[Checked]]:
    found: dict[Path, list[Checked]] = defaultdict(list)
    for one in checked:
        found[one.line.manifest].append(one)
    return found


def _overview(checked: Sequence[Checked]) -> str:
    header = "manifest recordings hours mono stereo transcripts words SPEAKER_MAIN"
    rows: list[Sequence[str]] = [header.split()]
    groups: dict[str, Sequence[Checked]] = {str(m): c for m, c in _by_manifest(checked).items()}
    if len(groups) > 1:
        groups["all"] = checked
    for name, group in groups.items():
        s = summary(group)
        hours = s["hours_by_channels"]
        rows.append(
            [
                name, str(s["recordings"]), f"{s['hours']:.2f}", f"{hours['mono']:.2f}",
                f"{hours['stereo']:.2f}", str(s["transcripts"]), str(s["words"]),
                "-" if s["main_share"] is None else f"{s['main_share']:.0%}",
            ]
        )  # fmt: skip
    return _table(rows)


def _rest(s: dict[str, Any]) -> str:
    length = s["seconds"]
    rates = ", ".join(f"{n} at {rate} Hz" for rate, n in s["sample_rates"].items()) or "-"
    spread = ", ".join(f"{name}: {n}" for name, n in s["histogram"].items() if n) or "-"
    return (
        f"durations     min {length['min']:.1f} s, median {length['median']:.1f} s, "
        f"max {length['max']:.1f} s\n"
        f"              {spread}\n"
        f"sample rates  {rates}"
    )


def _counts(findings: Sequence[Finding]) -> str:
    counts = Counter(f.kind for f in findings)
    rows = [["severity", "finding", "count"]]
    rows += [[KINDS[k].severity, k, str(counts[k])] for k in KINDS if k in counts]
    return _table(rows, left=2)


def _to_fix(findings: Sequence[Finding], listed: int | None) -> Iterator[str]:
    for severity in (ERROR, NOTE):
        for kind, (its, advice) in KINDS.items():
            found = [f for f in findings if f.kind == kind]
            if its != severity or not found:
                continue
            lines = [f"{kind} ({severity}): {advice}"]
            for f in found[:listed]:
                where = f"{f.manifest}:{f.line}" if f.line else str(f.manifest)
                lines.append(
                    "  ".join(["", *filter(None, map(_one_line, (where, f.file, f.detail)))])
                )
            if len(found) > len(found[:listed]):
                lines.append(f"  ... and {len(found) - len(found[:listed])} more (--all)")
            yield "\n".join(lines)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 3]} ... {line[-LONGEST // 2 :]}"


def _table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
