"""What is read of a set, how it pairs, and what follows from the scores."""

import json
from pathlib import Path

import pytest

from eval.zerospeech.report import render, summarise, verdict
from eval.zerospeech.sets import Pair, read_pairs
from moshi_ttt.errors import UserError
from tests.eval.zerospeech.made import (
    LEXICAL,
    STORY,
    gold,
    lexical,
    stories,
    syntactic,
)


@pytest.mark.parametrize("part", ["", "lexical", "lexical/dev"])
def test_words_pair_with_the_non_word_of_their_id_and_voice(tmp_path, part):
    pairs, problems = read_pairs("swuggy", lexical(tmp_path, clips=False) / part)
    assert problems == []
    assert len(pairs) == 14
    dev = tmp_path / "lexical/dev"
    assert pairs[3] == Pair(
        "1", "B", dev / "w1B1.wav", dev / "w1B0.wav", ("in vocabulary", "frequency 1-4")
    )
    groups = {pair.item: pair.groups[-1] for pair in pairs}
    assert list(groups.values()) == [
        "out of vocabulary", "frequency 1-4", "frequency 5-19", "frequency 20-99",
        "frequency 100 or more", "frequency 1-4", "frequency 100 or more",
    ]  # fmt: skip


def test_gold_beside_the_folder_of_clips(tmp_path):
    lexical(tmp_path, items=1)
    dev = tmp_path / "lexical/dev"
    (dev / "gold.csv").rename(tmp_path / "lexical/gold.csv")
    for root in (tmp_path, tmp_path / "lexical"):
        assert read_pairs("swuggy", root)[0][0].correct == dev / "w0A1.wav"


def test_no_frequency_no_bands(tmp_path):
    rows = [{"id": 1, "filename": f"w{c}", "voice": "A", "correct": c} for c in (0, 1)]
    gold(tmp_path / "gold.csv", [c for c in LEXICAL if c != "frequency"], rows)
    assert read_pairs("swuggy", tmp_path)[0][0].groups == ()


@pytest.mark.parametrize("part", ["", "syntactic", "syntactic/dev"])
def test_sentences_pair_within_their_subtype(tmp_path, part):
    pairs, problems = read_pairs("sblimp", syntactic(tmp_path, clips=False) / part)
    assert problems == []
    assert len(pairs) == 24
    assert len({pair.item for pair in pairs}) == 12
    dev = tmp_path / "syntactic/dev"
    assert pairs[1] == Pair(
        "agreement/one/0", "B", dev / "sagreementone0B1.wav", dev / "sagreementone0B0.wav",
        ("agreement",),
    )  # fmt: skip


def test_stories_pair_by_name(tmp_path):
    root = stories(tmp_path / "tSC", items=3, clips=False)
    stories(tmp_path / "sSC", items=2, clips=False)
    for data in (root, root / "tSC"):
        pairs, problems = read_pairs("tstory", data)
        assert problems == []
        assert [pair.item for pair in pairs] == [STORY.format(i) for i in range(3)]
        assert pairs[1].correct.name == "2_a1b2-01_correct.wav"
        assert pairs[1].incorrect.name == "3_a1b2-01_incorrect.wav"
    assert len(read_pairs("sstory", root)[0]) == 2
    plain = tmp_path / "plain"
    plain.mkdir()
    for label in ("correct", "incorrect"):
        (plain / f"12_{label}.wav").touch()
    assert read_pairs("sstory", plain)[0][0].item == "12"


def test_halves_alone_and_twice_are_left_out(tmp_path):
    rows = [
        {"id": i, "filename": f"w{n}", "voice": "A", "correct": c, "frequency": 1}
        for n, (i, c) in enumerate([(1, 1), (1, 0), (2, 1), (3, 1), (3, 1), (3, 0)])
    ]
    gold(tmp_path / "gold.csv", LEXICAL, rows)
    pairs, problems = read_pairs("swuggy", tmp_path)
    assert [pair.item for pair in pairs] == ["1"]
    assert problems == [
        f"{tmp_path}/gold.csv:4: 2, voice A has 1 correct and 0 incorrect clips; it takes one of "
        "each",
        f"{tmp_path}/gold.csv:7: 3, voice A has 2 correct and 1 incorrect clips; it takes one of "
        "each",
    ]
    root = stories(tmp_path / "tSC", items=2, clips=False)
    (root / "tSC/1_a1b2-00_incorrect.wav").unlink()
    (root / "tSC/notes.wav").touch()
    pairs, problems = read_pairs("tstory", root)
    assert len(pairs) == 1
    assert "notes.wav: its name does not end in" in problems[0]
    assert "a1b2-00 has 1 correct and 0 incorrect clips" in problems[1]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("id,filename\n", "has no column 'voice': sWUGGY has id, filename, voice, word, correct"),
        ("", "has no column 'id'"),
        ("id,filename,voice,word,correct\n1,a,A,x,yes\n", "gold.csv:2: correct is 'yes', not 0"),
        ("id,filename,voice,word,correct\n1,,A,x,1\n", "gold.csv:2: filename is empty"),
        ("id,filename,voice,word,correct\n", "has no clips: sWUGGY is published at zerospeech"),
        (
            "id,filename,voice,word,correct,frequency\n1,a,A,x,1,often\n",
            "gold.csv:2: frequency is 'often', not a number",
        ),
        (b"id,filename,voice,word,correct\n\xff", "gold.csv is not a csv file"),
    ],
)
def test_a_broken_gold_file(tmp_path, content, line):
    text = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "gold.csv").write_bytes(text)
    with pytest.raises(UserError, match=line):
        read_pairs("swuggy", tmp_path)


