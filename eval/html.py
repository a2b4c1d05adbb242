"""A report as one HTML file: pictures inside, no network, readable on a phone."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from typing import Any

from eval.generalisation import generalisation_notes, generalisation_table
from eval.report import (
    KIND_NAMES,
    UNITS,
    arm_table,
    kinds,
    measured,
    notes,
    range_table,
)
from eval.tables import Rows, fact_rows, is_number
from eval.verdict import Results, findings, judged, verdict

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.verdict { border-left: .4rem solid #0072B2; padding: .6rem 1rem; background: #0072B218; }
ul.findings { list-style: none; padding: 0; } ul.findings li { margin: .4rem 0; }
.mark { display: inline-block; margin-right: .5rem; font-weight: 600; }
.yes { color: #00795a; } .no { color: #c2410c; } .open { color: #777; }
@media (prefers-color-scheme: dark) { .yes { color: #3ecf9f; } .no { color: #ff8a5c; } }
.scroll { overflow-x: auto; }
img { max-width: 100%; min-width: 40rem; height: auto; background: white; }
table { border-collapse: collapse; font-size: .85rem; white-space: nowrap; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #8886; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.small { font-size: .85rem; } code { overflow-wrap: anywhere; }
"""


def page(results: Results, title: str, pictures: Mapping[str, bytes]) -> str:
    """The report of a comparison as a whole HTML document.

    Args:
        results: of `eval.summary.summarise`, with whatever else is known.
        title: of the report.
        pictures: name -> SVG, in order.
    """
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="verdict">{escape(verdict(results))}</p>',
        _findings(results),
        f"<p>{escape(UNITS.format(window=results['window_frames']))}</p>",
        *(picture(svg, name.replace("_", " ")) for name, svg in pictures.items()),
    ]
    for kind in kinds(results):
        parts.append(f"<h2>By position, {escape(KIND_NAMES[kind])}</h2>")
        parts.append(html_table(range_table(results, kind)))
        parts.append(f"<h2>Every arm, {escape(KIND_NAMES[kind])}</h2>")
        parts.append(html_table(arm_table(results, kind)))
    if "length" in results:
        parts.append("<h2>Length generalisation: perplexity of codebook 0</h2>")
        parts.append(html_table(generalisation_table(results["length"])))
        parts.append(items(generalisation_notes(results["length"])))
    if missing := notes(results):
        parts.append("<h2>Not there, or not alike</h2>" + items(missing))
    parts.append(f"<h2>How it was measured</h2><p>{escape(measured(results))}</p>")
    parts.append(facts(results.get("facts", {})))
    return document(title, parts)


def document(title: str, parts: list[str]) -> str:
    """A whole document of HTML parts."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def picture(svg: bytes, name: str) -> str:
    """An SVG as an image inside the page; on a phone it scrolls sideways and can be read."""
    data = base64.b64encode(svg).decode()
    return (
        f'<p class="scroll"><img alt="{escape(name)}" src="data:image/svg+xml;base64,{data}"></p>'
    )


def html_table(rows: Rows) -> str:
    """A table that scrolls sideways where the screen is narrow."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    lines = []
    for row in rows[1:]:
        cells = [
            f'<td class="number">{escape(cell)}</td>'
            if is_number(rows, column)
            else f"<td>{escape(cell)}</td>"
            for column, cell in enumerate(row)
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def items(lines: list[str]) -> str:
    """A list."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def facts(values: Mapping[str, Any]) -> str:
    """Names and values, e.g. the command and the versions."""
    return f'<div class="small">{html_table(fact_rows(values))}</div>' if values else ""


def _findings(results: Results) -> str:
    marks = {True: ("yes", "holds"), False: ("no", "does not hold"), None: ("open", "open")}
    lines = []
    for found in findings(results) if judged(results) else []:
        css, mark = marks[found.holds]
        lines.append(f'<li><span class="mark {css}">{mark}</span> {escape(found.text)}</li>')
    return f'<ul class="findings">{"".join(lines)}</ul>' if lines else ""
