"""What the recall probe found, for people: tables and sentences that follow from the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from typing import Any

from eval.html import document, facts, html_table, items, picture
from eval.recall.hearings import FRAME_RATE
from eval.report import KIND_NAMES
from eval.tables import Rows, fact_rows
from eval.verdict import FEWEST_SPEAKERS, HEADLINE, NEEDED, Results, interval

JUDGED_BY = ("a", "b", "d", "e")
"""Letters of the arms that a recall must exceed to be the memory's."""
TITLES = {
    "repeat": "The same passage again, against other words of its speaker: what was said",
    "return": "The same speaker again, against a stranger (A-B-A): who spoke",
    "second": "First hearing minus second, whose place and context differ too",
    "nll": "NLL of the second hearing itself, less is better",
}
_RECALLED = {
    "repeat": ("What was said", "the same passage, and not other words of its speaker,"),
    "return": ("Who spoke", "the same speaker, and not a stranger,"),
}


def gain_table(results: Results, measure: str, kind: str = HEADLINE) -> Rows:
    """One row an arm: a measure at each delay and beyond the window, and a paired difference."""
    against = {d["minus"]: d["measures"][measure][kind]["beyond"] for d in results["differences"]}
    first = next((d["arm"] for d in results["differences"]), "kept")
    header = ["", "arm", *(f"{d['windows']:g}" for d in results["delays"])]
    sign = "" if measure == "nll" else "+"
    rows = [[*header, "beyond the window [95 %]", f"{first} - it [95 %]"]]
    for name, arm in results["arms"].items():
        found = arm["measures"][measure][kind]
        row = [f"({arm['letter']})" if arm["letter"] else "", arm["label"]]
        row += [_number(e["mean"], sign) for e in found["delays"]]
        row.append(_interval(found["beyond"], sign))
        rows.append([*row, _interval(against[name]) if name in against else ""])
    return rows


def verdict(results: Results) -> list[str]:
    """A sentence for each gain that compares like with like, whoever wins."""
    arms = results["arms"]
    first = next((name for name in ("kept", "trained") if name in arms), None)
    if first is None or len(arms) < 2:
        return ["No verdict: there is nothing to compare with."]
    beyond = arms[first]["measures"]["repeat"][HEADLINE]["beyond"]
    if not math.isfinite(beyond["mean"]):
        return [f"No verdict: {beyond['reason']}."]
    speakers = len({
        item["speaker"] for item in results["items"]
        if all(map(math.isfinite, arms[first]["passages"][item["name"]]["repeat"][HEADLINE]))
    })  # fmt: skip
    if speakers < FEWEST_SPEAKERS:
        return [
            f"No verdict: {speakers} speakers are too few to judge by; it takes {FEWEST_SPEAKERS}."
        ]
    return [*(_sentence(results, first, gain) for gain in _RECALLED), *_worse(results, first)]


def _sentence(results: Results, first: str, gain: str) -> str:
    arms = results["arms"]
    found = arms[first]["measures"][gain][HEADLINE]["beyond"]
    far = ", ".join(f"{d['windows']:g}" for d in results["delays"] if d["beyond"])
    what, heard = _RECALLED[gain]
    label, size = arms[first]["label"], f"{found['mean']:+.4f} nats a frame {interval(found)}"
    head = f"{what} beyond the window (delays of {far} windows, codebook 0)"
    worth = f"to have heard {heard} is worth {size}"
    if found["high"] < 0:
        return f"{head} makes {label} WORSE: {worth}."
    if found["low"] <= 0:
        return f"{head}: no recall is shown by {label}: {worth}.{_in_view(results, gain)}"
    rivals = [name for name, arm in arms.items() if arm["letter"] in JUDGED_BY and name != first]
    against = {d["minus"]: d["measures"][gain][HEADLINE]["beyond"] for d in results["differences"]}
    unbeaten = [name for name in rivals if not against[name]["low"] > 0]
    if not unbeaten:
        names = ", ".join(arms[name]["label"] for name in rivals)
        return f"{head} IS RECALLED by {label}: {worth}, more than to each of: {names}."
    said = ", ".join(
        f"{arms[name]['label']} ({against[name]['mean']:+.4f} {interval(against[name])})"
        for name in unbeaten
    )
    return f"{head}: {worth} to {label}, but that is NOT shown to be more than to: {said}."


def _in_view(results: Results, gain: str) -> str:
    """What the stock base gains at the shortest delay: one who does not copy cannot show recall."""
    nearest = results["delays"][0]
    if "base" not in results["arms"] or nearest["beyond"]:
        return ""
    found = results["arms"]["base"]["measures"][gain][HEADLINE]["delays"][0]
    return (
        f" In view of attention (a delay of {nearest['windows']:g}) it is worth "
        f"{found['mean']:+.4f} {interval(found)} to the stock base."
    )


