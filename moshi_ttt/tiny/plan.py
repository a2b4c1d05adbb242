"""Who says what, when, in every recording of the embedded corpus: the plan, before any sound.

Each recording has a private lexicon (`text.make_lexicon`), and its phrases come back by blocks:
a block has four or five *active* phrases, spoken in random order, never one of the last two, so
a phrase returns after 5 to 15 s; the next block exchanges two of them, and those that left return
minutes later. A model whose attention ends after 4 s must remember to predict them.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict, dataclass
from itertools import islice

from .text import FIXED_WORDS, SMALL_TALK, Lexicon, make_lexicon
from .voice import Voice, voices

VERSION = 2
"""Raised when the same spec means other bytes."""


@dataclass(frozen=True)
class CorpusSpec:
    """How much of what.

    Attributes:
        hours: of training audio (a stereo hour is one hour).
        base_hours: of further audio, other voices and content, to train a base on: one that
            knew the recordings of the finetuning by heart would leave nothing to remember.
        dialogue_share: part of the training recordings that are stereo dialogues.
        train_seconds: shortest and longest training recording.
        heldout_readings: recordings in Libri-Light's layout, each a voice of its own.
        heldout_seconds: length of each of them.
        eval_readings: mono held-out recordings for evaluation during training.
        eval_dialogues: stereo ones.
        eval_seconds: length of each of these.
        seed: of everything.
    """

    hours: float = 5.0
    base_hours: float = 0.0
    dialogue_share: float = 0.25
    train_seconds: tuple[int, int] = (120, 160)
    heldout_readings: int = 24
    heldout_seconds: int = 240
    eval_readings: int = 4
    eval_dialogues: int = 4
    eval_seconds: int = 120
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in ("hours", "heldout_seconds", "eval_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        if not 0 <= self.dialogue_share <= 1:
            raise ValueError(f"dialogue_share must be in [0, 1], got {self.dialogue_share!r}")
        low, high = self.train_seconds
        if not 0 < low <= high:
            raise ValueError(f"train_seconds {self.train_seconds!r} is no range")

    def digest(self) -> str:
        """Sixteen hex digits that change whenever the corpus' bytes would."""
        values = json.dumps([VERSION, asdict(self)], sort_keys=True)
        return hashlib.sha256(values.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Recording:
    """One recording to be spoken.

    Attributes:
        split: `"train"`, `"base"`, `"eval"` or `"heldout"`.
        stem: file name without its ending, unique in the corpus.
        voices: one for a reading, two (Moshi, user) for a dialogue.
        lexicon: its private phrases.
        frames: length in frames of 80 ms.
        seed: of the order of what is said.
    """

    split: str
    stem: str
    voices: tuple[Voice, ...]
    lexicon: Lexicon
    frames: int
    seed: int


def plan_corpus(spec: CorpusSpec) -> list[Recording]:
    """All recordings of a corpus; held-out ones do not depend on `hours`."""
    rng = random.Random(spec.seed)
    taken = set(FIXED_WORDS)
    made: list[Recording] = []
    heldout = iter(
        voices("heldout", spec.heldout_readings + spec.eval_readings + 2 * spec.eval_dialogues)
    )
    train = iter(voices("train", None))

    def add(split: str, kind: str, index: int, seconds: float) -> None:
        cast = train if split in ("train", "base") else heldout
        spoken = tuple(islice(cast, 2 if kind == "dialogue" else 1))
        if not spoken or (kind == "dialogue" and len(spoken) < 2):
            raise ValueError(
                f"hours={spec.hours} + {spec.base_hours} needs more voices than there are"
            )
        lexicon = make_lexicon(rng, rng.randint(6, 12), taken)
        stem = f"{split}_{kind}_{index:04d}"
        frames = int(seconds * 12.5)
        made.append(Recording(split, stem, spoken, lexicon, frames, rng.getrandbits(32)))

    for i in range(spec.heldout_readings):
        add("heldout", "reading", i, spec.heldout_seconds)
    for i in range(spec.eval_readings):
        add("eval", "reading", i, spec.eval_seconds)
    for i in range(spec.eval_dialogues):
        add("eval", "dialogue", i, spec.eval_seconds)
    low, high = spec.train_seconds
    for split, hours in (("train", spec.hours), ("base", spec.base_hours)):
        left, index, dialogues = hours * 3600, 0, 0.0
        while left > 0:
            seconds = min(rng.uniform(low, high), max(left, low))
            dialogues += spec.dialogue_share
            kind = "dialogue" if dialogues >= 1 else "reading"
            dialogues -= kind == "dialogue"
            add(split, kind, index, seconds)
            left -= seconds
            index += 1
    return made


@dataclass(frozen=True)
class Line:
    """One utterance: which speaker (0 Moshi, 1 user) says what, after how many silent frames."""

    speaker: int
    text: str
    pause: int


def script(recording: Recording):
    """Yield the recording's lines without end, from its seed."""
    rng = random.Random(recording.seed)
    phrases = list(recording.lexicon.phrases)
    active = phrases[: rng.choice((4, 4, 5))]
    recent: list[str] = []
    speaker, turn = 0, 0
    while True:
        for _ in range(rng.randint(14, 22)):
            if turn == 0 and len(recording.voices) == 2:
                speaker, turn = 1 - speaker, rng.randint(2, 5)
            turn = max(turn - 1, 0)
            if rng.random() < 0.1:
                text = rng.choice(SMALL_TALK)
            else:
                text = rng.choice([p for p in active if p not in recent])
                recent = [*recent, text][-2:]
            yield Line(speaker, text, rng.randint(2, 4))
        away = [p for p in phrases if p not in active]
        leaving = rng.sample(active, min(2, len(away)))
        active = [p for p in active if p not in leaving] + rng.sample(away, len(leaving))
