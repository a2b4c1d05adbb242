"""The bytes and times of segments as a page, and what they say of the memory's growth."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from eval.bench.gpu_model import Shape

MIB = 2**20


def judge(rows: list[dict[str, Any]]) -> None:
    """Say of each row with a memory how it grew since the length before, against the base.

    Adds, where both lengths were measured, the growth of what the memory adds in parts of that of
    the base: `kept_growth`, `peak_growth`, and `layers_growth`, the first over what the base's
    temporal layers alone keep besides their masks (as estimated).
    """
    found = {(r["frames"], r["memory"], r["checkpointing"]): r for r in rows}
    for row in rows:
        row |= dict.fromkeys(("kept_growth", "peak_growth", "layers_growth"))
    for short, long in pairwise(sorted({r["frames"] for r in rows})):
        for memory in dict.fromkeys(r["memory"] for r in rows if r["memory"]):
            for again in (False, True):
                with_, base = ([found[t, m, again] for t in (short, long)] for m in (memory, None))
                if any(row["kept"] is None for row in (*with_, *base)):
                    continue
                for key, of in (("kept", "kept"), ("peak", "peak"), ("kept", "layers")):
                    mine = [a[key] - b[key] for a, b in zip(with_, base, strict=True)]
                    growth = (mine[1] - mine[0]) / (base[1][of] - base[0][of])
                    with_[1][f"{of}_growth"] = growth


def holds(row: dict[str, Any]) -> bool | None:
    """Whether a memory's bytes grew by at most what the base's did; None where that is unknown."""
    if row["kept_growth"] is None:
        return None
    return max(row["kept_growth"], row["peak_growth"]) <= 1


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| frames | checkpointing | model | kept MiB | of it masks | peak MiB | s | of the base "
        "| growth kept, peak | of the layers | at most the base's |",
        "| " + " | ".join(["---"] * 11) + " |",
    ]

    def number(value: float | None, form: str, unit: float = 1) -> str:
        return "" if value is None else format(value / unit, form)

    for r in rows:
        name = r["memory"] or "base"
        again = "yes" if r["checkpointing"] else "no"
        head = f"| {r['frames']} | {again} | {name} "
        if r["kept"] is None:
            about = r["estimated"] / MIB
            lines.append(f"{head}| did not fit: about {about:,.0f} MiB |" + " |" * 7)
            continue
        growth = ""
        if r["kept_growth"] is not None:
            growth = f"{r['kept_growth']:.3f}, {r['peak_growth']:.3f}"
        verdict = {None: "", True: "yes", False: "NO"}[holds(r)]
        lines.append(
            f"{head}| {number(r['kept'], ',.1f', MIB)} | {number(r['mask'], ',.1f', MIB)} "
            f"| {number(r['peak'], ',.1f', MIB)} | {number(r['seconds'], '.2f')} "
            f"| {number(r['ratio'], '.2f')} | {growth} "
            f"| {number(r['layers_growth'], '.3f')} | {verdict} |"
        )
    return "\n".join(lines) + "\n"


def page(shape: Shape, gpu: bool, rows: list[dict[str, Any]]) -> str:
    """The results as a page."""
    rounds = ", ".join(f"{t}: {n}" for t, n in {r["frames"]: r["rounds"] for r in rows}.items())
    where = "as the GPU's allocator counts" if gpu else "every tensor counted"
    note = (
        ""
        if gpu
        else "On a CUDA machine `python -m eval.bench.segment_length --device cuda` measures this "
        "at the 7B's shape and writes segment_length_gpu.md: **not yet run on a GPU.**\n\n"
    )
    return (
        "# Bytes and time against the length of a segment\n\n"
        f"{shape.name}, {str(shape.dtype).removeprefix('torch.')}, LoRA of rank {shape.rank}, one "
        f"row of random codes, forward and backward; bytes are exact ({where}, weights left out), "
        "times medians of interleaved rounds (" + rounds + "), their ratios to the base those of "
        "the same round. `growth`: by how much more the memory's bytes grew than at the length "
        "before, in parts of what the base's own grew by; at most 1 is asked.\n\n"
        "What dominates is not the memory but stock attention, which at every layer builds a mask "
        "of T x T whatever its window: 8 T^2 bytes of int64 distances and about 3 T^2 of "
        "booleans for a moment, and a mask of the compute dtype that is kept for the backward "
        "without checkpointing (`of it masks`). `of the layers` compares with what the base's own "
        "temporal layers keep besides those masks, without depformer and logits: the memory's "
        "growth in parts of that of the layer it sits in.\n\n" + note + table(rows) + "\n"
    )
