"""What readings of memories mean, in words: each sentence names layer, heads and value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

from moshi_ttt.monitor import Reading, Values

RECENT = 5
"""Readings that a judgement of the present rests on, the last ones."""
CLOSED, FULL, MOSTLY = 1e-3, 0.99, 0.5
STUCK = 0.01
FAR, GROWN = 100.0, 3.0
STILL = 3e-5  # what the norm of a row in LaCT is kept away from 0 with moves it by 1e-5
ORTHOGONAL = (0.7, 1.3)
GATES = {
    "m": "momentum gate m", "w": "write gate w", "theta": "momentum gate theta",
    "gamma": "frame gate gamma", "alpha": "keep gate alpha",
}  # fmt: skip

COLUMNS = {
    "loss_before": "inner loss", "loss_after": "after write", "update": "|dW|/|W|",
    "state": "|W|/|W0|", "moved": "|W-W0|/|W0|", "momentum": "momentum", "eta": "eta",
    "m": "m", "w": "w", "alpha": "alpha", "theta": "theta", "gamma": "gamma",
    "ns_min": "NS min", "ns_max": "NS max", "gate_abs": "|gate|", "attention": "attention",
    "memory": "memory",
}  # fmt: skip
"""What a table shows, and how it is called there."""


class Finding(NamedTuple):
    """Something that is wrong with a memory.

    Attributes:
        key: which kind, and of what layer; the same when the same is found again.
        text: a sentence.
    """

    key: str
    text: str


def findings(history: Sequence[Reading], *, training: bool = False) -> list[str]:
    """What is wrong, in plain sentences; empty if nothing is."""
    return [found.text for found in find(history, training=training)]


def find(history: Sequence[Reading], *, training: bool = False) -> list[Finding]:
    """What is wrong with the memories that a history of readings is about.

    Args:
        history: in order; readings of a long history may have been thinned out.
        training: the readings are of a training: gates start closed, and states come and go with
            the recordings. Else they are of one stream of a trained model.
    """
    names = dict.fromkeys(name for reading in history for name in reading.layers)
    out: list[Finding] = []
    for name in names:
        series = [(r.at, r.layers[name]) for r in history if name in r.layers]
        label = f"layer {name.rpartition('.')[2]}"
        for kind, text in _of_layer(series, training):
            out.append(Finding(f"{kind} {name}", f"{label}: {text}"))
    return out


def _of_layer(series: Sequence[tuple[int, Values]], training: bool) -> Iterable[tuple[str, str]]:
    last, recent = series[-1][1], [values for _, values in series[-RECENT:]]
    enough = len(series) >= RECENT
    opening, full = _one(last, "gate_abs"), _one(last, "gate_full")
    if opening < CLOSED and (enough or not training):
        yield "closed", f"the gate is closed, mean |tanh(gate)| = {opening:.2g}: nothing is heard"
    if full > MOSTLY:
        share = f"{100 * full:.0f} % of the channels have |tanh(gate)| > {FULL:g}"
        yield "full", f"the gate is saturated, {share}: it can hardly learn any more"
    for name, label in GATES.items():
        means = _over(recent, name)
        if text := _heads(means, lambda x: x < STUCK, low=True):
            yield f"{name} at 0", f"the {label} is stuck at 0 {text}"
        # a memory that keeps everything is no fault
        if name != "alpha" and (text := _heads(means, lambda x: x > 1 - STUCK)):
            yield f"{name} at 1", f"the {label} is stuck at 1 {text}"
    yield from _of_state(series, training)
    before, after = _over(recent, "loss_before"), _over(recent, "loss_after")
    gain = [b - a for b, a in zip(before, after, strict=True)]
    if (enough or not training) and (text := _heads(gain, lambda x: x <= 0, low=True)):
        yield "loss", f"the write does not lower the inner loss (before minus after) {text}"
    low, high = ORTHOGONAL
    for key, wrong in (("ns_min", lambda x: x < low), ("ns_max", lambda x: not low <= x <= high)):
        if text := _heads(_over(recent, key), wrong, low=key == "ns_min"):
            yield (
                "newton-schulz",
                f"Newton-Schulz has not converged, a singular value away from 1 {text}",
            )
            break


def _of_state(series: Sequence[tuple[int, Values]], training: bool) -> Iterable[tuple[str, str]]:
    """A state that explodes, grows and grows, or never moves."""
    last = _many(series[-1][1], "state")
    if text := _heads(last, lambda x: x > FAR):
        yield "explodes", f"the state explodes, ||W|| / ||W0|| {text}"
    elif not training and (text := _heads(_grown(series), lambda x: x > GROWN)):
        yield "grows", f"the state grows without levelling, ||W|| last over first {text}"
    most = [max(_known(column), default=math.nan) for column in _columns(series, "moved")]
    updates = [max(_known(column), default=math.nan) for column in _columns(series, "update")]
    still = [m if u <= STILL else math.nan for m, u in zip(most, updates, strict=True)]
    if text := _heads(still, lambda x: x <= STILL):
        yield "dead", f"the state never moves, ||W - W0|| / ||W0|| {text}"


def _grown(series: Sequence[tuple[int, Values]]) -> list[float]:
    """Of each head the last norm over the first; NaN where its growth is levelling off.

    It is not if the second half of the time has brought at least 0.8 of what the first half has.
    """
    out = []
    first, end = series[0][0], series[-1][0]
    for column in _columns(series, "state"):
        points = [(at, x) for (at, _), x in zip(series, column, strict=True) if math.isfinite(x)]
        if len(points) < 2 * RECENT:
            out.append(math.nan)
            continue
        middle = min(points, key=lambda point: abs(point[0] - (first + end) / 2))[1]
        start, now = points[0][1], points[-1][1]
        goes_on = now - middle >= 0.8 * (middle - start) > 0
        out.append(now / start if goes_on else math.nan)
    return out


def _heads(values: Sequence[float], wrong: Callable[[float], bool], *, low: bool = False) -> str:
    """`in head 3 (0.001)`, or `in 5 of 8 heads, worst head 3 (0.001)`; empty if none is wrong."""
    bad = {head: x for head, x in enumerate(values) if not math.isnan(x) and wrong(x)}
    if not bad:
        return ""
    worst = (min if low else max)(bad, key=lambda head: bad[head])
    value = f"({bad[worst]:.3g})"
    if len(bad) == 1:
        return f"in head {worst} {value}"
    names = "all" if len(bad) == len(values) else f"{len(bad)} of {len(values)}"
    return f"in {names} heads, worst head {worst} {value}"


def _many(values: Values, name: str) -> list[float]:
    """A value of each head; none where the family has no such thing."""
    found = values.get(name, [])
    assert isinstance(found, list)
    return found


def _one(values: Values, name: str) -> float:
    """A value of the layer."""
    found = values[name]
    assert isinstance(found, float)
    return found


def _columns(series: Sequence[tuple[int, Values]], name: str) -> list[tuple[float, ...]]:
    """Of each head its values in time."""
    return list(zip(*(_many(values, name) for _, values in series), strict=True))


def _over(recent: Sequence[Values], name: str) -> list[float]:
    """The mean of each head over the last readings, those that are numbers."""
    columns = zip(*(_many(values, name) for values in recent), strict=True)
    return [fmean(known) if (known := _known(column)) else math.nan for column in columns]


def _known(column: Iterable[float]) -> list[float]:
    return [x for x in column if not math.isnan(x)]


class History:
    """Readings of a long run, thinned out to at most 256: every other one goes when it is full."""

    def __init__(self, readings: Iterable[Reading] = ()) -> None:
        self.readings: list[Reading] = []
        for reading in readings:
            self.add(reading)

    def add(self, reading: Reading) -> None:
        """One more, the newest."""
        self.readings.append(reading)
        if len(self.readings) > 256:
            del self.readings[1:-RECENT:2]


def table(reading: Reading) -> str:
    """A reading in a few columns, a line a layer; the heads' mean, where not all is NaN."""
    rows = [["memory", *COLUMNS.values()]]
    for name, values in reading.layers.items():
        cells = [_mean(values, key) for key in COLUMNS]
        rows.append([f"layer {name.rpartition('.')[2]}", *cells])
    shown = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in shown}
    lines = ["  ".join(row[i].rjust(widths[i]) for i in shown) for row in rows]
    return "".join(f"{line}\n" for line in lines)


def _mean(values: Values, name: str) -> str:
    found = values.get(name, math.nan)
    known = _known(found if isinstance(found, list) else [found])
    return f"{fmean(known):.4g}" if known else ""
