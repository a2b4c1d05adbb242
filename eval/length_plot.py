"""The picture of length generalisation."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from eval.generalisation import LONGEST, SHORTEST, Generalisation
from eval.plot import arm_styles, new_figure
from eval.tables import FRAME_SECONDS

BANDED = ("base", "kept", "trained")
"""Arms whose interval is drawn; those of all are in the JSON."""


def generalisation_figure(found: Generalisation, title: str, window: int) -> Figure:
    """Perplexity against length, one line an arm, with bands; window and segment are marked."""
    figure = new_figure(8, 5)
    axes = figure.subplots()
    x = np.array([length["factor"] for length in found["lengths"]])
    styles = arm_styles(found["arms"])
    for name, arm in found["arms"].items():
        mean, low, high = (
            np.array([p[key] for p in arm["perplexity"]]) for key in ("mean", "low", "high")
        )
        colour, dashes = styles[name]
        axes.plot(x, mean, dashes, color=colour, marker="o", markersize=3, label=arm["label"])
        if name in BANDED:
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_xlim(SHORTEST * 0.95, LONGEST * 1.05)
    axes.xaxis.set_major_locator(FixedLocator([0.5, 1, 2, 5, 10]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    segment = found["segment_frames"]
    axes.axvline(1, color="#444444", linewidth=1, linestyle=(0, (4, 3)))
    if SHORTEST <= window / segment <= LONGEST:
        axes.axvline(window / segment, color="#D55E00", linewidth=1, linestyle=(0, (1, 2)))
        axes.annotate(" window", (window / segment, 0.97), xycoords=("data", "axes fraction"))
    if found["skipped"]:
        first = found["skipped"][0]["factor"]
        axes.axvspan(first, LONGEST * 1.05, color="#888888", alpha=0.12, linewidth=0)
        axes.text(0.99, 0.03, "no recordings", ha="right", fontsize=8, transform=axes.transAxes)
    axes.set_xlabel(
        f"length, in training segments of {segment} frames ({segment * FRAME_SECONDS:g} s)"
    )
    axes.set_ylabel("perplexity of codebook 0 over all of it")
    axes.grid(alpha=0.25)
    axes.set_title(
        f"{title}: length generalisation, {len(found['recordings'])} recordings, bands 95 %",
        fontsize=10,
    )
    if found["lengths"]:
        figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure
