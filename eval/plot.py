"""The pictures of an evaluation: NLL by position, paired differences, and the scalar."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from eval.report import KIND_NAMES, kinds, main_difference
from eval.stats import SCALAR
from eval.tables import FRAME_SECONDS
from eval.verdict import HEADLINE, Results

Vector = NDArray[np.float64]

STYLES = {
    "base": ("#000000", "--"),
    "wide": ("#000000", ":"),
    "kept": ("#0072B2", "-"),
    "reset": ("#D55E00", "-."),
    "shuffled": ("#CC79A7", "-."),
    "off": ("#8C8C8C", ":"),
    "trained": ("#0072B2", "-"),
}
"""Arm -> colour (Okabe and Ito's, safe for the colour-blind) and dashes, which differ too."""
OTHERS = ["#009E73", "#E69F00", "#56B4E9", "#F0E442"]
ASIDE = ("wide",)
"""Arms that may be far from all others, and do not set the scale of a picture."""
MERGE = 0.06  # on a logarithmic axis: bins are merged to this part of their position
LOG_FROM = 12  # windows; longer recordings get a logarithmic axis, or 1x to 4x would be a sliver


def figures(results: Results, title: str) -> dict[str, Figure]:
    """All pictures of a comparison, by the name of their file."""
    out = {"nll_by_position": by_position(results, title)}
    if results["differences"]:
        out["scalar"] = scalar(results, title)
        out["differences"] = differences(results, title)
        out["arms"] = arms(results, title)
    for kind in kinds(results):
        if kind != HEADLINE:
            out[f"nll_by_position_{kind}"] = by_position(results, title, kind)
    return out


def by_position(results: Results, title: str, kind: str = HEADLINE) -> Figure:
    """NLL by position, window and training length marked, and the main difference."""
    figure = new_figure(9, 7)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    axis = _Axis.of(results)
    styles = arm_styles(results["arms"])
    difference = main_difference(results)
    banded = difference["arm"] if difference else next(iter(results["arms"]))
    for name, arm in results["arms"].items():
        drawn = "" if name in ASIDE else arm_label(results, name)
        drawn = drawn or f"{arm_label(results, name)}: may leave the picture"
        _line(top, axis, arm["curve"][kind], *styles[name], drawn, band=name == banded)
    top.set_ylim(
        *_limits(axis, [a["curve"][kind] for n, a in results["arms"].items() if n not in ASIDE])
    )
    top.set_ylabel(f"NLL of {KIND_NAMES[kind]} (nats)")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    if difference is not None:
        colour, _ = styles[difference["arm"]]
        one, other = (arm_label(results, difference[k]) for k in ("arm", "minus"))
        _line(bottom, axis, difference["curve"][kind], colour, "-", "")
        bottom.set_title(f"{one} - {other}", fontsize=9)
    window = axis.window
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
    axis.scale(bottom)
    seconds = top.twiny()  # matplotlib's secondary axis drops its own ticks on a log scale
    seconds.set_xlabel("seconds")
    axis.scale(seconds, FRAME_SECONDS)
    _mark(top, bottom, window, "window")
    if results["training_frames"]:
        _mark(top, bottom, results["training_frames"], "training length")
    speakers = len({i["speaker"] for i in results["items"]})
    top.set_title(
        f"{title}\n{len(results['items'])} recordings of {speakers} speakers; bins of "
        f"{axis.width} frames{', merged to the right' if axis.log else ''}, bands 95 %",
        fontsize=10,
    )
    return figure


def arms(results: Results, title: str) -> Figure:
    """Every arm's curve with its band, a panel each, over that of the first arm compared."""
    first = results["differences"][0]["arm"]
    styles = arm_styles(results["arms"])
    figure, panels, axis = _panels(results, len(results["arms"]))
    curves = {name: arm["curve"] for name, arm in results["arms"].items()}
    near = _limits(axis, [c[HEADLINE] for name, c in curves.items() if name not in ASIDE])
    for axes, (name, curve) in zip(panels, curves.items(), strict=True):
        _line(axes, axis, curves[first][HEADLINE], *styles[first], "", band=False)
        _line(axes, axis, curve[HEADLINE], *styles[name], "")
        axes.set_title(arm_label(results, name), fontsize=8)
        if name not in ASIDE:
            axes.set_ylim(*near)
    figure.supylabel("NLL of codebook 0 (nats)", fontsize=9)
    label = arm_label(results, first)
    figure.suptitle(f"{title}: every arm, and {label} (blue); bands 95 %", fontsize=10)
    return figure


def differences(results: Results, title: str) -> Figure:
    """Every paired difference by position, one panel each, on one scale but for the far ones."""
    found = results["differences"]
    styles = arm_styles(results["arms"])
    figure, panels, axis = _panels(results, len(found))
    shown = [d for d in found if d["minus"] not in ASIDE] or found
    near = _limits(axis, [d["curve"][HEADLINE] for d in shown])
    for axes, d in zip(panels, found, strict=True):
        _line(axes, axis, d["curve"][HEADLINE], *styles[d["minus"]], "")
        one, other = (arm_label(results, d[k]) for k in ("arm", "minus"))
        own = "" if d["minus"] not in ASIDE else " (own scale)"
        axes.set_title(f"{one}\n- {other}{own}", fontsize=8)
        axes.axhline(0, color="black", linewidth=0.8)
        if not own:
            axes.set_ylim(*near)
    figure.supylabel("difference of codebook 0 (nats)", fontsize=9)
    figure.suptitle(f"{title}: below 0 the first is better; bands 95 %", fontsize=10)
    return figure


def scalar(results: Results, title: str) -> Figure:
    """The scalar's paired differences with their intervals, for each kind of NLL.

    The arms of `ASIDE` are in the tables only: they would set the scale.
    """
    found = [d for d in results["differences"] if d["minus"] not in ASIDE][::-1]
    found = found or results["differences"]
    shown = kinds(results)
    figure = new_figure(3.2 + 2.7 * len(shown), 1.2 + 0.42 * len(found))
    grid = figure.subplots(1, max(len(shown), 1), sharey=True, squeeze=False)
    labels = [" - ".join(arm_label(results, d[key]) for key in ("arm", "minus")) for d in found]
    for axes, kind in zip(grid.flat, shown, strict=False):
        for place, d in enumerate(found):
            e = d["ranges"][kind][SCALAR]
            colour = "#0072B2" if e["high"] < 0 else "#D55E00" if e["low"] > 0 else "#777777"
            axes.plot(e["mean"], place, "o", color=colour, markersize=5)
            axes.plot([e["low"], e["high"]], [place, place], color=colour, linewidth=1.6)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(found)), labels, fontsize=8)
        axes.set_title(KIND_NAMES[kind], fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(alpha=0.25)
    figure.supxlabel(f"nats, {SCALAR} of the window; left of 0: the first is better", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def arm_label(results: Results, name: str) -> str:
    """An arm's letter and label, for a legend."""
    arm = results["arms"][name]
    return f"({arm['letter']}) {arm['label']}" if arm["letter"] else str(arm["label"])


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, drawn without any window system."""
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def arm_styles(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Arm -> colour and dashes; the same arm looks the same in every picture of a comparison."""
    others = iter(OTHERS * 9)
    return {name: STYLES.get(name) or (next(others), "-") for name in names}


@dataclass(frozen=True)
class _Axis:
    """The axis of positions: bins of `width` frames, the last ending at `end`; log or not."""

    width: int
    window: int
    end: int
    log: bool

    @classmethod
    def of(cls, results: Results) -> _Axis:
        bins = max(len(a["curve"][HEADLINE]["mean"]) for a in results["arms"].values())
        width, window = results["bin_frames"], results["window_frames"]
        return cls(width, window, bins * width, bins * width > LOG_FROM * window)

    def scale(self, axes: Axes, factor: float = 1.0, step: float = 2.0) -> None:
        """Limits and ticks; labels are positions times `factor`."""
        window, end = self.window, max(self.end, self.window)
        if self.log:
            axes.set_xscale("log")
            powers = np.arange(np.log(0.25) / np.log(step), np.log(end / window) / np.log(step))
            axes.xaxis.set_major_locator(FixedLocator(list(window * step**powers)))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(window / 4 if self.log else 0, end)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value * factor:g}")

    def merged(self, curve: dict[str, Any]) -> list[Vector]:
        """Positions, means and both ends of the intervals, one value a dot."""
        groups = self._groups(len(curve["mean"]))
        x = np.array([(first + after) / 2 * self.width for first, after in groups])
        # the ends of the intervals are averaged too: wider than their own, not narrower
        return [x] + [
            np.array([np.mean(curve[key][first:after]) for first, after in groups])
            for key in ("mean", "low", "high")
        ]

    def _groups(self, bins: int) -> list[tuple[int, int]]:
        """Runs of bins: on a log axis each longer by a part of its start, so dots are as far."""
        if not self.log:
            return [(i, i + 1) for i in range(bins)]
        groups, first = [], 0
        while first < bins:
            after = min(first + max(1, round(first * MERGE)), bins)
            groups.append((first, after))
            first = after
        if len(groups) > 1 and groups[-1][1] - groups[-1][0] < (groups[-2][1] - groups[-2][0]) / 2:
            groups[-2:] = [(groups[-2][0], bins)]  # what is left over is no dot of its own
        return groups


def _panels(results: Results, count: int) -> tuple[Figure, list[Axes], _Axis]:
    """A figure of so many panels over positions, the window marked in each."""
    columns = min(3, count)
    rows = -(-count // columns)
    figure = new_figure(3.5 * columns, 1 + 2.2 * rows)
    grid = list(figure.subplots(rows, columns, sharex=True, squeeze=False).flat)
    axis = _Axis.of(results)
    for axes in grid[:count]:
        axis.scale(axes, step=4.0)
        axes.axvline(axis.window, color="#444444", linewidth=1, linestyle=(0, (4, 3)))
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8)
    for axes in grid[count:]:
        axes.set_axis_off()
    figure.supxlabel("position (frames); dashed: the window", fontsize=9)
    return figure, grid[:count], axis


def _limits(axis: _Axis, curves: list[dict[str, Any]]) -> tuple[float, float]:
    """Limits of an axis that shows all these curves with their bands."""
    drawn = np.concatenate([v for curve in curves for v in axis.merged(curve)[1:]])
    drawn = drawn[np.isfinite(drawn)]
    low, high = (drawn.min(), drawn.max()) if len(drawn) else (0.0, 0.0)
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def _line(
    axes: Axes,
    axis: _Axis,
    curve: dict[str, Any],
    colour: str,
    dashes: str,
    label: str,
    *,
    band: bool = True,
) -> None:
    x, mean, low, high = axis.merged(curve)
    axes.plot(x, mean, color=colour, linestyle=dashes, linewidth=1.6, label=label)
    if band:
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


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
