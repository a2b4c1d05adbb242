"""Where an evaluation's results go: JSON for machines, a table and a picture for people."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from eval.plot import plot
from eval.report import Results, as_markdown, render
from moshi_ttt.errors import UserError
from moshi_ttt.files import written_whole

RESULTS, TABLE, PICTURE = "results.json", "table.md", "nll_by_position.png"


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


def write_results(results: Results, out: Path, title: str) -> list[Path]:
    """Write results.json, table.md and nll_by_position.png; NaN is null in the JSON.

    Args:
        results: of `eval.summary.summarise`, with whatever else is known.
        out: folder, made if missing.
        title: of table and picture.

    Returns:
        The files.
    """
    out.mkdir(parents=True, exist_ok=True)
    with written_whole(out / PICTURE) as path:
        plot(results, path, title)
    with written_whole(out / TABLE) as path:
        path.write_text(f"# {title}\n\n{render(results, as_markdown)}\n", encoding="utf-8")
    with written_whole(out / RESULTS) as path:
        text = json.dumps(_plain(results), indent=1, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")
    return [out / name for name in (TABLE, PICTURE, RESULTS)]


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
