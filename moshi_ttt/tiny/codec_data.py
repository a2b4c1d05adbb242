"""Speech to train the tiny codec on, from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from .mel import FRAME
from .text import SMALL_TALK, make_lexicon
from .voice import speak, voices


def training_speech(seed: int, minutes: float, split: str = "train") -> Tensor:
    """Phrases of many voices in a row with short silences, `[samples]` at 24 kHz."""
    rng, taken = random.Random(seed), set[str]()
    cast = voices(split, 60 if split == "heldout" else 400)
    pieces: list[npt.NDArray[np.float32]] = []
    samples = 0
    while samples < minutes * 60 * 24_000:
        voice = rng.choice(cast)
        for text in (*make_lexicon(rng, 4, taken).phrases, rng.choice(SMALL_TALK)):
            clip = speak(text, voice).pcm
            gap = np.zeros(rng.randint(2_000, 12_000), np.float32)
            pieces += [clip, gap]
            samples += len(clip) + len(gap)
    whole = torch.from_numpy(np.concatenate(pieces))
    return whole[: len(whole) // FRAME * FRAME]


def batches(
    speech: Tensor, steps: int, rows: int, frames: int, seed: int, what: str
) -> Iterator[Tensor]:
    """Yield random cuts `[rows, frames * FRAME]` at random level, some with noise."""
    rng = torch.Generator().manual_seed(seed)
    length = frames * FRAME
    for _ in tqdm(range(steps), desc=what, mininterval=5):
        starts = torch.randint(len(speech) - length, (rows,), generator=rng)
        cut = torch.stack([speech[s : s + length] for s in starts.tolist()])
        gain = 10 ** ((torch.rand(rows, 1, generator=rng) - 0.5) * 0.5)
        noisy = (torch.rand(rows, 1, generator=rng) < 0.25) * 10 ** (
            -2.0 - 2.0 * torch.rand(rows, 1, generator=rng)
        )
        yield cut * gain + noisy * torch.randn(cut.shape, generator=rng)
