"""The picture of an evaluation: NLL by position, and the difference that decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from numpy.typing import NDArray

from eval.report import FRAME_SECONDS, HEADLINE, Results, arm_label, main_difference

Vector = NDArray[np.float64]

STYLES = {
    "base": ("#000000", "--"),
    "kept": ("#0072B2", "-"),
    "reset": ("#D55E00", "-."),
    "off": ("#8C8C8C", ":"),
    "trained": ("#0072B2", "-"),
}
"""Arm -> colour (Okabe and Ito's, safe for the colour-blind) and dashes, which differ too."""
OTHERS = ["#009E73", "#CC79A7", "#56B4E9", "#E69F00"]
MERGE = 0.06  # on a logarithmic axis: bins are merged to this part of their position
LOG_FROM = 12  # windows; longer recordings get a logarithmic axis, or 1x to 4x would be a sliver


def plot(results: Results, path: Path, title: str) -> None:
    """Write a PNG: codebook 0 by position with 95 % bands, window and training length marked."""
    figure = Figure(figsize=(9, 7), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    bins = max(len(a["curve"][HEADLINE]["mean"]) for a in results["arms"].values())
    width, window = results["bin_frames"], results["window_frames"]
    log = bins * width > LOG_FROM * window
    groups = _groups(bins) if log else [(i, i + 1) for i in range(bins)]
    x = np.array([(first + after) / 2 * width for first, after in groups])
    others = iter(OTHERS * len(results["arms"]))
    for name, arm in results["arms"].items():
        colour, dashes = STYLES.get(name) or (next(others), "-")
        _line(top, x, groups, arm["curve"][HEADLINE], colour, dashes, arm_label(results, name))
    top.set_ylabel("NLL of codebook 0 (nats)")
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    difference = main_difference(results)
    if difference is not None:
        colour, _ = STYLES[difference["arm"]]
        one, other = (arm_label(results, difference[k]) for k in ("arm", "minus"))
        _line(bottom, x, groups, difference["curve"][HEADLINE], colour, "-", "")
        bottom.set_title(f"{one} - {other}", fontsize=9)
    bottom.text(
        2 * window,
        0.03,
        "1x to 4x",
        transform=bottom.get_xaxis_transform(),
        ha="center",
        fontsize=8,
    )
    bottom.axhline(0, color="black", linewidth=0.8)
    bottom.set_ylabel("paired difference (nats)\nbelow 0: the first is better")
    bottom.set_xlabel("position in the recording (frames of 80 ms)")
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.axvspan(window, 4 * window, color="#0072B2", alpha=0.06, linewidth=0)
    _scale(top, bottom, bins * width, window, log)
    _mark(top, bottom, window, "window")
    if results["training_frames"]:
        _mark(top, bottom, results["training_frames"], "training length")
    speakers = len({i["speaker"] for i in results["items"]})
    top.set_title(
        f"{title}\n{len(results['items'])} recordings of {speakers} speakers; "
        f"bins of {width} frames{', merged to the right' if log else ''}, bands 95 %",
        fontsize=10,
    )
    figure.savefig(path, format="png")


def _groups(bins: int) -> list[tuple[int, int]]:
    """Runs of bins, each longer by a part of its start: dots evenly far on a logarithmic axis."""
    groups, first = [], 0
    while first < bins:
        after = min(first + max(1, round(first * MERGE)), bins)
        groups.append((first, after))
        first = after
    if len(groups) > 1 and groups[-1][1] - groups[-1][0] < (groups[-2][1] - groups[-2][0]) / 2:
        groups[-2:] = [(groups[-2][0], bins)]  # what is left over is no dot of its own
    return groups


def _line(
    axes: Axes,
    x: Vector,
    groups: list[tuple[int, int]],
    curve: dict[str, Any],
    colour: str,
    dashes: str,
    label: str,
) -> None:
    # of merged bins the ends of the intervals are averaged too: wider than their own, not narrower
    mean, low, high = (
        np.array([np.mean(curve[key][first:after]) for first, after in groups])
        for key in ("mean", "low", "high")
    )
    axes.plot(x, mean, color=colour, linestyle=dashes, linewidth=1.6, label=label)
    if dashes != STYLES["off"][1]:
        axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)


def _mark(top: Axes, bottom: Axes, frame: int, label: str) -> None:
    if frame > bottom.get_xlim()[1]:
        return
    for axes in (top, bottom):
        axes.axvline(frame, color="#444444", linewidth=1, linestyle=(0, (4, 3)))
    top.annotate(
        f" {label} ({frame})",
        (frame, 0.02),
        xycoords=("data", "axes fraction"),
        rotation=90,
        fontsize=8,
        ha="right",
        va="bottom",
        color="#444444",
        zorder=1.5,  # under the curves
        bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1},
    )


def _scale(top: Axes, bottom: Axes, end: int, window: int, log: bool) -> None:
    seconds = top.twiny()  # matplotlib's secondary axis drops its own ticks on a log scale
    seconds.set_xlabel("seconds")
    for axes, factor in ((bottom, 1.0), (seconds, FRAME_SECONDS)):
        if log:
            axes.set_xscale("log")
            ticks = window * 2.0 ** np.arange(-2, np.log2(end / window))
            axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(window / 4 if log else 0, max(end, window))
        axes.xaxis.set_major_formatter(lambda value, _, factor=factor: f"{value * factor:g}")
