"""The benchmark of the ops as a table with its targets."""

from __future__ import annotations

from typing import Any

TARGETS = {"saved_mib": 30.0, "train_ratio": 1.0, "frame_ratio": 0.5, "kernels_ratio": 0.5}
"""Largest allowed: MiB saved; time of forward and backward over that of plain autograd; time of a
frame over that of the dense form, as published and with our kernels."""


def verdict(value: float, target: float) -> str:
    """`met`, `near` (missed by at most 10 %) or `missed`."""
    return "met" if value <= target else "near" if value <= 1.1 * target else "missed"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| memory | C | saved MiB (plain) | train s (plain) | ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    marks = [{k: f"{r[k]:.2f} {verdict(r[k], t)}" for k, t in TARGETS.items()} for r in rows]
    for r, m in zip(rows, marks, strict=True):
        lines.append(
            f"| {r['memory']} | {r['chunk_size']} "
            f"| {m['saved_mib']} ({r['saved_mib_plain']:.0f}) "
            f"| {r['train_s']:.3f} ({r['train_s_plain']:.3f}) | {m['train_ratio']} |"
        )
    lines += [
        "",
        "One streamed frame of the layer, against the dense form:",
        "",
        "| memory | C | ms | of it projections | dense as published | ratio "
        "| dense with our kernels | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r, m in zip(rows, marks, strict=True):
        lines.append(
            f"| {r['memory']} | {r['chunk_size']} | {r['frame_ms']:.3f} "
            f"| {r['projections_ms']:.3f} | {r['frame_ms_published']:.3f} | {m['frame_ratio']} "
            f"| {r['frame_ms_kernels']:.3f} | {m['kernels_ratio']} |"
        )
    lines += [
        "",
        "The op alone, without projections, convolution and norms, both with our kernels, at this "
        "shape and at Moshi 7B's (32 heads of 128), no target:",
        "",
        "| memory | C | ms | dense ms | ratio | 7B ms | dense ms | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        cells = [
            f"{x['op_ms']:.3f} | {x['op_ms_dense']:.3f} | {x['op_ratio']:.2f}"
            for x in (r["op"], r["wide"])
        ]
        lines.append(f"| {r['memory']} | {r['chunk_size']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
