"""What free running found, for people: a verdict, tables, a picture and a page."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from matplotlib.figure import Figure

from eval.generate.measures import JUDGED, MEASURES, SILENT_DBFS
from eval.html import document, facts, html_table, items, picture
from eval.output import write_documents
from eval.plot import arm_styles, new_figure
from eval.tables import FRAME_SECONDS, Rows, as_markdown, fact_rows
from eval.verdict import FEWEST_SPEAKERS as FEWEST_STREAMS
from eval.verdict import Results, interval

WORSE = {
    "entropy": ("its entropy falls", "its entropy rises"),
    "distinct_2": ("its distinct 2-grams fall", ""),
    "level_dbfs": ("it grows quieter", "it grows louder"),
    "silence": ("", "its silent frames rise"),
}
"""What a fall and a rise of a judged measure mean; empty where that is no decay."""
UNITS = {"entropy": "nats", "level_dbfs": "dB"}
PANELS = (
    "entropy", "code_entropy", "distinct_2", "before_4",
    "level_dbfs", "silence", "state_norm", "state_moved",
)  # fmt: skip


def verdict(results: Results) -> str:
    """Which arms decay, and what of it the reference does not; it follows from the numbers."""
    streams, arms = results["streams"], results["arms"]
    if results["frames"] < 2 * results["bin_frames"]:
        return "No verdict: there is one whole bin only, nothing to compare it with."
    if streams < FEWEST_STREAMS:
        return f"No verdict: {streams} streams are too few to judge by; it takes {FEWEST_STREAMS}."
    reference = arms[results["reference"]]["label"]
    where = f"From the first quarter of {minutes(results)} to the last ({streams} streams)"
    own = _named(arms, {name: decay(arm["change"]) for name, arm in arms.items()})
    more = _named(arms, {name: decay(arm["against"]) for name, arm in arms.items()})
    lines = [f"{where}, what may be decay: {own}." if own else f"{where}, no decay is shown."]
    if len(arms) > 1:
        less = f"Less what {reference} does in the same time"
        lines.append(f"{less}: {more}." if more else f"{less}, none is shown either.")
    broken = [arm["label"] for arm in arms.values() if arm["broken"]]
    if broken:
        lines.append(f"NOT JUDGED, their output broke: {', '.join(broken)}.")
    tests = (2 * len(arms) - 1) * len(JUDGED)
    lines.append(f"At least one in twenty of {tests} intervals at 95 % leaves out 0 by chance.")
    return " ".join(lines)


def decay(change: dict[str, dict[str, Any]]) -> list[str]:
    """What may be worse, by the judged measures whose 95 % interval leaves out 0."""
    out = []
    for name, found in change.items():
        fall, rise = WORSE[name]
        what = fall if found["high"] < 0 else rise if found["low"] > 0 else ""
        if what:
            out.append(f"{what} by {abs(found['mean']):.3g} {UNITS.get(name, '')}".rstrip())
    return out


def _named(arms: dict[str, Any], found: dict[str, list[str]]) -> str:
    return "; ".join(
        f"{arms[name]['label']}: {', '.join(what)}" for name, what in found.items() if what
    )


def minutes(results: Results) -> str:
    """How long each stream is."""
    return f"{results['frames'] * FRAME_SECONDS / 60:.3g} minutes"


def change_table(results: Results, measure: str) -> Rows:
    """A judged measure's first and last quarter for each arm, and the change."""
    less = f"less {results['reference']}'s"
    rows = [["arm", "first", "last", "change [95 %]", less, "streams"]]
    for arm in results["arms"].values():
        found, against = arm["change"][measure], arm["against"].get(measure)
        rows.append([
            arm["label"], _number(found["first"]), _number(found["last"]),
            _change(found), _change(against) if against else "", str(found["n"]),
        ])  # fmt: skip
    return rows


