"""What the embedded corpus says: invented words, private phrases and shared small talk.

Everything is a function of a `random.Random`; nothing here depends on time or platform.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

_ONSETS = "b d f g h j k l m n p r s t v z bl br dr fl gr kr pl pr sh sk st tr".split()
_VOWELS = "a e i o u ai au ei oa".split()
_CODAS = ["", "", "", "l", "m", "n", "r", "s", "t", "k", "sh"]

_FRAMES = (
    "{a} and {b}",
    "the {a} of {b}",
    "{a} met {b}",
    "number {n} {a}",
    "{a} at {n}",
    "{a} has {m} {b}",
    "call {a} {n}",
    "old {a} {b}",
)
"""Frames of a private phrase; `a`, `b` invented words, `n`, `m` numbers."""

SMALL_TALK = (
    "yes I know",
    "well you see",
    "that is so",
    "and then again",
    "let me think",
    "as I said",
    "so they say",
    "I am not sure",
    "it was like this",
    "once more now",
    "and after that",
    "who would have thought",
    "I see what you mean",
    "go on please",
    "now and then",
    "by the way",
)
"""Phrases every recording may use: what a model without memory can learn."""

FIXED_WORDS = frozenset(
    word for text in (*_FRAMES, *SMALL_TALK) for word in text.split() if "{" not in word
)
"""Words that any recording may use."""


@dataclass(frozen=True)
class Lexicon:
    """One recording's private content.

    Attributes:
        phrases: what comes back, in the order of its first use.
        words: the invented words in them; each phrase has one, and no other recording has it.
    """

    phrases: tuple[str, ...]
    words: frozenset[str]


def invent_word(rng: random.Random) -> str:
    """Two or three syllables that are no word of any language on purpose."""
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
        for _ in range(rng.choice((2, 2, 3)))
    )


def make_lexicon(rng: random.Random, phrases: int, taken: set[str]) -> Lexicon:
    """Invent a recording's phrases.

    Args:
        rng: the source of every choice.
        phrases: how many.
        taken: words of other recordings; the new ones are added to it.
    """

    def fresh_word() -> str:
        while True:
            word = invent_word(rng)
            if word not in taken:
                taken.add(word)
                return word

    def fresh_number() -> str:
        # Two spoken digits: short enough for a phrase, and unlike "17" read alike in all accents.
        return f"{rng.randint(2, 9)}{rng.randint(1, 9)}"

    made: list[str] = []
    words: set[str] = set()
    for frame in rng.sample(_FRAMES * -(-phrases // len(_FRAMES)), phrases):
        a, b = fresh_word(), fresh_word()
        words |= {a, b} if "{b}" in frame else {a}
        made.append(frame.format(a=a, b=b, n=fresh_number(), m=rng.randint(2, 12)))
    return Lexicon(tuple(made), frozenset(words))
