"""Words to the text row: one token for every frame, as moshi-finetune lays them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from finetune.data.transcript import MAIN_SPEAKER, Word

FRAME_RATE = 12.5
"""Frames a second."""


class Interleaver:
    """Lays the main speaker's words on frames.

    A word's first token stands on the frame in which the word starts, its others on the frames
    after it. Where the next word starts earlier than that, the tokens left over are dropped: the
    text never falls behind the audio. All other frames hold padding, and the last frame of padding
    before a word holds the end-of-padding token. Words without duration are left out. These are
    moshi-finetune's rules; but here a whole recording is laid at once, so a segment that begins
    within a word goes on with its tokens.

    Args:
        tokenizer: sentencepiece model of the text.
        text_padding: token of a frame without text.
        end_of_text_padding: token of the frame before a word.
    """

    def __init__(
        self,
        tokenizer: SentencePieceProcessor,
        text_padding: int = 3,
        end_of_text_padding: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.text_padding = text_padding
        self.end_of_text_padding = end_of_text_padding

    def row(self, words: Iterable[Word] | None, frames: int) -> Tensor:
        """The text row of a recording.

        Args:
            words: with their times in seconds; None if there is no transcript. The row is then all
                padding: what the model is fed, and no target.
            frames: length of the recording.

        Returns:
            int32 `[frames]`.
        """
        row = [self.text_padding] * frames
        main = [w for w in words or () if w.speaker == MAIN_SPEAKER and w.end > w.start]
        main.sort(key=lambda w: w.start)
        starts = [*(int(w.start * FRAME_RATE) for w in main), frames]
        for word, (start, following) in zip(main, pairwise(starts), strict=True):
            tokens = self.tokenizer.encode(word.text.strip())
            end = min(start + len(tokens), following, frames)
            row[start:end] = tokens[: max(0, end - start)]
            if 0 < start < end and row[start - 1] == self.text_padding:
                row[start - 1] = self.end_of_text_padding
        return torch.tensor(row, dtype=torch.int32)
