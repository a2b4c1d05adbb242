"""Synthetic recall on codes: pairs of key and value, noise, then the keys again.

What came after a key is drawn anew for every sequence, so no weights can know it: it has to be
remembered. A model that does not remember is left with chance, log(values) nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from moshi.models.lm import LMModel
from torch import Tensor

from eval.perplexity import score

KEYS, VALUES = 8, 8
"""Codes of codebook 0: the first are keys, then come values; the rest are noise."""
CHANCE = math.log(VALUES)
"""NLL in nats of a value that is not remembered."""


@dataclass(frozen=True)
class KeyValue:
    """Sequences to recall from.

    Attributes:
        codes: [N, 17, T] int64, or with as many streams as the model has; all but codebook 0 is
            the same in every frame.
        queries: [N, pairs] frames that hold a value which came with its key once before.
        delay: frames of noise between the pairs and the keys' return.
    """

    codes: Tensor
    queries: Tensor
    delay: int


@dataclass(frozen=True)
class Recalled:
    """How well values were recalled after a delay.

    Attributes:
        delay: frames of noise.
        nll: mean over the queries, nats; see `CHANCE`.
        accuracy: part of the queries whose value has more than half of the probability.
    """

    delay: int
    nll: float
    accuracy: float


def key_value(lm: LMModel, count: int, delay: int, *, pairs: int = 4, seed: int = 0) -> KeyValue:
    """Draw `count` sequences: `k v k v ...`, noise, and the same pairs in another order.

    Args:
        lm: for the shape of its codes; nothing is computed with it.
        count: sequences.
        delay: frames of noise, which holds neither keys nor values.
        pairs: keys of a sequence, all different.
        seed: of what is drawn.

    Raises:
        ValueError: more pairs than keys, or no codes left for the noise.
    """
    if not 1 <= pairs <= KEYS:
        raise ValueError(f"pairs must be 1 to {KEYS}, got {pairs}")
    if lm.card <= KEYS + VALUES:
        raise ValueError(f"a card of more than {KEYS + VALUES} is needed, got {lm.card}")
    gen = torch.Generator().manual_seed(seed)
    keys = torch.rand(count, KEYS, generator=gen).argsort(1)[:, :pairs]
    values = KEYS + torch.randint(VALUES, (count, pairs), generator=gen)
    noise = torch.randint(KEYS + VALUES, lm.card, (count, delay), generator=gen)
    order = torch.rand(count, pairs, generator=gen).argsort(1)
    first = torch.stack([keys, values], 2)
    again = first.gather(1, order[..., None].expand(-1, -1, 2))
    heard = torch.cat([first.flatten(1), noise, again.flatten(1)], 1)
    codes = torch.zeros(count, lm.num_codebooks, heard.shape[1], dtype=torch.int64)
    codes[:, 0] = lm.text_padding_token_id
    codes[:, lm.audio_offset] = heard
    queries = 2 * pairs + delay + 2 * torch.arange(pairs) + 1
    return KeyValue(codes, queries.expand(count, -1), delay)


def recalled(lm: LMModel, tasks: Sequence[KeyValue], **how: Any) -> list[Recalled]:
    """Score the queries of some tasks, one delay each.

    Args:
        lm: stock or spliced.
        tasks: of `key_value`.
        how: of `eval.perplexity.score`, e.g. `rows` and `reset_every`.
    """
    found = []
    for task in tasks:
        scores = score(lm, list(task.codes), **how)
        found.append(measure(task, torch.stack([s.values[lm.audio_offset] for s in scores])))
    return found


def measure(task: KeyValue, nll: Tensor) -> Recalled:
    """What the NLL of codebook 0, [N, T] in nats, says of the queries."""
    asked = nll.double().gather(1, task.queries)
    return Recalled(task.delay, asked.mean().item(), (asked < math.log(2)).double().mean().item())