def bin_table(results: Results, measure: str) -> Rows:
    """A measure by bin, mean over streams, for each arm."""
    arms = results["arms"].values()
    rows = [["from (min)", *(arm["label"] for arm in arms)]]
    means = [arm["measures"][measure]["mean"] for arm in arms]
    for b, values in enumerate(zip(*means, strict=True)):
        start = b * results["bin_frames"] * FRAME_SECONDS / 60
        rows.append([f"{start:g}", *(_number(v) for v in values)])
    return rows


def missing(results: Results) -> list[str]:
    """What is not in the tables, and why; one line each."""
    bins: dict[tuple[str, str, str], list[str]] = {}
    for arm in results["arms"].values():
        for measure, found in arm["missing"].items():
            for number, why in found.items():
                bins.setdefault((arm["label"], measure, why), []).append(number)
    names: dict[tuple[str, str, str], list[str]] = {}
    for (label, measure, why), numbers in bins.items():
        where = "" if numbers == ["all"] else f", bin {', '.join(numbers)}"
        names.setdefault((label, where, why), []).append(measure)
    lines: dict[tuple[str, str, str], list[str]] = {}
    for (label, where, why), measures in names.items():
        what = "everything" if len(measures) >= len(MEASURES) - 2 else ", ".join(measures)
        lines.setdefault((what, where, why), []).append(label)
    count = len(results["arms"])
    return [
        f"{what}{where}: {why} ({'all arms' if len(labels) == count else ', '.join(labels)})"
        for (what, where, why), labels in lines.items()
    ]


def measured(results: Results) -> str:
    """How it was measured: sampling, quarters, time of a frame, memory."""
    sampling, quarter = results["sampling"], results["quarter"]
    heard = results["heard_frames"] * FRAME_SECONDS
    lines = [
        f"{results['streams']} streams of {minutes(results)} an arm, all from seed "
        f"{results['seed']}, temperature {sampling['temp']:g} (text {sampling['temp_text']:g}), "
        f"top-k {sampling['top_k']} (text {sampling['top_k_text']}); the user is "
        + (f"a recording for {heard:g} s, then silence." if heard else "encoded silence."),
        f"A bin is {results['bin_frames'] * FRAME_SECONDS:g} s; the quarters are bins "
        f"{quarter['first'][0]}-{quarter['first'][1]} and {quarter['last'][0]}-"
        f"{quarter['last'][1]}. Intervals by bootstrap over streams "
        f"({results['bootstrap']['resamples']} resamples); of few streams they are too narrow.",
        "Entropy as drawn: of the model's distribution for codebook 0 after temperature and top-k, "
        "a mean over frames. Counted: of how often each code occurs in a bin; low where a bin has "
        f"few codes. Silent: a frame of 80 ms under {SILENT_DBFS:g} dBFS.",
        f"Memories that are reset are so every {results['window_frames']} frames; their norm in a "
        "bin is that before the last time.",
        f"Mimi, LM and Mimi took in ms a frame of all {results['streams']} streams (of 80; "
        "p50/p95/p99): "
        + ", ".join(
            f"{name} {'/'.join(f'{v:.1f}' for v in arm['ms_per_frame'].values())}"
            for name, arm in results["arms"].items()
        )
        + ".",
    ]
    if memory := results.get("memory_bytes"):
        start, end = (memory[key] / 2**20 for key in ("start", "end"))
        lines.append(f"Memory: {start:.0f} MiB at the start, {end:.0f} MiB at the end.")
    return " ".join(lines)


