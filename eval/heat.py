"""The picture of `eval.inspect`: what every head is doing over time, above the sound's level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from eval.plot import new_figure
from eval.tables import FRAME_SECONDS

Grid = NDArray[np.float64]

PANELS = {
    "loss_before": "inner loss before the write",
    "gain": "inner loss, before minus after\n(below 0: the write does harm)",
    "update": "size of a write, |dW| / |W|",
    "state": "norm of the weights, |W| / |W0|",
    "moved": "distance from the start, |W - W0| / |W0|",
    "momentum": "norm of the momentum",
    "eta": "inner learning rate eta",
    "lr": "learning rates lr",
    "m": "momentum gate m",
    "w": "write gate w",
    "alpha": "kept of the weights, alpha",
    "theta": "momentum gate theta",
    "gamma": "frame gate gamma",
    "ns_min": "Newton-Schulz, smallest singular value",
    "ns_max": "Newton-Schulz, largest singular value",
    "share": "memory's update / attention's",
}
"""What is drawn, where a family has it, and how it is called; `share` has a row a layer."""
FEW = 12
"""Rows that are named one by one; more are named by layer."""


def heat_map(
    grids: Mapping[str, Grid],
    rows: Mapping[str, Sequence[str]],
    edges: Sequence[int],
    level: Grid,
    title: str,
) -> Figure:
    """One panel a quantity, rows are heads, and the level of the sound below, on one time axis.

    Args:
        grids: by names of `PANELS`, `[rows, readings]`; NaN is grey.
        rows: of each quantity the names of its rows, `layer 3 head 1` or `layer 3`.
        edges: in frames, where each reading begins, and where the last one ends.
        level: `[channels, frames]` in dB.
        title: of the picture.
    """
    drawn = [name for name in PANELS if name in grids]
    heights = [min(1.8, max(0.55, 0.16 * len(grids[name]))) for name in drawn]
    figure = new_figure(11, 1.6 + sum(heights) + 0.42 * len(drawn))
    found = figure.subplots(len(drawn) + 1, 1, sharex=True, height_ratios=[*heights, 0.9])
    minutes = np.asarray(edges) * FRAME_SECONDS / 60
    for axes, name in zip(found, drawn, strict=False):
        _panel(figure, axes, minutes, grids[name], rows[name], name)
    _level(found[-1], level, minutes[-1])
    figure.suptitle(title, fontsize=10)
    return figure


def _panel(
    figure: Figure, axes: Axes, minutes: Grid, grid: Grid, names: Sequence[str], quantity: str
) -> None:
    known = grid[np.isfinite(grid)]
    low, high = np.percentile(known, [2, 98]) if len(known) else (0.0, 1.0)
    if quantity == "gain":
        norm: Normalize = CenteredNorm(0, max(abs(low), abs(high)) or 1.0)
    else:
        # equal values are one colour, not noise magnified to all of them
        span = max(high - low, 1e-3 * abs(high), 1e-12)
        norm = Normalize(low, low + span)
    mesh = axes.pcolormesh(
        minutes, np.arange(len(grid) + 1), np.ma.masked_invalid(grid),
        norm=norm, cmap="RdBu" if quantity == "gain" else "viridis",
    )  # fmt: skip
    axes.set_facecolor("#dddddd")
    axes.invert_yaxis()
    axes.set_title(PANELS[quantity].replace("\n", " "), fontsize=9, loc="left")
    layers = [name.partition(" head")[0] for name in names]
    starts = [i for i, layer in enumerate(layers) if i == 0 or layers[i - 1] != layer]
    if len(names) <= FEW:
        axes.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=7)
    else:
        middle = [(a + b) / 2 for a, b in zip(starts, [*starts[1:], len(layers)], strict=True)]
        axes.set_yticks(middle, [layers[i] for i in starts], fontsize=7)
    for start in starts[1:]:
        axes.axhline(start, color="white", linewidth=1)
    axes.tick_params(axis="y", length=0)
    bar = figure.colorbar(mesh, ax=axes, pad=0.01, aspect=12, extend="both")
    bar.ax.tick_params(labelsize=7)
    bar.locator = MaxNLocator(3)
    bar.formatter.set_powerlimits((-3, 4))  # pyright: ignore[reportAttributeAccessIssue]
    bar.ax.yaxis.get_offset_text().set_fontsize(7)
    bar.update_ticks()


def _level(axes: Axes, level: Grid, end: float) -> None:
    """The loudest frame of each of at most 1000 stretches, or both channels' of a stereo file."""
    frames = level.shape[1]
    width = -(-frames // 1000)
    at = np.arange(0, frames, width)
    colours = ["#444444"] if len(level) == 1 else ["#0072B2", "#D55E00"]
    labels = [""] if len(level) == 1 else ["left, Moshi", "right, user"]
    for channel, colour, label in zip(level, colours, labels, strict=True):
        loudest = np.maximum.reduceat(channel, at)
        axes.fill_between(
            at * FRAME_SECONDS / 60, loudest, level.min(), color=colour, alpha=0.55, linewidth=0,
            label=label, step="post",
        )  # fmt: skip
    if len(level) > 1:
        place = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.1}
        axes.legend(fontsize=7, ncols=2, frameon=False, **place)
    axes.set_xlim(0, max(end, frames * FRAME_SECONDS / 60))
    axes.set_title("level of the sound (dB of full scale)", fontsize=9, loc="left")
    axes.tick_params(labelsize=7)
    axes.set_xlabel("minutes", fontsize=9)
