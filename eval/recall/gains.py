"""What the recall probe's scores say: gains by delay and beyond the window, paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.arms import KEPT, TRAINED, Arm
from eval.keep import Found
from eval.recall.hearings import FRAME_RATE, HEARD, Plan
from eval.scores import Item
from eval.stats import RESAMPLES, SEED, Array, estimate, mean_of

KINDS = ("codebook0", "codebooks1_7")
GAINS = ("repeat", "return", "second")
"""`repeat`: NLL of the passage after other words of its speaker, minus after itself: what was said.
`return`: after a stranger, minus after other words of its speaker (A-B-A): who spoke.
`second`: its first hearing minus its second, in which place and context change too."""
NLL = "nll"
"""NLL of the second hearing itself."""
MEASURES = (*GAINS, NLL)
Heard = Mapping[tuple[int, str], Sequence[Found]]
"""Delay and what was heard before -> one score a pair of other words and passage."""
Table = dict[str, dict[str, Array]]
"""Measure -> kind -> [N, delays] nats a frame; more of a gain is better."""


def measure(found: Heard, plan: Plan) -> Table:
    """The measures of one arm, means over the passage's frames; NaN where an NLL is no number."""
    table: Table = {name: {} for name in MEASURES}
    last, first = slice(-plan.passage, None), plan.first()
    for kind in KINDS:
        nll = {
            heard: np.array(
                [[mean_of(f.nll[kind][last]) for f in found[delay, heard]] for delay in plan.delays]
            ).T
            for heard in HEARD
        }
        table["repeat"][kind] = nll["speaker"] - nll["passage"]
        table["return"][kind] = nll["stranger"] - nll["speaker"]
        table[NLL][kind] = nll["passage"]
        table["second"][kind] = np.array(
            [  # frame by frame: the last frames of a delayed codebook are predicted once only
                [mean_of(f.nll[kind][first] - f.nll[kind][last]) for f in found[delay, "passage"]]
                for delay in plan.delays
            ]
        ).T
    return table


def compare(
    found: Mapping[Arm, Heard], items: Sequence[Item], plan: Plan, window: int
) -> dict[str, Any]:
    """Measures of every arm and paired differences, with 95 % intervals over speakers.

    Args:
        found: scores of every arm.
        items: what is heard, in the order of the scores: `Hearings.pairs`.
        plan: lengths.
        window: frames that attention sees.

    Returns:
        Plain values (NaN where something cannot be computed, with a `reason` beside it):
        `delays`; `arms[name]` with `measures[measure][kind]` (`delays`, one estimate each, and
        `beyond`, the mean over the delays of at least a window), `passages[item][measure][kind]` by
        delay and `broken[sequence]`; `differences` of the memory that is kept to each other arm.
    """
    speakers = [item.speaker for item in items]
    tables = {arm.name: measure(heard, plan) for arm, heard in found.items()}
    beyond = np.array([delay >= window for delay in plan.delays])

    def estimates(values: Array) -> dict[str, Any]:
        broken = "an NLL is no number"
        far = values[:, beyond].mean(1) if beyond.any() else np.full(len(values), np.nan)
        missing = broken if beyond.any() else f"no delay reaches the window of {window} frames"
        return {
            "delays": [estimate(column, speakers, broken).to_dict() for column in values.T],
            "beyond": estimate(far, speakers, missing).to_dict(),
        }

    def of(table: Table) -> dict[str, Any]:
        return {g: {k: estimates(values) for k, values in t.items()} for g, t in table.items()}

    first = KEPT.name if KEPT.name in tables else TRAINED.name
    return {
        "window_frames": window,
        "lead_in_frames": plan.lead_in,
        "passage_frames": plan.passage,
        "delays": [
            {"frames": d, "windows": d / window, "seconds": d / FRAME_RATE, "beyond": bool(far)}
            for d, far in zip(plan.delays, beyond, strict=True)
        ],
        "bootstrap": {"over": "speakers", "resamples": RESAMPLES, "seed": SEED},
        "items": [{"name": item.name, "speaker": item.speaker} for item in items],
        "arms": {
            arm.name: {
                "label": arm.label,
                "letter": arm.letter,
                "mode": arm.mode,
                "checkpoint": str(arm.checkpoint) if arm.checkpoint else None,
                "measures": of(tables[arm.name]),
                "passages": {
                    item.name: {
                        name: {kind: values[i].tolist() for kind, values in table.items()}
                        for name, table in tables[arm.name].items()
                    }
                    for i, item in enumerate(items)
                },
                "broken": {
                    f"{item.name}, {name} before, {delay} frames": one.broken
                    for (delay, name), scores in heard.items()
                    for item, one in zip(items, scores, strict=True)
                    if one.broken
                },
            }
            for arm, heard in found.items()
        },
        "differences": [
            {
                "arm": first,
                "minus": other,
                "measures": of(_minus(tables[first], tables[other])),
            }
            for other in tables
            if first in tables and other != first
        ],
    }


def _minus(a: Table, b: Table) -> Table:
    return {name: {kind: a[name][kind] - b[name][kind] for kind in KINDS} for name in MEASURES}
