"""Which segment each lane reads next: whole numbers only, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np


class Piece(NamedTuple):
    """One segment of a recording.

    Attributes:
        corpus: index of the corpus.
        recording: index in it.
        start: first frame.
        stop: frame after the last; at most `segment_frames` later.
        begins: the lane starts anew here: nothing it carried belongs to this.
    """

    corpus: int
    recording: int
    start: int
    stop: int
    begins: bool


@dataclass
class _Passage:
    corpus: int
    recording: int
    next: int
    stop: int
    begins: bool = True


class Reading:
    """The reading order of all lanes of a run.

    A lane reads a passage from beginning to end in consecutive segments, then takes the next of one
    queue that all lanes share. A passage is a whole recording, or (`whole=False`) one segment of
    it. Which corpus it is drawn from is decided by the weights, counted in segments, without
    chance: always the one furthest behind its share. Every corpus is read in epochs of its own,
    each passage once in each; so no lane ever lacks data, and nothing is read twice or left out,
    whatever the number of ranks: every rank computes the order of all lanes and reads its own.

    Args:
        lengths: of each corpus, the frames of its recordings.
        weights: of the corpora, against each other.
        lanes: of all ranks together.
        segment_frames: longest segment.
        whole: passages are whole recordings.
        shuffle: a new order of the passages in every epoch; otherwise the manifest's.
        seed: of the order.
    """

    def __init__(
        self,
        lengths: Sequence[Sequence[int]],
        weights: Sequence[float],
        *,
        lanes: int,
        segment_frames: int,
        whole: bool,
        shuffle: bool,
        seed: int,
    ) -> None:
        self.weights, self.segment_frames = list(weights), segment_frames
        self.shuffle, self.seed = shuffle, seed
        step = None if whole else segment_frames
        self.passages = [
            [
                (recording, start, frames if step is None else min(start + step, frames))
                for recording, frames in enumerate(found)
                for start in range(0, frames, step or max(1, frames))
            ]
            for found in lengths
        ]
        self.drawn = [0] * len(self.passages)
        self.segments = [0] * len(self.passages)
        self.lanes: list[_Passage | None] = [None] * lanes
        self._order = lru_cache(maxsize=2 * len(self.passages))(self._make_order)

    def advance(self) -> list[Piece]:
        """The next segment of every lane, in the order of the lanes."""
        pieces = []
        for lane, held in enumerate(self.lanes):
            passage = self._draw() if held is None else held
            stop = min(passage.next + self.segment_frames, passage.stop)
            pieces.append(
                Piece(passage.corpus, passage.recording, passage.next, stop, passage.begins)
            )
            passage.next, passage.begins = stop, False
            self.lanes[lane] = passage if stop < passage.stop else None
        return pieces

    @property
    def epoch(self) -> float:
        """Epochs begun of the corpus that is furthest, in passages drawn."""
        return max(n / len(p) for n, p in zip(self.drawn, self.passages, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """All there is to go on from, as plain JSON values."""
        lanes = [None if p is None else [p.corpus, p.recording, p.next, p.stop] for p in self.lanes]
        return {"drawn": list(self.drawn), "segments": list(self.segments), "lanes": lanes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: it is of other corpora or of another number of lanes.
        """
        if len(state["drawn"]) != len(self.drawn):
            raise ValueError(f"{len(self.drawn)} corpora, but the state has {len(state['drawn'])}")
        if len(state["lanes"]) != len(self.lanes):
            raise ValueError(f"{len(self.lanes)} lanes, but the state has {len(state['lanes'])}")
        lanes = [None if p is None else _Passage(*p, begins=False) for p in state["lanes"]]
        for p in filter(None, lanes):
            known = p.corpus < len(self.passages)
            if not known or p.recording > self.passages[p.corpus][-1][0]:
                raise ValueError(f"recording {p.recording} of corpus {p.corpus} is not there")
        self.drawn, self.segments = list(state["drawn"]), list(state["segments"])
        self.lanes = lanes

    def _draw(self) -> _Passage:
        turn, total = sum(self.segments) + 1, sum(self.weights)
        behind = [w / total * turn - n for w, n in zip(self.weights, self.segments, strict=True)]
        chosen = behind.index(max(behind))
        passages = self.passages[chosen]
        epoch, index = divmod(self.drawn[chosen], len(passages))
        recording, start, stop = passages[int(self._order(chosen, epoch)[index])]
        self.drawn[chosen] += 1
        self.segments[chosen] += -(-(stop - start) // self.segment_frames)
        return _Passage(chosen, recording, start, stop)

    def _make_order(self, corpus: int, epoch: int) -> np.ndarray[Any, Any]:
        count = len(self.passages[corpus])
        if not self.shuffle:
            return np.arange(count)
        return np.random.default_rng([self.seed, corpus, epoch]).permutation(count)
