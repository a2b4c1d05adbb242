"""The picture of a spoken-language set: a bar an arm, with chance."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from eval.plot import new_figure
from eval.zerospeech.report import BASE, CHANCE, TRAINED, Results

COLOURS = {BASE: "#8C8C8C", TRAINED: "#0072B2"}
OTHERS = ("#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Okabe and Ito's, safe for the colour-blind."""


def accuracies(results: Results) -> Figure:
    """A bar an arm for all items and each group, 95 % intervals, the chance line."""
    groups, arms = results["groups"], results["arms"]
    thick = 0.8 / len(arms)
    figure = new_figure(8, 1.8 + 0.32 * len(groups) * len(arms))
    axes = figure.subplots()
    others = iter(OTHERS * len(arms))
    for i, (arm, about) in enumerate(arms.items()):
        found = [about["accuracy"][group] for group in groups]
        mean = np.array([f["mean"] for f in found])
        ends = np.array([[f["low"], f["high"]] if not f["reason"] else [f["mean"]] * 2
                         for f in found])  # fmt: skip
        y = np.arange(len(groups)) + (i - (len(arms) - 1) / 2) * thick
        axes.barh(
            y,
            100 * mean,
            thick * 0.9,
            xerr=(100 * np.abs(ends.T - mean)).tolist(),  # an array of one bar makes it warn
            color=COLOURS.get(arm) or next(others),
            error_kw={"elinewidth": 1, "capsize": 2},
            label=about["label"],
        )
    axes.axvline(100 * CHANCE, color="black", linestyle="--", linewidth=1)
    axes.text(
        100 * CHANCE, 1, " chance", transform=axes.get_xaxis_transform(), va="top", fontsize=8
    )
    axes.set_yticks(range(len(groups)), [f"{g} ({_n(results, g)})" for g in groups])
    axes.set_ylim(len(groups) - 0.5, -0.7)  # downwards, with room for the word at the top
    axes.set_xlim(0, 100)
    axes.set_xlabel("pairs decided rightly (%), voices averaged; lines are 95 % intervals")
    axes.set_title(f"{results['title']} (in brackets: items)", fontsize=10)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def _n(results: Results, group: str) -> int:
    return results["arms"][BASE]["accuracy"][group]["n"]
