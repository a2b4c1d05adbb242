"""The table and the picture of all memories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from eval.bench.runs import recordings
from eval.plot import new_figure
from eval.stats import SCALAR, Array, estimate
from eval.tables import as_markdown as table
from eval.tables import fact_rows

RANGES = (SCALAR, "4x-end")
TOKENS_A_STEP = 8 * 300 * 17
"""Of configs/tiny*.yaml: 8 rows of 24 s, of 17 streams."""


def compared(
    runs: Sequence[Path], off: Sequence[Path] | None, baseline: Sequence[Path]
) -> dict[str, Any]:
    """NLL of a memory and its differences from writing off and from a baseline, by range.

    A recording's value is its mean over the seeds; intervals are 95 % cluster bootstrap over
    speakers, each of which reads one recording.

    Args:
        runs: one a seed.
        off: the same trained with writing off; None if there is nothing to switch off.
        baseline: what all are told from.
    """
    row: dict[str, Any] = {}
    for key in RANGES:
        mine, names = _values(runs, key)
        row[key] = estimate(mine.mean(0), names, f"no recording has {key}").to_dict()
        for what, others in (("writing off", off), ("baseline", baseline)):
            if others is None or others == runs:
                continue
            gap = mine - _values(others, key)[0]
            found = estimate(gap.mean(0), names, f"no recording has {key}").to_dict()
            row[f"{key} minus {what}"] = found | {"seeds": gap.mean(1).tolist()}
    return row


def _values(runs: Sequence[Path], key: str) -> tuple[Array, list[str]]:
    """[seeds, recordings] NLL, and the recordings' names."""
    found = [recordings(run) for run in runs]
    names = sorted(found[0])
    return np.array([[one[name][key] for name in names] for one in found]), names


def as_markdown(rows: Sequence[dict[str, Any]], seeds: int, about: dict[str, str]) -> str:
    """The page."""
    header = ["", "1x-4x", "minus LoRA only", "minus writing off", "4x-end", "minus LoRA only",
              "minus writing off", "state", "ms a frame", "tokens/s in training"]  # fmt: skip
    cells = [header]
    for row in rows:
        line = [row["memory"]]
        for key in RANGES:
            line.append(f"{row[key]['mean']:.4f}")
            line += [_gap(row.get(f"{key} minus {what}")) for what in ("baseline", "writing off")]
        state = row["state_bytes"]
        line.append(f"{state / 2**20:.2f} MiB" if state else "")
        line += [f"{row['ms_per_frame']:.2f}", f"{row['tokens_per_s']:,.0f}"]
        cells.append(line)
    notes = "".join(
        f"- {row['memory']}: {row['parameters']:,} trained parameters\n" for row in rows
    )
    return (
        "# Memories\n\nThe embedded speech, configs/tiny*.yaml, "
        f"{about['steps of training']} steps, {seeds} seeds, 24 held-out voices. NLL of codebook 0 "
        "in nats, memory kept, by position in windows of attention; differences with the 95 % "
        "cluster bootstrap over voices of the mean over seeds (* leaves out 0). State: of one "
        "stream, all layers, float32. A frame: the language model's, streamed one by one, one "
        "core. Tokens: frames times 17 streams. Both times in turn with the others.\n\n"
        f"{table(cells)}\n\n![NLL against LoRA only](memories.png)\n\n{notes}\n"
        f"{table(fact_rows(about))}\n"
    )


def _gap(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    star = " *" if found["high"] < 0 or found["low"] > 0 else ""
    return f"{found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]{star}"


def figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Differences from LoRA only and from writing off, each with its interval and its seeds."""
    memories = [row for row in rows if f"{SCALAR} minus baseline" in row]
    drawn = new_figure(9.0, 1.2 + 0.7 * len(memories))
    axes = drawn.subplots(1, len(RANGES), sharex=True, sharey=True)
    for ax, key in zip(np.atleast_1d(axes), RANGES, strict=True):
        for place, row in enumerate(memories):
            for shift, what, colour in ((-0.15, "baseline", "C0"), (0.15, "writing off", "C1")):
                found = row[f"{key} minus {what}"]
                y = place + shift
                ax.plot([found["low"], found["high"]], [y, y], color=colour, linewidth=2)
                ax.plot(found["mean"], y, "o", color=colour)
                ax.plot(found["seeds"], [y] * len(found["seeds"]), "|", color=colour, markersize=9)
        ax.axvline(0, color="0.6", linewidth=1)
        ax.set_title(f"{key} the attention window")
        ax.set_xlabel("nats a token of codebook 0, less is better")
        ax.set_yticks(range(len(memories)), [row["memory"] for row in memories])
        ax.locator_params(axis="x", nbins=6)
    drawn.axes[0].invert_yaxis()
    for what, colour in (("minus LoRA only", "C0"), ("minus trained with writing off", "C1")):
        drawn.axes[0].plot([], [], "o-", color=colour, label=what)
    drawn.legend(loc="outside lower center", ncols=2, frameon=False)
    return drawn
