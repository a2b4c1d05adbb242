"""Transcripts: every broken alignment is counted, and training's reader agrees on which are."""

import json

import pytest

from finetune.check.findings import ERROR, KINDS
from finetune.check.words import read_transcript, unknown_words
from finetune.data.transcript import Word, read_words
from moshi_ttt.errors import UserError

M = "SPEAKER_MAIN"
GOOD = ["a", [0.1, 0.2], M]


def transcript(folder, content):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / "a.json").write_bytes(text)
    return read_transcript(folder / "a.wav", 2.0)


@pytest.mark.parametrize(
    ("alignments", "found"),
    [
        ([GOOD], {}),
        ([GOOD, ["b", [1.9, 2.4], M]], {}),  # aligners end late
        ([["b", [0.5, 0.6], "SPEAKER_USER"], GOOD], {}),  # order is by speaker
        ([GOOD, ["b", [0.3, 0.3], M]], {"words without duration": "alignment 1"}),
        ([GOOD, [" ", [0.3, 0.4], M]], {"words without duration": "alignment 1"}),
        ([GOOD, ["b", [0.05, 0.3], M]], {"words out of order": "alignment 1"}),
        ([GOOD, ["b", [-0.1, 0.3], M]], {"word times": "alignment 1"}),
        ([GOOD, ["b", [0.5, 0.4], M]], {"word times": "alignment 1"}),
        ([GOOD, ["b", [0.5, float("inf")], M]], {"word times": "alignment 1"}),
        ([GOOD, ["b", [float("nan"), 0.6], M]], {"word times": "alignment 1"}),
        ([GOOD, ["b", [0.5, 2.6], M]], {"words past the end": "the audio has 2.00 s"}),
        ([GOOD, ["b", 0.5, M], ["c", [1, 2]], 7, None], {"transcript broken": "and 3 more"}),
        ([GOOD, ["b", ["0", "1"], M]], {"transcript broken": "alignment 1"}),
        ([], {"transcript empty": "a.json has no words"}),
        ([["b", [0.5, 0.6], "SPEAKER_0"]], {"no SPEAKER_MAIN": "the 1 words are of 'SPEAKER_0'"}),
        ({"a": 1}, {"transcript broken": "no list"}),
        (None, {"transcript broken": "no list"}),
    ],
)
def test_findings(tmp_path, alignments, found):
    got = dict(transcript(tmp_path, {"alignments": alignments}).findings)
    assert list(got) == list(found)
    assert all(part in got[kind] for kind, part in found.items())
    stops = {"transcript broken", "word times", "words past the end", "words out of order"}
    if stops & set(found):
        with pytest.raises(UserError):
            read_words(tmp_path / "a.wav", 2.0)
    else:
        assert read_words(tmp_path / "a.wav", 2.0) is not None
    assert all(KINDS[kind].severity == ERROR for kind in stops & set(found))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\0", b"[" * 100_000, b"9" * 5_000])
def test_what_is_no_json(tmp_path, content):
    found = transcript(tmp_path, content)
    assert found.there or content.isdigit()
    assert [kind for kind, _ in found.findings] == ["transcript broken"]


def test_a_number_that_is_too_large_for_a_time(tmp_path):
    found = transcript(tmp_path, b'{"alignments": [["a", [0, 1' + b"0" * 400 + b'], "x"]]}')
    assert [kind for kind, _ in found.findings] == ["word times"]


def test_no_transcript(tmp_path):
    assert not read_transcript(tmp_path / "a.wav", 2.0).there
    for other in ({"speaker": "7"}, [1, 2]):  # Libri-Light's, or anybody's
        assert not transcript(tmp_path, other).there
    (tmp_path / "a.json").unlink()
    (tmp_path / "a.json").mkdir()
    assert not read_transcript(tmp_path / "a.wav", 2.0).there


def test_seconds(tmp_path):
    found = transcript(tmp_path, {"alignments": [GOOD, ["b", [0.5, 0.8], "SPEAKER_USER"]]})
    assert found.seconds() == pytest.approx(0.4)
    assert found.seconds(main_only=True) == pytest.approx(0.1)


def test_words_the_tokenizer_does_not_know(tokenizer):
    said = [Word(w, 0.0, 1.0, M) for w in ("one", "日本", "日本", "good")]
    other = Word("русский", 0.0, 1.0, "SPEAKER_USER")
    assert list(unknown_words([*said, other], tokenizer)) == ["日本"]