def _worse(results: Results, first: str) -> list[str]:
    """Recall or not: where the first predicts the second hearing itself worse than another arm."""
    differences = {
        d["minus"]: d["measures"]["nll"][HEADLINE]["beyond"] for d in results["differences"]
    }
    said = [
        f"{arm['label']} ({differences[name]['mean']:+.4f} {interval(differences[name])})"
        for name, arm in results["arms"].items()
        if arm["letter"] in JUDGED_BY and name in differences and differences[name]["low"] > 0
    ]
    label = results["arms"][first]["label"]
    line = (
        f"BUT after others have spoken, {label} predicts the passage worse than: {', '.join(said)}."
    )
    return [line] if said else []


def measured(results: Results) -> str:
    """How it was measured."""
    boot = results["bootstrap"]
    speakers = len({item["speaker"] for item in results["items"]})
    window, lead, passage = (
        f"{results[f'{key}_frames']} frames ({results[f'{key}_frames'] / FRAME_RATE:g} s)"
        for key in ("window", "lead_in", "passage")
    )
    return (
        f"A sequence is a lead-in of another speaker, {lead}; what is heard before, {passage}; "
        "other speakers for the delay; and the passage, as long, all frames of which are scored. "
        "Passage, place and filler of a comparison are the same, and only what was heard before "
        "changes: the passage, the words that precede it in its recording, or a stranger. "
        f"Attention sees {window}, the window: with a delay as long, no layer sees what was heard "
        "before (the first frame still sees the delayed codebooks of its last), but a stack of "
        "layers hands on a little: that is what the stock base gains. "
        f"{len(results['items'])} passages of {speakers} speakers, 95 % intervals by bootstrap "
        f"over {boot['over']} ({boot['resamples']} resamples, seed {boot['seed']})."
    )


def notes(results: Results) -> list[str]:
    """What is missing or unlike, one line each."""
    lines = [
        f"{arm['label']}, {where}: {why}"
        for arm in results["arms"].values()
        for where, why in arm["broken"].items()
    ]
    lines += [f"{f['name']} was left out: {f['reason']}" for f in results.get("failed", [])]
    letters = {arm["letter"] for arm in results["arms"].values()}
    if "c" in letters:
        lines += [f"({x}) is missing: {NEEDED[x]} (--baseline)." for x in "bd" if x not in letters]
    return lines + results.get("left_out", []) + results.get("unlike", [])


def sections(results: Results) -> list[tuple[str, Rows]]:
    """Headings and tables, codebook 0 first and in full."""
    return [
        (f"{title}, {KIND_NAMES[kind]}", gain_table(results, measure, kind))
        for kind in (HEADLINE, "codebooks1_7")
        for measure, title in TITLES.items()
        if kind == HEADLINE or measure in _RECALLED
    ]


_UNITS = (
    "Gains in nats a frame by delay in windows, more is better; beyond the window is the mean over "
    "the delays of at least one window."
)


def render(results: Results, table: Callable[[Rows], str]) -> str:
    """The whole report; `table` is `eval.tables.as_text` or `as_markdown`."""
    parts = [*verdict(results), _UNITS]
    for title, rows in sections(results):
        parts += [f"{title}:", table(rows)]
    parts += [f"- {line}" for line in notes(results)]
    parts.append(measured(results))
    if made := results.get("facts"):
        parts.append(table(fact_rows(made)))
    return "\n\n".join(parts)


def page(results: Results, title: str, svg: bytes) -> str:
    """The report as one HTML document, the picture inside."""
    parts = [f"<h1>{escape(title)}</h1>"]
    parts += [f'<p class="verdict">{escape(line)}</p>' for line in verdict(results)]
    parts += [picture(svg, "gain by delay"), f"<p>{_UNITS}</p>"]
    for heading, rows in sections(results):
        parts += [f"<h2>{escape(heading)}</h2>", html_table(rows)]
    if missing := notes(results):
        parts.append("<h2>Not there, or unlike</h2>" + items(missing))
    parts.append(f"<h2>How it was measured</h2><p>{escape(measured(results))}</p>")
    return document(title, [*parts, facts(results.get("facts", {}))])


def _number(value: float, sign: str) -> str:
    return f"{value:{sign}.4f}" if math.isfinite(value) else "-"


def _interval(found: dict[str, Any], sign: str = "+") -> str:
    if not math.isfinite(found["mean"]):
        return "-"
    if sign or not math.isfinite(found["low"]):
        return f"{found['mean']:{sign}.4f} {interval(found)}"
    return f"{found['mean']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"
