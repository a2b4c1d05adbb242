"""Tables for people, whatever they are written in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FRAME_SECONDS = 0.08

Rows = list[list[str]]
"""Cells of a table, the header first."""


def fact_rows(values: Mapping[str, Any]) -> Rows:
    """Names and values as a table without a header."""
    return [["", ""], *([str(key), str(value)] for key, value in values.items())]


def as_text(rows: Rows) -> str:
    """Columns aligned for a terminal."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(w) if is_number(rows, i) else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def as_markdown(rows: Rows) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    sides = ["---:" if is_number(rows, i) else "---" for i in range(len(rows[0]))]
    lines.insert(1, f"| {' | '.join(sides)} |")
    return "\n".join(lines)


def is_number(rows: Rows, column: int) -> bool:
    """Whether a column holds numbers (or nothing), so that it is set flush right."""
    cells = [row[column] for row in rows[1:] if row[column]]
    return column > 0 and bool(cells) and all(cell[0] in "+-0123456789" for cell in cells)