def test_one_set_is_not_taken_for_another(tmp_path):
    lexical(tmp_path, clips=False)
    syntactic(tmp_path, clips=False)
    with pytest.raises(UserError, match="has no column 'word': sWUGGY has"):
        read_pairs("swuggy", tmp_path / "syntactic/dev")
    with pytest.raises(UserError, match="has no column 'type'"):
        read_pairs("sblimp", tmp_path / "lexical/dev")
    stories(tmp_path / "stories/tSC", clips=False)
    with pytest.raises(UserError, match="has no clips: sStoryCloze is"):
        read_pairs("sstory", tmp_path / "stories")
    with pytest.raises(UserError, match="is another set's folder: sStoryCloze is"):
        read_pairs("sstory", tmp_path / "stories/tSC")
    assert len(read_pairs("tstory", tmp_path / "stories")[0]) == 7


def hand_made():
    """Item 1: one voice right, one wrong; item 2: a tie; item 3: right; NLLs of the base."""
    p = {name: Path(name) for name in "abcdefgh"}
    pairs = [
        Pair("1", "A", p["a"], p["b"], ("in vocabulary",)),
        Pair("1", "B", p["c"], p["d"], ("in vocabulary",)),
        Pair("2", "A", p["e"], p["f"], ("out of vocabulary",)),
        Pair("3", "A", p["g"], p["h"], ("in vocabulary",)),
    ]
    base = dict(zip(p.values(), [1.0, 2.0, 3.0, 2.5, 4.0, 4.0, 0.5, 0.6], strict=True))
    return pairs, base, p


def test_voices_are_averaged_and_ties_count_half():
    pairs, base, p = hand_made()
    trained = base | {p["c"]: 2.0, p["g"]: 0.7}  # item 1 gains half a point, item 3 is lost
    results = summarise(pairs, {"base": base, "trained": trained}, {"base": "b", "trained": "t"})
    accuracy = {
        arm: {g: (found["mean"], found["n"]) for g, found in about["accuracy"].items()}
        for arm, about in results["arms"].items()
    }
    assert accuracy["base"] == {
        "all": ((0.5 + 0.5 + 1) / 3, 3),
        "in vocabulary": (0.75, 2),
        "out of vocabulary": (0.5, 1),
    }
    assert accuracy["trained"]["all"][0] == pytest.approx((1 + 0.5 + 0) / 3)
    (difference,) = results["differences"]
    assert difference["accuracy"]["all"]["mean"] == pytest.approx((0.5 + 0 - 1) / 3)
    assert difference["accuracy"]["out of vocabulary"] == {
        "mean": 0.0, "low": None, "high": None, "n": 1,
        "reason": "one item only: no interval",
    }  # fmt: skip
    assert results["pairs"][1]["nll"] == {"base": [3.0, 2.5], "trained": [2.0, 2.5]}
    assert "too few to judge by" in verdict(results)
    json.dumps(results, allow_nan=False)
    results |= {"title": "x", "scoring": "y", "left_out": [f"line {i}" for i in range(30)]}
    assert "Left out (30):\nline 0" in render(results, str)
    assert "line 19\nand 10 more" in render(results, str)


def decided(base, trained):
    """Results of as many items as there are letters; r is right, w wrong."""
    n = len(base)
    pairs = [Pair(str(i), "", Path(f"{i}c"), Path(f"{i}i")) for i in range(n)]
    nll = {
        arm: {Path(f"{i}i"): 1.0 for i in range(n)}
        | {Path(f"{i}c"): 0.0 if letter == "r" else 2.0 for i, letter in enumerate(text)}
        for arm, text in (("base", base), ("trained", trained))
    }
    labels = {"base": "stock base", "trained": "trained model"}
    return summarise(pairs, nll, labels)


@pytest.mark.parametrize(
    ("base", "trained", "said"),
    [
        ("r" * 30, "r" * 15 + "w" * 15, "The trained model COSTS accuracy: -50.0 points [-"),
        ("r" * 5 + "w" * 25, "r" * 30, "costs nothing, it gains: +83.3 points [+"),
        ("r" * 27 + "w" * 3, "r" * 27 + "w" * 3, "costs nothing: it decides all 30 items as"),
        ("r" * 28 + "w" * 2, "w" + "r" * 28 + "w", "costs nothing measurable: +0.0 points [-10.0"),
        ("rw" * 15, "wr" + "rw" * 14, "Nothing is shown: the stock base is not above chance"),
        ("rrrrr", "rrrrr", "No verdict: 5 items are too few"),
    ],
)
def test_the_verdict_follows_from_the_numbers(base, trained, said):
    assert said in verdict(decided(base, trained))
