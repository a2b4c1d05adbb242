"""The picture of the recall probe: gain against delay, the window marked."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from eval.plot import arm_styles, new_figure
from eval.recall.hearings import FRAME_RATE
from eval.recall.report import TITLES
from eval.verdict import HEADLINE, Results

SHOWN = ("repeat", "return")


def by_delay(results: Results, title: str) -> Figure:
    """Codebook 0: gain of every arm with its 95 % band, against the delay in windows."""
    figure = new_figure(9, 8)
    panels: list[Axes] = list(figure.subplots(len(SHOWN), 1, sharex=True))
    window = results["window_frames"]
    delays = np.array([delay["windows"] for delay in results["delays"]])
    styles = arm_styles(results["arms"])
    for axes, gain in zip(panels, SHOWN, strict=True):
        for name, arm in results["arms"].items():
            _line(
                axes, delays, arm["measures"][gain][HEADLINE]["delays"], *styles[name], arm["label"]
            )
        axes.set_title(TITLES[gain], fontsize=9)
        axes.set_ylabel("gain on codebook 0 (nats a frame)\nabove 0: it is predicted better")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.grid(alpha=0.25)
        if delays[0] <= 1 <= delays[-1]:
            axes.axvline(1, color="#444444", linewidth=1, linestyle=(0, (4, 3)))
            axes.text(
                1, 0.97, f"  window ({window} frames)", transform=axes.get_xaxis_transform(),
                ha="left", va="top", fontsize=8, color="#444444",
            )  # fmt: skip
    seconds = panels[0].twiny()
    seconds.set_xlabel("delay in seconds")
    panels[-1].set_xlabel("delay between the two hearings, in windows")
    margin = 1.12  # of the axis beyond the first and the last dot
    for axes, factor in ((panels[-1], 1.0), (seconds, window / FRAME_RATE)):
        axes.set_xscale("log")
        axes.set_xlim(factor * delays[0] / margin, factor * delays[-1] * margin)
        axes.xaxis.set_major_locator(FixedLocator(list(factor * delays)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9,
        frameon=False,
    )  # fmt: skip
    speakers = len({item["speaker"] for item in results["items"]})
    passage = results["passage_frames"]
    figure.suptitle(
        f"{title}\n{len(results['items'])} passages of {passage / FRAME_RATE:g} s, {speakers} "
        "speakers; bands 95 %",
        fontsize=10,
    )
    return figure


def _line(
    axes: Axes, x: Any, found: list[dict[str, Any]], colour: str, dashes: str, label: str
) -> None:
    mean, low, high = (np.array([e[key] for e in found]) for key in ("mean", "low", "high"))
    axes.plot(x, mean, "o", color=colour, linestyle=dashes, linewidth=1.6, ms=4, label=label)
    axes.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0)
