"""The published spoken-language sets, as pairs of clips of which a model should like the first.

sWUGGY and sBLIMP are the lexical and syntactic parts of the ZeroSpeech 2021 data
(arXiv:2011.11588): wav files beside a gold.csv with a line per file. Columns, pairing and bands
are those of the published evaluation (github.com/zerospeech/zerospeech2021, `lexical.py` and
`syntactic.py`; github.com/zerospeech/benchmarks, `zerospeech/tasks/lm/`): a word is paired with
the non-word of its `id` and `voice`, a sentence with the one of its `type`, `subtype`, `id` and
`voice`; bands of `frequency`, the word's count in LibriSpeech, begin at 1, 5, 20 and 100.

tStoryCloze and sStoryCloze are Hassid et al.'s (arXiv:2305.13009,
github.com/slp-rl/SpokenStoryCloze), wav files named `<number>_<story>_correct.wav` and
`<number>_<story>_incorrect.wav`, the second with the next number. The repository does not say so:
the names are what public evaluations read (github.com/AlufRon/claude-web, `paper_metrics.py`;
github.com/slp-rl/slamkit, `metric/modelling_metric.py` takes neighbours by number).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moshi_ttt.errors import UserError

GOLD = "gold.csv"
BANDS = {0: "out of vocabulary", 1: "1-4", 5: "5-19", 20: "20-99", 100: "100 or more"}
"""Least frequency -> name of the band."""
IN_VOCABULARY = "in vocabulary"


@dataclass(frozen=True)
class Task:
    """A published set.

    Attributes:
        title: its name.
        folders: where it may be under the folder that is given, besides that folder itself.
        columns: that its gold.csv must have; none if the names of the files say it all.
        published: where to get it.
        layout: what it looks like.
    """

    title: str
    folders: tuple[str, ...]
    columns: tuple[str, ...]
    published: str
    layout: str


ZEROSPEECH = "zerospeech.com (2021, sLM21-dataset)"
STORIES = "github.com/slp-rl/SpokenStoryCloze"
TASKS = {
    "swuggy": Task(
        "sWUGGY", ("lexical/dev", "dev", "lexical"), ("id", "filename", "voice", "word", "correct"),
        ZEROSPEECH, "lexical/dev/gold.csv and lexical/dev/*.wav",
    ),
    "sblimp": Task(
        "sBLIMP", ("syntactic/dev", "dev", "syntactic"),
        ("id", "filename", "voice", "type", "subtype", "correct"),
        ZEROSPEECH, "syntactic/dev/gold.csv and syntactic/dev/*.wav",
    ),
    "tstory": Task(
        "tStoryCloze", ("tSC",), (), STORIES,
        "tSC/<number>_<story>_correct.wav and tSC/<number>_<story>_incorrect.wav",
    ),
    "sstory": Task(
        "sStoryCloze", ("sSC",), (), STORIES,
        "sSC/<number>_<story>_correct.wav and sSC/<number>_<story>_incorrect.wav",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """Two clips by one voice.

    Attributes:
        item: the word, sentence or story; its voices are averaged, and intervals drawn over items.
        voice: who speaks; empty where there is one only.
        correct: the clip that should be likelier.
        incorrect: the other one.
        groups: what the item counts under, besides all.
    """

    item: str
    voice: str
    correct: Path
    incorrect: Path
    groups: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.item}, voice {self.voice}" if self.voice else self.item


@dataclass(frozen=True)
class _Half:
    item: str
    voice: str
    correct: bool
    path: Path
    where: str
    groups: tuple[str, ...] = ()


def read_pairs(name: str, data: str | Path | None) -> tuple[list[Pair], list[str]]:
    """The pairs of a set, in the order of its files; no audio is looked at.

    Args:
        name: a key of `TASKS`.
        data: the set's root, the task's folder or the one that holds the clips.

    Returns:
        The pairs, and a line for each that lacks a half or has one twice.

    Raises:
        UserError: no such folder, nothing of the set in it, or a gold.csv that is broken.
    """
    task = TASKS[name]
    expected = f"{task.title} is published at {task.published}; expected is {task.layout}"
    if data is None:
        raise UserError(f"--data is missing: {expected}")
    root = Path(data).expanduser()
    if not root.is_dir():
        raise UserError(f"--data {data} is no folder: {expected}")
    folders = [root / part for part in (*task.folders, ".") if (root / part).is_dir()]
    if not task.columns:
        others = {f for t in TASKS.values() if not t.columns for f in t.folders} - {*task.folders}
        if folders[0].resolve().name in others:
            raise UserError(f"--data {data} is another set's folder: {expected}")
        halves, strange = _story_halves(folders[0])
    else:
        gold = next((folder / GOLD for folder in folders if (folder / GOLD).is_file()), None)
        if gold is None:
            raise UserError(f"--data {data} has no {GOLD}: {expected}")
        halves, strange = list(_gold_halves(gold, task)), []
    if not halves:
        raise UserError(f"--data {data} has no clips: {expected}")
    pairs, alone = _join(halves)
    return pairs, strange + alone


def _gold_halves(gold: Path, task: Task) -> Iterator[_Half]:
    # gold.csv stands beside the clips, or beside the folder dev that holds them
    flat = (gold.parent / "dev").is_dir() and not any(gold.parent.glob("*.wav"))
    clips = gold.parent / "dev" if flat else gold.parent
    try:
        with gold.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            found = reader.fieldnames or ()
            if missing := [column for column in task.columns if column not in found]:
                raise UserError(
                    f"{gold} has no column {missing[0]!r}: {task.title} has "
                    f"{', '.join(task.columns)}; this file has {', '.join(found) or 'none'}"
                )
            for row in reader:
                yield _half(
                    {k: v or "" for k, v in row.items()}, clips, f"{gold}:{reader.line_num}"
                )
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{gold} is not a csv file: {error}") from error


def _half(row: dict[str, str], clips: Path, where: str) -> _Half:
    if row["correct"] not in ("0", "1"):
        raise UserError(f"{where}: correct is {row['correct']!r}, not 0 or 1")
    if not row["filename"]:
        raise UserError(f"{where}: filename is empty")
    path = clips / f"{row['filename'].removesuffix('.wav')}.wav"
    if "subtype" in row:  # the ids of sentences start anew with each subtype
        item, groups = f"{row['type']}/{row['subtype']}/{row['id']}", (row["type"],)
    else:
        item, groups = row["id"], ()
        if row["correct"] == "1":
            groups = _frequency_groups(row.get("frequency", ""), where)
    return _Half(item, row["voice"], row["correct"] == "1", path, where, groups)


def _frequency_groups(text: str, where: str) -> tuple[str, ...]:
    if text in ("", "<NA>", "nan"):  # as pandas writes it
        return ()
    try:
        frequency = float(text)
    except ValueError:
        raise UserError(f"{where}: frequency is {text!r}, not a number") from None
    band = BANDS[max((least for least in BANDS if least <= frequency), default=0)]
    return (band,) if band == BANDS[0] else (IN_VOCABULARY, f"frequency {band}")


def _story_halves(folder: Path) -> tuple[list[_Half], list[str]]:
    halves, strange = [], []
    for path in sorted(folder.glob("*.wav")):  # not below it: that may be the other set
        found = re.fullmatch(r"(?:\d+_)?(.+)_(correct|incorrect)", path.stem)
        if found is None:
            strange.append(f"{path}: its name does not end in _correct.wav or _incorrect.wav")
        else:
            halves.append(_Half(found[1], "", found[2] == "correct", path, str(path)))
    return halves, strange


def _join(halves: Iterable[_Half]) -> tuple[list[Pair], list[str]]:
    sides: dict[tuple[str, str], tuple[list[_Half], list[_Half]]] = {}
    for half in halves:
        sides.setdefault((half.item, half.voice), ([], []))[0 if half.correct else 1].append(half)
    pairs, problems = [], []
    for (item, voice), (good, bad) in sides.items():
        if len(good) == len(bad) == 1:
            pairs.append(Pair(item, voice, good[0].path, bad[0].path, good[0].groups))
        else:
            problems.append(
                f"{(good + bad)[-1].where}: {item}{', voice ' + voice if voice else ''} has "
                f"{len(good)} correct and {len(bad)} incorrect clips; it takes one of each"
            )
    return pairs, problems
