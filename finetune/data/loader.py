"""Segments to batches, mixed by weight, in an order that can be resumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from finetune.data.codes import CodesCache
from finetune.data.corpus import Segment, make_corpora
from finetune.data.interleaver import FRAME_RATE
from finetune.data.manifest import Source

NOTHING = -1
"""The token of a frame that is not there; Moshi's `zero_token_id`: no input, no target."""


@dataclass(frozen=True)
class Batch:
    """Segments padded to one length.

    Attributes:
        codes: int64 `[B, 1 + 2K, T]`: text, K rows of Moshi, K of the user; not delayed; -1 past a
            segment's end.
        text_mask: bool `[B, T]`: where the text row is a target. In a recording without transcript
            nowhere, though it is fed padding there.
        names: audio file of each row.
        starts: first frame of each row within its recording.
        frames: frames of each row that are there.
    """

    codes: Tensor
    text_mask: Tensor
    names: tuple[str, ...]
    starts: tuple[int, ...]
    frames: tuple[int, ...]

    @classmethod
    def collate(cls, segments: Sequence[Segment], frames: int) -> Batch:
        """Pad segments to `frames` frames."""
        rows = segments[0].codes.shape[0]
        codes = torch.full((len(segments), rows, frames), NOTHING, dtype=torch.int64)
        text_mask = torch.zeros(len(segments), frames, dtype=torch.bool)
        for row, segment in enumerate(segments):
            length = segment.codes.shape[-1]
            codes[row, :, :length] = segment.codes
            text_mask[row, :length] = segment.text_known
        return cls(
            codes,
            text_mask,
            tuple(s.name for s in segments),
            tuple(s.start for s in segments),
            tuple(s.codes.shape[-1] for s in segments),
        )

    def describe(self) -> str:
        """Recordings and positions, for messages."""
        rows = zip(self.names, self.starts, strict=True)
        return ", ".join(f"{name} from {start / FRAME_RATE:.1f} s" for name, start in rows)


class Loader:
    """Batches without end. Every corpus is read in epochs of its own, each segment once in each.

    Which corpus a segment comes from is decided by the weights without chance: always the one that
    is furthest behind its share. With the seed, the numbers of segments drawn from each corpus are
    the whole state. Batches are always full: an epoch's last is filled from the next epoch.

    Args:
        sources: manifests, prepared in `cache`.
        cache: their codes.
        tokenizer: of the text row.
        seconds: length of a segment.
        batch_size: segments of a batch.
        shuffle: a new order in every epoch; otherwise the manifest's.
        seed: of the order.

    Raises:
        UserError: no sources.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        cache: CodesCache,
        tokenizer: SentencePieceProcessor,
        *,
        seconds: float,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        self.corpora = make_corpora(sources, cache, tokenizer, seconds)
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.drawn = [0] * len(self.corpora)
        self._order = lru_cache(maxsize=len(self.corpora))(self._make_order)

    def _make_order(self, corpus: int, epoch: int) -> np.ndarray[Any, Any]:
        count = len(self.corpora[corpus])
        if not self.shuffle:
            return np.arange(count)
        return np.random.default_rng([self.seed, corpus, epoch]).permutation(count)

    def _draw(self) -> Segment:
        turn = sum(self.drawn) + 1
        total = sum(c.weight for c in self.corpora)
        behind = [
            c.weight / total * turn - n for c, n in zip(self.corpora, self.drawn, strict=True)
        ]
        chosen = behind.index(max(behind))
        epoch, index = divmod(self.drawn[chosen], len(self.corpora[chosen]))
        self.drawn[chosen] += 1
        return self.corpora[chosen].segment(int(self._order(chosen, epoch)[index]))

    def __iter__(self) -> Loader:
        """The loader itself: it goes on where it is."""
        return self

    def __next__(self) -> Batch:
        """The next batch, of `batch_size` rows."""
        segments = [self._draw() for _ in range(self.batch_size)]
        return Batch.collate(segments, self.corpora[0].segment_frames)

    @property
    def epoch(self) -> float:
        """Epochs done of the corpus that is furthest."""
        return max(n / len(c) for c, n in zip(self.corpora, self.drawn, strict=True))

    def state_dict(self) -> dict[str, list[int]]:
        """Segments drawn from each corpus."""
        return {"drawn": list(self.drawn)}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: it is of another number of corpora.
        """
        if len(state["drawn"]) != len(self.corpora):
            raise ValueError(f"{len(self.corpora)} corpora, but the state has {state['drawn']}")
        self.drawn = list(state["drawn"])
