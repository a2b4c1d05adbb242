"""Recordings as codes and text."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

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
    """

    codes: Tensor
    text_known: bool


class Corpus:
    """The recordings of a manifest as codes and text.

    Args:
        recordings: prepared in `cache`.
        cache: their codes.
        interleaver: makes the text row.
        weight: how often segments are drawn from here, against other corpora.

    Attributes:
        lengths: frames of each recording.
        text_known: of each recording, whether its text row is a target.

    Raises:
        UserError: no recordings, or a broken transcript.
    """

    def __init__(
        self,
        recordings: Sequence[Recording],
        cache: CodesCache,
        interleaver: Interleaver,
        weight: float = 1.0,
    ) -> None:
        if not recordings:
            raise UserError("no recordings to read")
        self.recordings = list(recordings)
        self.cache = cache
        self.weight = weight
        self.lengths = [cache.frames(r) for r in recordings]
        self._text: list[Tensor] = []
        self.text_known: list[bool] = []
        for recording, frames in zip(recordings, self.lengths, strict=True):
            words = recording.words(cache.file_frames(recording))
            if recording.channels == 1 and cache.mono_side == "user":
                words = None  # what the user says is not Moshi's text
            self._text.append(interleaver.row(words, frames))
            self.text_known.append(words is not None)

    def name(self, index: int) -> str:
        """What messages call a recording."""
        return self.recordings[index].name

    @cached_property
    def digest(self) -> str:
        """SHA-1 of codes and text of all recordings in their order; files may lie elsewhere."""
        digest = hashlib.sha1(str(self.weight).encode())
        for recording, text, known in zip(
            self.recordings, self._text, self.text_known, strict=True
        ):
            digest.update(f"{self.cache.identity(recording)} {known}".encode())
            digest.update(text.numpy().tobytes())
        return digest.hexdigest()

    def read(self, index: int, start: int, stop: int) -> Segment:
        """Frames `start` to `stop` of recording `index`; fewer where the recording ends."""
        stop = min(stop, self.lengths[index])
        codes = self.cache.load(self.recordings[index], start, stop).long()
        text = self._text[index][start:stop].long()
        return Segment(torch.cat([text[None], codes]), self.text_known[index])


def segment_frames(duration_sec: float) -> int:
    """Frames of a segment of so many seconds, rounded up; at least 1."""
    return max(1, math.ceil(duration_sec * FRAME_RATE - 1e-6))


def make_corpora(
    sources: Sequence[Source], cache: CodesCache, tokenizer: SentencePieceProcessor
) -> list[Corpus]:
    """The recordings of each source, prepared in `cache`.

    Raises:
        UserError: no source at all.
    """
    if not sources:
        raise UserError("no recordings: no manifest is named")
    interleaver = Interleaver(tokenizer)
    return [Corpus(s.recordings, cache, interleaver, s.weight) for s in sources]
