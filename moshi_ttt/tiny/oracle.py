"""What remembering is worth on this corpus, without a neural network.

`python -m moshi_ttt.tiny.oracle` scores codebook 0 of the held-out readings with a bigram model of
the training readings, mixed with counts of what followed the same last 1, 2 and 3 codes *earlier
in this recording*. Counts that are kept against counts that are thrown away every window: the
difference is there to be earned by a memory, before any is trained.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter, defaultdict

import numpy as np
import numpy.typing as npt
import torch

from moshi_ttt.codec import encode_recording

from .measure import entropy
from .model import load_codec
from .plan import CorpusSpec, plan_corpus
from .speech import render

_ORDERS = (1, 2, 3)
_TRUST = (0.5, 0.6, 0.6)


def bigrams(sequences: list[list[int]], bins: int) -> npt.NDArray[np.float64]:
    """Witten-Bell smoothed P(next | last) of many recordings, `[bins, bins]`."""
    counts = np.zeros((bins, bins))
    for codes in sequences:
        np.add.at(counts, (codes[:-1], codes[1:]), 1)
    unigram = (counts.sum(0) + 1) / (counts.sum() + bins)
    kinds = (counts > 0).sum(1, keepdims=True) + 1e-9
    return (counts + kinds * unigram) / (counts.sum(1, keepdims=True) + kinds)


def cache_nll(
    codes: list[int], background: npt.NDArray[np.float64], reset_every: int | None
) -> npt.NDArray[np.float64]:
    """NLL in nats of every code but the first, `[T - 1]`.

    Args:
        codes: of one recording.
        background: from `bigrams`.
        reset_every: frames after which what this recording said is forgotten; None: never.
    """
    seen: list[defaultdict[tuple[int, ...], Counter[int]]] = []
    nll: list[float] = []
    for t in range(1, len(codes)):
        if not seen or (reset_every and t % reset_every == 0):
            seen = [defaultdict(Counter) for _ in _ORDERS]
        share = background[codes[t - 1], codes[t]]
        for order, trust, table in zip(_ORDERS, _TRUST, seen, strict=True):
            if t >= order:
                followed = table[tuple(codes[t - order : t])]
                total = sum(followed.values())
                if total:
                    weight = trust * total / (total + 0.5)
                    share = (1 - weight) * share + weight * followed[codes[t]] / total
                followed[codes[t]] += 1
        nll.append(-float(np.log(share)))
    return np.array(nll)


def report(train: int = 20, heldout: int = 10, window: int = 50) -> dict[str, object]:
    """Score `heldout` held-out readings with the bigrams of `train` training readings.

    Returns:
        unigram entropy of the held-out codes, NLL of the bigrams alone, and, for stretches of
        frames in windows, mean NLL [kept, reset] in nats.
    """
    torch.set_num_threads(1)
    mimi = load_codec()
    plan = [r for r in plan_corpus(CorpusSpec()) if len(r.voices) == 1]

    def codes(split: str, count: int) -> list[list[int]]:
        chosen = [r for r in plan if r.split == split][:count]
        return [
            encode_recording(mimi, torch.from_numpy(render(r)[0]))[0, 0].tolist() for r in chosen
        ]

    background = bigrams(codes("train", train), mimi.cardinality)
    scored = codes("heldout", heldout)
    kept = np.array([cache_nll(s, background, None) for s in scored])
    reset = np.array([cache_nll(s, background, window) for s in scored])
    edges = (0, 1, 4, 10, 20, kept.shape[1] // window)
    plain = -np.log([background[a, b] for s in scored for a, b in itertools.pairwise(s)])
    return {
        "unigram_entropy": round(entropy(torch.tensor(scored), mimi.cardinality), 3),
        "bigram_nll": round(float(plain.mean()), 3),
        "windows": {
            f"{a} to {b}": [
                round(float(x[:, a * window : b * window].mean()), 3) for x in (kept, reset)
            ]
            for a, b in itertools.pairwise(edges)
        },
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(report(), indent=1) + "\n")
