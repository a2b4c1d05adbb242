"""What is wrong with a transcript: every alignment is looked at, unlike in training's reader."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor

from finetune.check.samples import FRAME_SECONDS, Sound
from finetune.check.sound import SILENT_DBFS, is_silent, speech_power
from finetune.data.transcript import MAIN_SPEAKER, PAST_END, Word, transcript_path

FEWEST_WORDS = 5
"""With fewer, whether they are on the wrong side is chance: a "yes" under the other's voice."""
SIDE_DB = 6.0
"""A word is on the side that is louder by this, each side against its own speech: crosstalk is
weaker by more, and two people talking at once count for neither."""
HEARD_DB = 20.0
"""A word so far below its channel's speech is not heard there; soft ones are 15 below."""
SWAPPED_SHARE = 0.6
"""Of the words' time on the other side. Between two who take turns, a transcript of another
conversation reaches about 0.4."""
UNFIT_SHARE = 0.5
"""Of the words' time not on their own side."""


@dataclass
class Transcript:
    """What stands beside an audio file.

    Attributes:
        words: those that can be read; None where there is no transcript.
        findings: kind and detail of each.
    """

    words: list[Word] | None = None
    findings: list[tuple[str, str]] = field(default_factory=list)

    @property
    def there(self) -> bool:
        """Whether there is one, broken or not."""
        return self.words is not None or bool(self.findings)

    def seconds(self, main_only: bool = False) -> float:
        """Length of its words together."""
        words = self.words or ()
        return sum(w.end - w.start for w in words if not main_only or w.speaker == MAIN_SPEAKER)


def read_transcript(audio: Path, duration: float) -> Transcript:
    """Read the alignments beside an audio file of so many seconds."""
    path = transcript_path(audio)
    try:
        if not path.is_file():
            return Transcript()
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        return Transcript(findings=[("transcript broken", f"{path.name}: {error}")])
    if not isinstance(content, dict) or "alignments" not in content:
        return Transcript()
    return judge(content["alignments"], duration, path.name)


def judge(alignments: Any, duration: float, name: str) -> Transcript:
    """Look at alignments as they stand in JSON; `name` says where that was."""
    if not isinstance(alignments, list):
        return Transcript(findings=[("transcript broken", f"{name}: no list of alignments")])
    words: list[Word] = []
    findings: list[tuple[str, str]] = []
    details: dict[str, list[str]] = defaultdict(list)
    for kind, detail, word in _look(alignments, duration):
        if word is not None:
            words.append(word)
        if kind is not None:
            details[kind].append(detail)
    for kind, several in details.items():
        more = f" and {len(several) - 1} more" if len(several) > 1 else ""
        findings.append((kind, several[0] + more))
    if not alignments:
        findings.append(("transcript empty", f"{name} has no words"))
    elif words and not any(w.speaker == MAIN_SPEAKER for w in words):
        labels = ", ".join(sorted({repr(w.speaker)[:30] for w in words})[:5])
        findings.append(("no SPEAKER_MAIN", f"the {len(words)} words are of {labels}"))
    return Transcript(words, findings)


def _look(entries: list[Any], duration: float) -> Iterator[tuple[str | None, str, Word | None]]:
    """Kind and detail (None if all is well) and the word (None if it is of no use)."""
    last: dict[str, float] = {}
    for index, entry in enumerate(entries):
        shown = json.dumps(entry, ensure_ascii=False)
        where = f"alignment {index} {shown if len(shown) <= 60 else shown[:57] + '...'}"
        word = _word(entry)
        if word is None:
            yield "transcript broken", f"{where} is not [word, [start, end], speaker]", None
        elif not 0 <= word.start <= word.end < math.inf:
            yield "word times", where, None
        elif word.end > duration + PAST_END:
            yield "words past the end", f"{where}; the audio has {duration:.2f} s", None
        elif word.start < last.get(word.speaker, 0.0):
            yield "words out of order", f"{where} starts before the one above it", word
        else:
            last[word.speaker] = word.start
            empty = word.start == word.end or not word.text.strip()
            main = word.speaker == MAIN_SPEAKER
            yield ("words without duration" if empty and main else None), where, word


def _word(entry: Any) -> Word | None:
    match entry:
        case [str(text), [int() | float() as start, int() | float() as end], str(speaker)]:
            try:
                return Word(text, float(start), float(end), speaker)
            except OverflowError:  # an integer of hundreds of digits
                return Word(text, math.inf, math.inf, speaker)
    return None


def compare(sound: Sound, words: list[Word]) -> Iterator[tuple[str, str]]:
    """Kind and detail of what is wrong with a transcript when its audio is heard."""
    main = [w for w in words if w.speaker == MAIN_SPEAKER and w.end > w.start]
    if len(main) < FEWEST_WORDS or is_silent(sound.power.max(1)):
        return
    total = sum(w.end - w.start for w in main)
    here, there = (seconds / total for seconds in _sides(sound, main))
    if there >= SWAPPED_SHARE:
        yield (
            "swapped channels",
            f"in {there:.0%} of {len(main)} words of {MAIN_SPEAKER} it is the right that speaks",
        )
    elif 1 - here > UNFIT_SHARE and not is_silent(sound.power[:, 0]):  # which is named already
        yield (
            "words do not fit",
            f"in {1 - here:.0%} of {len(main)} words of {MAIN_SPEAKER} the "
            f"{'left' if sound.channels == 2 else 'channel'} does not speak",
        )


def _sides(sound: Sound, words: list[Word]) -> tuple[float, float]:
    """Seconds of the words heard on their own side, and of those heard on the other."""
    frames, channels = sound.power.shape
    reference = np.full(channels, np.inf)  # a channel without speech: nothing is heard there
    for channel in range(channels):
        if not is_silent(sound.power[:, channel]):
            reference[channel] = max(
                speech_power(sound.power[:, channel]), 10 ** (SILENT_DBFS / 10)
            )
    here = there = 0.0
    for word in words:
        first = min(int(word.start / FRAME_SECONDS), frames - 1)
        last = max(first + 1, round(word.end / FRAME_SECONDS))
        level = sound.power[first:last].mean(0) / reference
        heard = level > 10 ** (-HEARD_DB / 10)
        ahead = 10 * np.log10((level[0] + 1e-12) / (level[-1] + 1e-12)) if channels == 2 else 0.0
        if channels == 2 and heard[1] and ahead < -SIDE_DB:
            there += word.end - word.start
        elif heard[0]:
            here += word.end - word.start
    return here, there


def unknown_words(words: list[Word], tokenizer: SentencePieceProcessor) -> Iterator[str]:
    """Words of Moshi's that hold a piece the tokenizer does not have, each once."""
    for text in dict.fromkeys(w.text.strip() for w in words if w.speaker == MAIN_SPEAKER):
        if tokenizer.unk_id() in tokenizer.encode(text):
            yield text
