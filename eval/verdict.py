"""What the numbers say of the claim, in words: with the memory, what lies far back helps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from eval.stats import SCALAR

HEADLINE = "codebook0"
FEWEST_SPEAKERS = 6
"""With fewer, even speakers who all agree do so by chance in more than 5 % of cases (2 / 2^n)."""
TAKEN = 0.5
"""A gain is taken away if the interval of what is left excludes this part of it; an interval that
merely holds 0 may be a wide one."""
NEEDED = {
    "b": "no checkpoint without memory was given",
    "d": "no checkpoint trained with writing off was given",
    "e": "the reset was not scored",
    "f": "no shuffled history was scored",
}
"""Letter of an arm that the claim is judged by -> what is said where it is missing."""

Results = dict[str, Any]
"""What `eval.summary.summarise` returns."""


@dataclass(frozen=True)
class Finding:
    """One condition of the claim.

    Attributes:
        holds: None if it cannot be judged.
        text: what was found, one sentence.
    """

    holds: bool | None
    text: str


def findings(results: Results) -> list[Finding]:
    """The conditions of the claim: c beats b, d and e, and another recording's history does not.

    All over the range of the scalar, codebook 0, by the 95 % interval of the paired difference.
    """
    out: list[Finding] = []
    for letter in ("b", "d", "e"):
        names = [name for name, arm in results["arms"].items() if arm["letter"] == letter]
        out += [_against(results, letter, name) for name in names]
        if not names:
            out.append(Finding(None, f"({letter}) cannot be judged: {NEEDED[letter]}."))
    if difference(results, "kept", "shuffled") is None:
        return [*out, Finding(None, f"(f) cannot be judged: {NEEDED['f']}.")]
    return [*out, _against(results, "f", "shuffled"), _what_is_left(results)]


def _against(results: Results, letter: str, other: str) -> Finding:
    found = difference(results, "kept", other)
    label = results["arms"][other]["label"]
    if found is None or not math.isfinite(found["low"]):
        reason = found["reason"] if found else "nothing to compare with"
        return Finding(None, f"({letter}) {label}: cannot be judged: {reason}.")
    if few := _too_few(_speakers(results, "kept", other)):
        return Finding(None, f"({letter}) {label}: cannot be judged: {few}.")
    size = f"{found['mean']:+.4f} nats a frame {interval(found)}{_beyond(results, other)}"
    if found["high"] < 0:
        return Finding(True, f"({letter}) Better than {label}: {size}.")
    if found["low"] > 0:
        return Finding(False, f"({letter}) WORSE than {label}: {size}.")
    return Finding(False, f"({letter}) No difference is shown to {label}: {size}.")


def _speakers(results: Results, *arms: str) -> int:
    """Speakers of the recordings that have the scalar in all these arms."""
    recordings = [results["arms"][arm]["recordings"] for arm in arms]
    return len({
        item["speaker"] for item in results["items"]
        if all(math.isfinite(r[item["name"]][HEADLINE][SCALAR]) for r in recordings)
    })  # fmt: skip


def _too_few(speakers: int) -> str:
    few = f"{speakers} speakers are too few to judge by; it takes {FEWEST_SPEAKERS}"
    return few if speakers < FEWEST_SPEAKERS else ""


def _beyond(results: Results, other: str) -> str:
    """What the difference is further on; no part of the condition, which was fixed beforehand."""
    found = difference(results, "kept", other, name="4x-end")
    if found is None or not math.isfinite(found["mean"]):
        return ""
    return f" (beyond 4x: {found['mean']:+.4f} {interval(found)})"


def _what_is_left(results: Results) -> Finding:
    left = difference(results, "shuffled", "reset")
    gain = difference(results, "kept", "reset")
    if left is None or gain is None or not math.isfinite(left["low"]):
        reason = left["reason"] if left else NEEDED["e"]
        return Finding(None, f"(f) what another recording's history leaves: {reason}.")
    if few := _too_few(_speakers(results, "kept", "shuffled", "reset")):
        return Finding(None, f"(f) what another recording's history leaves: {few}.")
    size = f"{left['mean']:+.4f} nats {interval(left)}"
    if not gain["high"] < 0:
        return Finding(None, "(f) There is no gain over the reset for another history to take.")
    share = left["mean"] / gain["mean"]
    part = f"{size}, {share:.0%} of it" if share > 0 else size
    if left["high"] < 0:
        return Finding(
            False,
            "(f) With another recording's history some of the gain over the reset is left: "
            f"{part}; that part is no memory of the recording.",
        )
    if left["low"] <= TAKEN * gain["mean"]:
        return Finding(
            None,
            "(f) Whether another recording's history takes the gain over the reset away cannot be "
            f"told, half of it may be left: {part}.",
        )
    return Finding(
        True,
        f"(f) Another recording's history takes the gain over the reset away; left is {part}.",
    )


def judged(results: Results) -> bool:
    """Whether there is a memory, and something to judge it by."""
    return "kept" in results["arms"] and len(results["arms"]) > 1


def verdict(results: Results) -> str:
    """One sentence that follows from the numbers, whoever wins."""
    if not judged(results):
        return _plain(results)
    scalar = results["arms"]["kept"]["ranges"][HEADLINE][SCALAR]
    if not math.isfinite(scalar["mean"]):
        return f"No verdict: from 1x to 4x of the window, {scalar['reason']}."
    if few := _too_few(_speakers(results, "kept")):
        return f"No verdict: {few}."
    found = findings(results)
    where = f"beyond the window (1x to 4x, codebook 0, {scalar['n']} recordings)"
    if any(f.holds is False for f in found):
        return f"The memory does NOT earn its claim {where}: not every condition holds."
    if any(f.holds is None for f in found):
        held = [f for f in found if f.holds]
        return (
            f"The claim cannot be judged in full {where}: of {len(found)} conditions {len(held)} "
            f"hold, and {len(found) - len(held)} cannot be judged."
        )
    return (
        f"The memory earns its claim {where}: it predicts better than without it in every "
        "comparison, and another recording's history takes the gain away."
    )


def _plain(results: Results) -> str:
    """For two arms without a memory to judge: which is better."""
    first = next((d for d in results["differences"]), None)
    if first is None:
        return "No verdict: there is nothing to compare with."
    found = first["ranges"][HEADLINE][SCALAR]
    one, other = (results["arms"][first[k]]["label"] for k in ("arm", "minus"))
    if not math.isfinite(found["mean"]):
        return f"No verdict: from 1x to 4x of the window, {found['reason']}."
    if few := _too_few(_speakers(results, first["arm"], first["minus"])):
        return f"No verdict: {few}."
    size = f"{found['mean']:+.4f} nats a frame {interval(found)}"
    if found["high"] < 0:
        said = f"{one} predicts codebook 0 better than {other}: {size}"
    elif found["low"] > 0:
        said = f"{one} predicts codebook 0 WORSE than {other}: {size}"
    else:
        said = f"no difference is shown between {one} and {other}: {size}"
    return f"Beyond the window (1x to 4x), {said}."


def difference(
    results: Results, arm: str, minus: str, kind: str = HEADLINE, name: str = SCALAR
) -> dict[str, Any] | None:
    """The estimate of a paired difference, None if the two were not compared."""
    for found in results["differences"]:
        if (found["arm"], found["minus"]) == (arm, minus):
            return found["ranges"][kind][name]
    return None


def interval(found: dict[str, Any]) -> str:
    """`[low, high]`, or that there is none."""
    if not math.isfinite(found["low"]):
        return "[no interval]"
    return f"[{found['low']:+.4f}, {found['high']:+.4f}]"
