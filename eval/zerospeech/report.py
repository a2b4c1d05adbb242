"""What the pairs of a spoken-language set say: accuracies, differences, intervals, a verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.stats import RESAMPLES, SEED, Array, bootstrap
from eval.tables import fact_rows
from eval.zerospeech.sets import BANDS, IN_VOCABULARY, Pair

ALL, BASE, TRAINED = "all", "base", "trained"
CHANCE = 0.5
FEWEST_ITEMS = 6
"""With fewer, even items that all agree do so by chance in more than 5 % of cases (2 / 2^n)."""
MOST_LINES = 20
"""Of what was left out; results.json has all."""

Results = dict[str, Any]
Table = Callable[[list[list[str]]], str]


def summarise(
    pairs: Sequence[Pair], nll: Mapping[str, Mapping[Path, float]], labels: Mapping[str, str]
) -> Results:
    """Accuracy of every arm, paired differences to the base and of the trained model to the rest.

    As the published evaluations have it: a pair counts 1 if the correct clip's NLL is the lower,
    1/2 at a tie; an item is the mean of its voices, and the accuracy the mean of the items. The
    95 % intervals are of one bootstrap over items.

    Args:
        pairs: at least one.
        nll: arm -> file -> score; `"base"` and `"trained"` are among them.
        labels: arm -> its name for people.

    Returns:
        Plain values; a number that cannot be had is None, with a `reason` beside it.
    """
    items = list(dict.fromkeys(pair.item for pair in pairs))
    groups = [ALL, *_groups(pairs)]
    member = {group: np.array([group == ALL] * len(items)) for group in groups}
    place = {item: i for i, item in enumerate(items)}
    for pair in pairs:
        for group in pair.groups:
            member[group][place[pair.item]] = True
    right = {arm: _by_item(pairs, place, scores) for arm, scores in nll.items()}
    against = [(arm, BASE) for arm in nll if arm != BASE]
    against += [(TRAINED, arm) for arm in nll if arm not in (BASE, TRAINED)]
    columns = dict(right)
    columns |= {f"{arm} - {other}": right[arm] - right[other] for arm, other in against}
    keys = [(column, group) for column in columns for group in groups]
    values = [np.where(member[group], columns[column], np.nan) for column, group in keys]
    low, high = bootstrap(np.stack(values, axis=1), items)
    found = {
        key: _estimate(v, float(lo), float(hi))
        for key, v, lo, hi in zip(keys, values, low, high, strict=True)
    }
    return {
        "chance": CHANCE,
        "bootstrap": {"over": "items", "resamples": RESAMPLES, "seed": SEED},
        "items": len(items),
        "groups": groups,
        "arms": {
            arm: {"label": labels[arm], "accuracy": {g: found[arm, g] for g in groups}}
            for arm in nll
        },
        "differences": [
            {
                "arm": arm,
                "minus": other,
                "accuracy": {g: found[f"{arm} - {other}", g] for g in groups},
            }
            for arm, other in against
        ],
        "pairs": [
            {
                "item": pair.item,
                "voice": pair.voice,
                "groups": list(pair.groups),
                "correct": str(pair.correct),
                "incorrect": str(pair.incorrect),
                "nll": {arm: [v[pair.correct], v[pair.incorrect]] for arm, v in nll.items()},
            }
            for pair in pairs
        ],
    }


def _groups(pairs: Sequence[Pair]) -> list[str]:
    found = {group for pair in pairs for group in pair.groups}
    first = [IN_VOCABULARY, BANDS[0], *(f"frequency {band}" for band in BANDS.values())]
    return [g for g in first if g in found] + sorted(found - set(first))


def _by_item(pairs: Sequence[Pair], place: Mapping[str, int], nll: Mapping[Path, float]) -> Array:
    sums, voices = np.zeros((2, len(place)))
    for pair in pairs:
        one, other = nll[pair.correct], nll[pair.incorrect]
        sums[place[pair.item]] += 0.5 if one == other else float(one < other)
        voices[place[pair.item]] += 1
    return sums / voices


def _estimate(values: Array, low: float, high: float) -> dict[str, Any]:
    known = values[np.isfinite(values)]
    out: dict[str, Any] = {"mean": float(known.mean()), "low": low, "high": high}
    out |= {"n": len(known), "reason": ""}
    if len(known) < 2:
        out |= {"low": None, "high": None, "reason": "one item only: no interval"}
    return out


def verdict(results: Results, arm: str = TRAINED) -> str:
    """One sentence that follows from the numbers: what the arm has cost against the base."""
    found = _differences(results)[arm, BASE][ALL]
    base, label = results["arms"][BASE], results["arms"][arm]["label"]
    n = results["items"]
    if n < FEWEST_ITEMS:
        return f"No verdict: {n} items are too few to judge by; it takes {FEWEST_ITEMS}."
    size = f"{_points(found['mean'])} points {_interval(found)}"
    if found["high"] < 0:
        return f"The {label} COSTS accuracy: {size} against the {base['label']}."
    if found["low"] > 0:
        return f"The {label} costs nothing, it gains: {size} against the {base['label']}."
    if base["accuracy"][ALL]["low"] <= CHANCE:
        return (
            f"Nothing is shown: the {base['label']} is not above chance itself, so there was "
            f"nothing to lose; the {label}'s difference is {size}."
        )
    if found["low"] == found["high"] == 0:
        return f"The {label} costs nothing: it decides all {n} items as the {base['label']} does."
    return (
        f"The {label} costs nothing measurable: {size} against the {base['label']}; a loss of more "
        f"than {abs(100 * found['low']):.1f} points is outside the interval."
    )


def render(results: Results, table: Table) -> str:
    """The whole report.

    Args:
        results: of `summarise`, with `title`, `scoring` and `left_out`.
        table: `eval.tables.as_text` or `as_markdown`.
    """
    arms, against = results["arms"], _differences(results)
    head = ["arm", "accuracy, % [95 %]", "it - base, points [95 %]", "trained - it"]
    rows = [head if len(arms) > 2 else head[:-1]]
    for arm, about in arms.items():
        row = [about["label"], _percent(about["accuracy"][ALL])]
        for pair in ((arm, BASE), (TRAINED, arm))[: len(rows[0]) - 2]:
            row.append(_change(against[pair][ALL]) if pair in against else "")
        rows.append(row)
    voiced = len(results["pairs"])
    parts = [f"{results['title']}: {results['items']} items, {voiced} pairs; chance is 50 %.",
             table(rows)]  # fmt: skip
    if len(results["groups"]) > 1:
        change = against[TRAINED, BASE]
        rows = [["items", "n", *arms, f"{TRAINED} - {BASE} [95 %]"]]
        for group in results["groups"]:
            accuracies = [about["accuracy"][group] for about in arms.values()]
            row = [group, str(accuracies[0]["n"]), *map(_percent, accuracies)]
            rows.append([*row, _change(change[group])])
        parts.append(table(rows))
    parts += [verdict(results), results["scoring"]]
    boot = results["bootstrap"]
    parts.append(
        f"A tie counts half, an item is the mean of its voices; 95 % intervals by bootstrap over "
        f"items ({boot['resamples']} resamples, seed {boot['seed']})."
    )
    if left := results["left_out"]:
        more = [f"and {len(left) - MOST_LINES} more"] if len(left) > MOST_LINES else []
        parts.append("\n".join([f"Left out ({len(left)}):", *left[:MOST_LINES], *more]))
    if made := results.get("facts"):
        parts.append(table(fact_rows(made)))
    return "\n\n".join(parts)


def _differences(results: Results) -> dict[tuple[str, str], dict[str, Any]]:
    return {(d["arm"], d["minus"]): d["accuracy"] for d in results["differences"]}


def _percent(found: Mapping[str, Any]) -> str:
    ends = f" [{100 * found['low']:.1f}, {100 * found['high']:.1f}]" if not found["reason"] else ""
    return f"{100 * found['mean']:.1f}{ends}"


def _change(found: Mapping[str, Any]) -> str:
    return f"{_points(found['mean'])} {_interval(found)}"


def _points(value: float) -> str:
    return f"{round(100 * value, 1) + 0.0:+.1f}"  # + 0.0: there is no minus zero


def _interval(found: Mapping[str, Any]) -> str:
    if found["reason"]:
        return "[no interval]"
    return f"[{_points(found['low'])}, {_points(found['high'])}]"
