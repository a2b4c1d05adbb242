"""What `eval.bench.frame` found, as rows, a page and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from eval.bench.frame_timing import FITS, PARTS, Clock, ratios
from eval.plot import new_figure
from eval.tables import Rows, as_markdown, fact_rows
from moshi_ttt.frame_times import FRAME_MS

PERCENTILES = (50, 95, 99)
TARGET = 1.25
"""Of the LM's step with the memory, in steps without, on a CPU; on a GPU `GPU_TARGET`."""
GPU_TARGET = 1.10


def as_row(
    size: int, clocks: Mapping[str, Clock], stock: str, memory: str, kind: str
) -> dict[str, Any]:
    """One batch size: percentiles of every part of both models by one clock, and the ratios.

    Returns:
        `sessions`, model -> part -> percentiles in ms, and `ratio`: part -> quartiles over turns.
    """
    row: dict[str, Any] = {"sessions": size}
    for name in (stock, memory):
        times = getattr(clocks[name], kind)
        row[name] = {part: np.percentile(times[part], PERCENTILES).tolist() for part in PARTS}
    row["ratio"] = {
        part: np.percentile(ratios(clocks, part, memory, stock), (25, 50, 75)).tolist()
        for part in ("temporal", "LM", "frame")
    }
    return row


def times_table(rows: list[dict[str, Any]], stock: str, memory: str) -> Rows:
    """Times by batch and model, in ms; p50 / p95 / p99 in every cell."""
    table = [["sessions", "model", "frame", "Mimi encode", "LM's step", "temporal transformer",
              "memory in it", "depformer", "Mimi decode"]]  # fmt: skip
    for row in rows:
        for name in (stock, memory):
            cells = {part: _cell(row[name][part]) for part in PARTS}
            without = row[stock]["temporal"]
            added = [b - a for a, b in zip(without, row[name]["temporal"], strict=True)]
            table.append([
                str(row["sessions"]), name, cells["frame"], cells["encode"], cells["LM"],
                cells["temporal"], "" if name == stock else _cell(added), cells["depformer"],
                cells["decode"],
            ])  # fmt: skip
    return table


def _cell(values: list[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


def ratio_table(rows: list[dict[str, Any]], target: float) -> Rows:
    """With memory over stock by batch, median over turns with quartiles."""
    head = ["sessions", "LM's step", "temporal transformer", "frame", "target of the LM's step"]
    table = [head]
    for row in rows:
        cells = [_range(row["ratio"][part]) for part in ("LM", "temporal", "frame")]
        met = "met" if row["ratio"]["LM"][1] <= target else "missed"
        table.append([str(row["sessions"]), *cells, f"{target:.2f}: {met}"])
    return table


def _range(quartiles: list[float]) -> str:
    low, middle, high = quartiles
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def page(results: dict[str, Any], stock: str, memory: str, picture: str, gpu: Path | None) -> str:
    """All of it as Markdown.

    Args:
        results: of `eval.bench.frame.measure`, and where they come from.
        stock: name of the model without a memory.
        memory: of the other.
        picture: file name.
        gpu: where a GPU's results are or would be; None if these are a GPU's.
    """
    target = TARGET if gpu else GPU_TARGET
    most, fit = results["most"], results["fit"]
    fitting = ", ".join(
        f"{name} {'none' if not n else f'{n} or more' if n == most else n}"
        for name, n in fit.items()
    )
    about = {k: v for k, v in results.items() if isinstance(v, str)}
    elsewhere = ""
    if gpu is not None:
        there = f"[{gpu.name}]({gpu.name})" if gpu.is_file() else "not yet run on a GPU"
        elsewhere = f"\nMoshi 7B's shape (`python -m eval.bench.frame --shape 7b`): {there}.\n"
    clock = {
        "wall": "wall time",
        "cpu": "CPU time of the thread, for the machine had other work",
    }[results["clock"]]
    return (
        f"# ms a frame\n\n{results['frames']} frames or a few more; p50 / p95 / p99 in ms, "
        f"{clock}. A frame is `Engine.step`, the LM's step `LMGen.step` in it: temporal "
        "transformer with text head, depformer, drawing tokens. The memory is the difference of "
        "the temporal transformers' percentiles.\n\n"
        + as_markdown(times_table(results["rows"], stock, memory))
        + "\n\nWith memory over stock, by turns of 15 frames in which the two alternate (CPU time "
        "where the model is on a CPU): median over turns, quartiles.\n\n"
        + as_markdown(ratio_table(results["rows"], target))
        + f"\n\nSessions whose frames take at most {FRAME_MS:g} ms, {FITS} of a hundred (measured, "
        f"by doubling and halving): {fitting}.\n{elsewhere}\n![ms a frame]({picture})\n\n"
        + as_markdown(fact_rows(about)) + "\n"
    )  # fmt: skip


def figure(results: dict[str, Any], stock: str, memory: str) -> Figure:
    """Times of a frame by sessions, p50 with p95 above it, and the 80 ms that a frame lasts."""
    drawn = new_figure(7.0, 4.5)
    ax = drawn.subplots()
    sizes = [row["sessions"] for row in results["rows"]]
    for name, colour in ((stock, "#000000"), (memory, "#0072B2")):
        p50, p95, _ = np.array([row[name]["frame"] for row in results["rows"]]).T
        ax.plot(sizes, p50, "o-", color=colour, label=f"{name}, p50")
        ax.plot(sizes, p95, "--", color=colour, linewidth=1, label=f"{name}, p95")
    ax.axhline(FRAME_MS, color="#D55E00", linewidth=1)
    ax.annotate("a frame lasts 80 ms", (sizes[0], FRAME_MS), (0, 3), textcoords="offset points",
                color="#D55E00")  # fmt: skip
    ax.set(xscale="log", ylim=(0, None), xlabel="sessions at a time", ylabel="ms a frame")
    ax.set_xticks(sizes, [str(size) for size in sizes], minor=False)
    ax.set_xticks([], minor=True)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return drawn
