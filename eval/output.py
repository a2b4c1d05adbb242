"""Where an evaluation's results go: JSON for machines; a report and pictures for people."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from eval.html import page
from eval.plot import figures
from eval.report import markdown
from eval.verdict import Results
from moshi_ttt.errors import UserError
from moshi_ttt.files import written_whole

RESULTS, REPORT, PAGE = "results.json", "report.md", "report.html"


def next_folder(given: str | None, default: Path) -> Path:
    """The folder to write to, checked before any work; it is not made yet.

    A folder that was named and holds results is refused; the default one gets a number.

    Raises:
        UserError: it holds results, is a file, or cannot be written.
    """
    out = Path(given).expanduser() if given else default
    if given and (out / RESULTS).exists():
        raise UserError(f"--out {out} holds results already: name another folder")
    number = 2
    while (out / RESULTS).exists():
        out = default.with_name(f"{default.name}-{number}")
        number += 1
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--out {out}: {there} is not a folder that can be written")
    return out


def write_results(
    results: Results, out: Path, title: str, more: Mapping[str, Figure] | None = None
) -> list[Path]:
    """Write the pictures (PNG and SVG), the report (HTML and Markdown), and, last, the JSON.

    The HTML file needs no other: its pictures are inside.

    Args:
        results: of `eval.summary.summarise`, with whatever else is known.
        out: folder, made if missing.
        title: of report and pictures.
        more: further pictures.

    Returns:
        The files, pictures first.
    """
    made = figures(results, title) | dict(more or {})
    text = markdown(results, title, [f"{name}.png" for name in made])
    return write_documents(results, out, made, partial(page, results, title), text)


def write_documents(
    results: Results,
    out: Path,
    figures: Mapping[str, Figure],
    page: Callable[[Mapping[str, bytes]], str],
    text: str,
) -> list[Path]:
    """Write pictures (PNG and SVG), an HTML page, Markdown and, last, the JSON.

    Args:
        results: plain values.
        out: folder, made if missing.
        figures: by the names of their files.
        page: makes the HTML of the SVGs, by the same names.
        text: the Markdown.

    Returns:
        The files, pictures first.
    """
    written = [path for name, figure in figures.items() for path in save_figure(figure, out / name)]
    pictures = {name: (out / f"{name}.svg").read_bytes() for name in figures}
    with written_whole(out / PAGE) as path:
        path.write_text(page(pictures), encoding="utf-8")
    with written_whole(out / REPORT) as path:
        path.write_text(text, encoding="utf-8")
    write_json(results, out / RESULTS)
    return [*written, out / PAGE, out / REPORT, out / RESULTS]


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem.png` and `stem.svg`, laid out alike; the folder is made if missing."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for file in reversed(files):  # letters are widest in the SVG: its layout holds both
        with written_whole(file) as path:
            figure.savefig(path, format=file.suffix[1:])
        figure.set_layout_engine(None)  # laying out takes longer than drawing: once is enough
    return files


def write_json(values: Any, file: Path) -> None:
    """Write plain values, whole or not at all; NaN is null."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as path:
        text = json.dumps(_plain(values), indent=1, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")


def memory_in_use(device: torch.device) -> int:
    """Bytes: allocated on a CUDA device; on the CPU, the highest that the process has had."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
