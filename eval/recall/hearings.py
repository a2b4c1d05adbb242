"""Sequences of the recall probe: something is heard, others speak, and a passage is heard.

    lead-in (another speaker) | heard before | filler of D frames (other speakers) | passage

The passage is always the same frames at the same place after the same filler; only what was heard
before changes: the passage itself, other words of its speaker, or a stranger.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eval.arms import hashed
from eval.scores import Item
from moshi_ttt.errors import UserError

FRAME_RATE = 12.5
HEARD = ("passage", "speaker", "stranger")
"""What may be heard before: the passage, other words of its speaker, another speaker."""
FEWEST = 3
"""Speakers it takes: one to recall, one who speaks in between, one in the first one's place."""
UNITS = {"min": 60 * FRAME_RATE, "s": FRAME_RATE}


@dataclass(frozen=True)
class Plan:
    """Lengths of the parts of a sequence, in frames.

    Attributes:
        lead_in: another speaker's speech, so that what is heard before is not heard cold.
        passage: what is heard, before and again.
        delays: of filler in between, ascending.
        passages: of each recording, a number.
    """

    lead_in: int
    passage: int
    delays: tuple[int, ...]
    passages: int = 1

    @property
    def shortest(self) -> int:
        """Frames that each recording must have: passages and other words, or a lead-in."""
        return max(2 * self.passage * self.passages, self.lead_in)

    @property
    def longest(self) -> int:
        """Frames of a recording that are used, at most."""
        return max(self.shortest, self.lead_in + self.delays[-1])

    def frames(self, delay: int) -> int:
        """Of a whole sequence."""
        return self.lead_in + 2 * self.passage + delay

    def first(self) -> slice:
        """Frames of what is heard before."""
        return slice(self.lead_in, self.lead_in + self.passage)


def delays(text: str) -> list[str]:
    """An option's value: `0.5,1,2` in windows, or with units, `30s,1min`; checked only."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        if parts and all(0 < _number(part)[0] < math.inf for part in parts):
            return parts
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a list of windows (0.5,1,2), seconds (30s) or minutes (1min)"
    )


def plan(window: int, passage_windows: float, given: Sequence[str], passages: int = 1) -> Plan:
    """Windows, seconds and minutes as frames.

    Args:
        window: frames that attention sees.
        passage_windows: length of a passage.
        given: delays, see `delays`.
        passages: of each recording.
    """
    frames = {max(1, round(n * (unit or window))) for n, unit in map(_number, given)}
    passage = max(1, round(passage_windows * window))
    return Plan(window, passage, tuple(sorted(frames)), passages)


def _number(part: str) -> tuple[float, float | None]:
    for name, unit in UNITS.items():
        if part.endswith(name):
            return float(part.removesuffix(name)), unit
    return float(part), None


def refuse_few(speakers: set[str]) -> None:
    """See that there are speakers enough.

    Raises:
        UserError: there are not.
    """
    if len(speakers) < FEWEST:
        raise UserError(
            f"{FEWEST} speakers are needed (one to recall, one in between, one in the first one's "
            f"place), there are {len(speakers)}: {', '.join(sorted(speakers))}"
        )


class Hearings:
    """The sequences of a panel of recordings, of different speakers each.

    Who leads in, who is the stranger and who speaks in between is decided by hashes of the names,
    not by the order of the recordings. A recording is cut into pairs from its beginning: other
    words, and the passage that follows them, so that the speaker goes on after an interruption.

    Attributes:
        pairs: other words and passage, one item each.

    Args:
        items: recordings.
        plan: lengths.

    Raises:
        UserError: too few speakers, a recording that is too short, or too little filler.
    """

    def __init__(self, items: Sequence[Item], plan: Plan) -> None:
        refuse_few({item.speaker for item in items})
        for item in items:
            if item.frames < plan.shortest:
                raise UserError(
                    f"{item.name}: {plan.shortest} frames are needed, not {item.frames}"
                )
        self.items, self.plan = list(items), plan
        self.pairs = [pair for item in items for pair in self._cut(item)]
        self.parts = [self._parts(pair) for pair in self.pairs]
        for item, (_, _, filler) in zip(self.pairs, self.parts, strict=True):
            if filler.shape[-1] < plan.delays[-1]:
                raise UserError(
                    f"the longest delay takes {plan.delays[-1]} frames of other speakers, there "
                    f"are {filler.shape[-1]} for {item.name}: it needs more or longer recordings, "
                    "or shorter --delays"
                )

    def _cut(self, item: Item) -> list[Item]:
        length = 2 * self.plan.passage
        return [
            replace(item, name=f"{item.name}, {start}", codes=item.codes[:, start : start + length])
            for start in range(0, self.plan.passages * length, length)
        ]

    def _parts(self, item: Item) -> tuple[Tensor, Tensor, Tensor]:
        """Lead-in, stranger and filler."""
        others = [other for other in self.items if other.speaker != item.speaker]
        others.sort(key=lambda other: hashed(f"{item.name} {other.name}"))
        stranger = others[0]
        leader, *rest = [other for other in others if other.speaker != stranger.speaker]
        lead_in = self.plan.lead_in
        filler = torch.cat([*(other.codes for other in rest), leader.codes[:, lead_in:]], 1)
        return (
            leader.codes[:, :lead_in],
            stranger.codes[:, : self.plan.passage],
            filler[:, : self.plan.delays[-1]],
        )

    def sequences(self, delay: int, heard: str) -> list[Item]:
        """One sequence a pair, all of the same length.

        Args:
            delay: frames of filler, one of the plan's.
            heard: of `HEARD`.
        """
        out = []
        for item, (lead_in, stranger, filler) in zip(self.pairs, self.parts, strict=True):
            words, passage = item.codes.chunk(2, 1)
            before = {"passage": passage, "speaker": words, "stranger": stranger}[heard]
            codes = torch.cat([lead_in, before, filler[:, :delay], passage], 1)
            out.append(Item(f"{item.name}, {heard} before, {delay} frames", item.speaker, codes))
        return out
