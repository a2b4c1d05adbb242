"""The picture of a run's log."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from eval.scores import KINDS


def plot_curves(run_dir: Path) -> Path:
    """Draw the run's metrics to `curves.png`: NLL by kind, gradient norm, gates."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    panels = {
        "NLL, nats a token": [f"nll_{kind}" for kind in KINDS],
        "gradient norm": ["grad_norm"],
        "mean |tanh(gate)|": ["gate_abs_mean"],
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.8), layout="constrained")
    styles = {"train": ("-", None), "held_out": ("--", "o"), "librilight": (":", "s")}
    for axis, (title, keys) in zip(axes, panels.items(), strict=True):
        for kind, (style, marker) in styles.items():
            for key in keys:
                found = [(r["step"], r[key]) for r in lines if r["kind"] == kind and key in r]
                found = [(s, v) for s, v in found if v is not None]
                if found:
                    label = f"{key.removeprefix('nll_')} {kind}"
                    axis.plot(*zip(*found, strict=True), style, marker=marker, ms=3, label=label)
        axis.set(title=title, xlabel="step")
    figure.legend(loc="outside lower center", ncols=6, fontsize=7, frameon=False)
    path = run_dir / "curves.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