def figure(results: Results, title: str) -> Figure:
    """Measures by minute, a line an arm; bands of a standard error of the mean over streams."""
    made = new_figure(13, 6.4)
    grid = made.subplots(2, 4, sharex=True)
    styles = arm_styles(results["arms"])
    width = results["bin_frames"] * FRAME_SECONDS / 60
    for axes, measure in zip(grid.flat, PANELS, strict=True):
        for name, arm in results["arms"].items():
            colour, dashes = styles[name]
            found = arm["measures"][measure]
            x = [(b + 0.5) * width for b in range(len(found["mean"]))]
            axes.plot(x, found["mean"], color=colour, linestyle=dashes, linewidth=1.6,
                      marker="." if len(x) < 20 else None, label=arm["label"])  # fmt: skip
            if results["streams"] > 1:
                streams, mean = np.array(found["streams"]), np.array(found["mean"])
                error = streams.std(0, ddof=1) / math.sqrt(len(streams))
                axes.fill_between(
                    x, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0
                )
        axes.set_title(MEASURES[measure], fontsize=9)
        axes.set_xlim(0, results["frames"] * FRAME_SECONDS / 60)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    for axes in grid[1]:
        axes.set_xlabel("minutes", fontsize=9)
    made.suptitle(
        f"{title}\n{results['streams']} streams, bins of {width * 60:g} s; bands: a standard "
        "error of the mean to each side",
        fontsize=10,
    )
    return made


def render(results: Results, table: Callable[[Rows], str], *, by_bin: bool) -> str:
    """The report: verdict, tables, what is missing, how it was measured.

    Args:
        results: of `eval.generate.measures.summarise`, with whatever else is known.
        table: `as_text` or `as_markdown`.
        by_bin: with the tables by bin.
    """
    parts = [verdict(results)]
    for measure in JUDGED:
        parts += [f"{_title(measure)}:", table(change_table(results, measure))]
    for measure in PANELS if by_bin else ():
        parts += [f"By bin, {MEASURES[measure]}:", table(bin_table(results, measure))]
    if lines := missing(results):
        parts += ["Not there:", "\n".join(f"- {line}" for line in lines)]
    parts.append(measured(results))
    if made := results.get("facts"):
        parts.append(table(fact_rows(made)))
    return "\n\n".join(parts)


def page(results: Results, title: str, svg: bytes) -> str:
    """The report as a whole HTML document; the voices are linked, not inside."""
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="verdict">{escape(verdict(results))}</p>',
        picture(svg, "by minute"),
        "<h2>First quarter and last</h2>",
    ]
    for measure in JUDGED:
        parts.append(f"<h3>{escape(_title(measure))}</h3>")
        parts.append(html_table(change_table(results, measure)))
    parts.append("<h2>To hear and to read</h2><ul>")
    for arm in results["arms"].values():
        links = [f'<a href="{quote(f)}">{escape(Path(f).name)}</a>' for f in arm["files"]]
        parts.append(f"<li>{escape(arm['label'])}: {', '.join(links)}</li>")
    parts.append("</ul><h2>By bin</h2>")
    for measure in PANELS:
        parts.append(f"<h3>{escape(_title(measure))}</h3>")
        parts.append(html_table(bin_table(results, measure)))
    if lines := missing(results):
        parts.append("<h2>Not there, and why</h2>" + items(lines))
    parts.append(f"<h2>How it was measured</h2><p>{escape(measured(results))}</p>")
    parts.append(facts(results.get("facts", {})))
    return document(title, parts)


def write(results: Results, out: Path, title: str) -> list[Path]:
    """Write the picture (PNG and SVG), the report (HTML and Markdown) and, last, the JSON."""
    text = render(results, as_markdown, by_bin=True)
    return write_documents(
        results, out, {"generate": figure(results, title)},
        lambda pictures: page(results, title, pictures["generate"]),
        f"# {title}\n\n![by minute](generate.png)\n\n{text}\n",
    )  # fmt: skip


def _title(measure: str) -> str:
    name = MEASURES[measure]
    return name[0].upper() + name[1:]


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "-"


def _change(found: dict[str, Any]) -> str:
    if not math.isfinite(found["mean"]):
        return "-"
    known = math.isfinite(found["low"])
    return f"{found['mean']:+.4f} {interval(found)}" if known else f"{found['mean']:+.4f}"
