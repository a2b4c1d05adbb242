"""Recordings as codes and text, cut into consecutive segments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from finetune.data.codes import CodesCache
from finetune.data.interleaver import FRAME_RATE, Interleaver
from finetune.data.manifest import Source
from finetune.data.recording import Recording
from moshi_ttt.errors import UserError


@dataclass(frozen=True)
class Segment:
    """Consecutive frames of a recording.

    Attributes:
        codes: int64 `[1 + 2K, frames]`: text, K rows of Moshi, K of the user; not delayed.
        text_known: whether the text row is a target; without a transcript it is only an input.
        name: of the recording.
        start: first frame within the recording.
    """

    codes: Tensor
    text_known: bool
    name: str
    start: int


class Corpus:
    """The recordings of a manifest as codes and text, cut into segments.

    Segments follow each other without gap or overlap; a recording's last one is as short as it
    comes.

    Args:
        recordings: prepared in `cache`.
        cache: their codes.
        interleaver: makes the text row.
        segment_frames: longest segment.
        weight: how often segments are drawn from here, against other corpora.

    Attributes:
        lengths: frames of each recording.
        segments: (index of recording, first frame) of each segment.

    Raises:
        UserError: no recordings, or a broken transcript.
    """

    def __init__(
        self,
        recordings: Sequence[Recording],
        cache: CodesCache,
        interleaver: Interleaver,
        segment_frames: int,
        weight: float = 1.0,
    ) -> None:
        if not recordings:
            raise UserError("no recordings to read")
        self.recordings = list(recordings)
        self.cache = cache
        self.segment_frames = segment_frames
        self.weight = weight
        self.lengths = [cache.frames(r) for r in recordings]
        self._text: list[Tensor] = []
        self._text_known: list[bool] = []
        for recording, frames in zip(recordings, self.lengths, strict=True):
            words = recording.words(cache.file_frames(recording))
            if recording.channels == 1 and cache.mono_side == "user":
                words = None  # what the user says is not Moshi's text
            self._text.append(interleaver.row(words, frames))
            self._text_known.append(words is not None)
        self.segments = [
            (index, start)
            for index, frames in enumerate(self.lengths)
            for start in range(0, frames, segment_frames)
        ]

    def __len__(self) -> int:
        """Number of segments."""
        return len(self.segments)

    def read(self, index: int, start: int, stop: int) -> Segment:
        """Frames `start` to `stop` of recording `index`; fewer where the recording ends."""
        recording, stop = self.recordings[index], min(stop, self.lengths[index])
        codes = self.cache.load(recording, start, stop).long()
        text = self._text[index][start:stop].long()
        both = torch.cat([text[None], codes])
        return Segment(both, self._text_known[index], recording.name, start)

    def segment(self, number: int) -> Segment:
        """Segment `number`, in the manifest's order."""
        index, start = self.segments[number]
        return self.read(index, start, start + self.segment_frames)


def segment_frames(duration_sec: float) -> int:
    """Frames of a segment of so many seconds, rounded up; at least 1."""
    return max(1, math.ceil(duration_sec * FRAME_RATE - 1e-6))


def make_corpora(
    sources: Sequence[Source],
    cache: CodesCache,
    tokenizer: SentencePieceProcessor,
    seconds: float,
) -> list[Corpus]:
    """Cut the recordings of each source, prepared in `cache`, into segments of so many seconds.

    Raises:
        UserError: no source at all.
    """
    if not sources:
        raise UserError("no recordings: no manifest is named")
    interleaver, frames = Interleaver(tokenizer), segment_frames(seconds)
    return [Corpus(s.recordings, cache, interleaver, frames, s.weight) for s in sources]
