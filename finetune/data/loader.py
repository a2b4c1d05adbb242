"""Segments to micro-batches of delayed codes, for the lanes of one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from moshi.models.lm import LMModel
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from finetune.data.codes import CodesCache
from finetune.data.corpus import Corpus, make_corpora, segment_frames
from finetune.data.interleaver import FRAME_RATE
from finetune.data.manifest import Source
from finetune.data.reading import Piece, Reading

NOTHING = -1
"""The token of a frame that is not there; Moshi's `zero_token_id`: no input, no target."""


@dataclass(frozen=True)
class Layout:
    """How a model lays codes out in time.

    Attributes:
        delays: steps by which each row is late.
        initial: int64 `[K]`, the token of each row before its first code.
    """

    delays: tuple[int, ...]
    initial: Tensor

    @classmethod
    def of(cls, lm: LMModel) -> Layout:
        """The layout of a model."""
        return cls(tuple(lm.delays), lm._get_initial_token()[0, :, 0].cpu())


@dataclass(frozen=True)
class Batch:
    """Consecutive segments of some lanes, padded to one length.

    Attributes:
        sequence: int64 `[B, K, T + 1]`, delayed once per recording, as `LMModel.forward` does it:
            step s is fed to predict step s + 1, the first step of a recording is the initial token.
            -1 past a segment's end.
        text_mask: bool `[B, T]`: where the text predicted is a target. In a recording without
            transcript nowhere, though it is fed padding there.
        begins: bool `[B]`: rows whose lane starts anew.
        names: audio file of each row.
        starts: first frame of each row within its recording.
        frames: frames of each row that are there.
    """

    sequence: Tensor
    text_mask: Tensor
    begins: Tensor
    names: tuple[str, ...]
    starts: tuple[int, ...]
    frames: tuple[int, ...]

    def describe(self) -> str:
        """Recordings and positions, for messages."""
        rows = zip(self.names, self.starts, strict=True)
        return ", ".join(f"{name} from {start / FRAME_RATE:.1f} s" for name, start in rows)


def delayed(corpus: Corpus, index: int, start: int, stop: int, layout: Layout) -> Tensor:
    """Steps `start` to `stop` of a recording's delayed sequence, `[K, stop - start + 1]`.

    Row k shows at step s the code of frame `s - 1 - delay_k`, before the first the initial token:
    what `LMModel.forward` makes of the whole recording, cut out without making it.
    """
    first = max(0, start - 1 - max(layout.delays))
    codes = corpus.read(index, first, stop).codes
    steps = torch.arange(start - 1, stop)
    source = steps - torch.tensor(layout.delays).unsqueeze(1)
    shown = codes.gather(1, (source - first).clamp(min=0))
    return torch.where(source >= 0, shown, layout.initial.unsqueeze(1))


class Loader:
    """Micro-batches without end, of the lanes of one rank.

    Lane `(rank * slots + slot) * batch_size + row` of all is row `row` of micro-batch `slot`: how
    lanes are spread over ranks and slots changes none of them. See `Reading` for their order.

    Args:
        sources: manifests with their weights.
        cache: codes of their recordings, prepared.
        tokenizer: of the text row.
        layout: of the model.
        seconds: length of a segment.
        batch_size: rows of a micro-batch.
        slots: micro-batches of a step.
        whole: lanes read whole recordings; otherwise each segment stands alone.
        shuffle: a new order in every epoch; otherwise the manifest's.
        seed: of the order.
        rank: whose lanes these are.
        world: ranks in all.

    Raises:
        UserError: no sources.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        cache: CodesCache,
        tokenizer: SentencePieceProcessor,
        layout: Layout,
        *,
        seconds: float,
        batch_size: int,
        slots: int = 1,
        whole: bool = True,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.corpora = make_corpora(sources, cache, tokenizer)
        self.layout, self.frames = layout, segment_frames(seconds)
        self.batch_size, self.slots, self.rank = batch_size, slots, rank
        self.reading = Reading(
            [c.lengths for c in self.corpora],
            [c.weight for c in self.corpora],
            lanes=world * slots * batch_size,
            segment_frames=self.frames,
            whole=whole,
            shuffle=shuffle,
            seed=seed,
        )

    def __iter__(self) -> Loader:
        """The loader itself: it goes on where it is."""
        return self

    def __next__(self) -> list[Batch]:
        """The next segment of every lane of this rank, a batch for each slot."""
        mine = self.slots * self.batch_size
        pieces = self.reading.advance()[self.rank * mine : (self.rank + 1) * mine]
        return [
            self._batch(pieces[i : i + self.batch_size]) for i in range(0, mine, self.batch_size)
        ]

    def _batch(self, pieces: Sequence[Piece]) -> Batch:
        rows = len(self.layout.delays)
        sequence = torch.full((len(pieces), rows, self.frames + 1), NOTHING, dtype=torch.int64)
        text_mask = torch.zeros(len(pieces), self.frames, dtype=torch.bool)
        for row, piece in enumerate(pieces):
            corpus, length = self.corpora[piece.corpus], piece.stop - piece.start
            sequence[row, :, : length + 1] = delayed(
                corpus, piece.recording, piece.start, piece.stop, self.layout
            )
            text_mask[row, :length] = corpus.text_known[piece.recording]
        return Batch(
            sequence,
            text_mask,
            torch.tensor([p.begins for p in pieces]),
            tuple(self.corpora[p.corpus].name(p.recording) for p in pieces),
            tuple(p.start for p in pieces),
            tuple(p.stop - p.start for p in pieces),
        )

    def state_dict(self) -> dict[str, Any]:
        """Where every lane of every rank is, and in what data, as plain JSON values."""
        return self.reading.state_dict() | {"data": [corpus.digest for corpus in self.corpora]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, on as many lanes over any number of ranks and slots.

        Raises:
            ValueError: it is of other data or of another number of lanes.
        """
        if state["data"] != [corpus.digest for corpus in self.corpora]:
            raise ValueError(
                "the training data are not the same: recordings, their order, transcripts or "
                "weights have changed, so lanes would go on in another recording"
            )
        self.reading.load_state_dict(state)
