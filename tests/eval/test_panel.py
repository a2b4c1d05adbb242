import json
import os
import re

import numpy as np
import pytest
import soundfile
import torch

from eval.panel import choose, make_items, read_panel, shorten, speaker_of
from finetune.corpora.listing import natural
from finetune.data.codes import CodesCache
from moshi_ttt.audio import read_audio
from moshi_ttt.codec import encode_recording
from moshi_ttt.errors import UserError
from tests.small import small_mimi


def speak(path, seconds=1.0, rate=16000, channels=1, seed=0, **beside):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).normal(0, 0.1, (int(seconds * rate), channels))
    soundfile.write(path, noise, rate)
    if beside:
        path.with_suffix(".json").write_text(json.dumps(beside))
    return path


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "librilight"
    for chapter, seed in (("part_10", 3), ("part_2", 2), ("part_1", 1)):
        speak(root / f"small/11/emma/{chapter}.flac", 0.4, seed=seed, speaker="11")
    speak(root / "small/11/persuasion/p_1.flac", 0.5, seed=4, speaker="11")
    speak(root / "medium/12/emma/part_1.flac", 0.5, seed=5, snr=3.0)
    speak(root / "medium/13/short/part_1.flac", 0.2, seed=6)
    return root


def test_chapters_in_natural_order_are_one_recording(tree):
    books = {b.name: b for b in read_panel(tree)}
    assert set(books) == {"11/emma", "11/persuasion", "12/emma", "13/short"}
    assert [f.path.stem for f in books["11/emma"].files] == ["part_1", "part_2", "part_10"]
    assert books["11/emma"].duration == pytest.approx(1.2)
    assert books["12/emma"].speaker == "12"
    assert sorted(["b2", "b10", "b1", "a"], key=natural) == ["a", "b1", "b2", "b10"]
    assert sorted(["2", "10x", "x"], key=natural) == ["x", "2", "10x"]


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("small", {"11/emma", "11/persuasion"}),
        ("small/11", {"11/emma", "11/persuasion"}),
        ("small/11/emma", {"11/emma"}),
    ],
)
def test_any_part_of_the_layout(tree, part, names, monkeypatch):
    assert {b.name for b in read_panel(tree / part)} == names
    monkeypatch.chdir(tree / part)
    assert {b.name for b in read_panel(".")} == names


def test_one_recording_a_speaker_fixed_by_hash(tree):
    books = read_panel(tree)
    chosen, left_out = choose(books, 0.3)
    assert sorted(b.speaker for b in chosen) == ["11", "12"]
    assert left_out == [
        "1 of 4 recordings are shorter than 0.3 s and left out",
        "1 more recordings of the same speakers left out",
    ]
    assert choose(books[::-1], 0.3)[0] == chosen
    one, left_out = choose(books, 0.3, max_items=1)
    assert one == chosen[:1]
    assert "1 of 2 speakers taken (--max-items)" in left_out
    with pytest.raises(UserError, match=r"as long as 9 s; the longest of 4 is 11/emma with 1\.2 s"):
        choose(books, 9)


def test_shorten_keeps_what_it_takes(tree):
    book = next(b for b in read_panel(tree) if b.name == "11/emma")
    assert len(shorten(book, 0.5).files) == 2
    assert len(shorten(book, 0.4).files) == 1
    assert shorten(book, 99) == book


def test_a_manifest_is_read_line_by_line(tmp_path):
    speak(tmp_path / "a.wav", 0.5, speaker=7)
    speak(tmp_path / "b.wav", 0.5)
    manifest = tmp_path / "m.jsonl"
    lines = [json.dumps({"path": name, "duration": 0.5}) for name in ("a.wav", "b.wav")]
    manifest.write_text("\n".join(lines))
    a, b = read_panel(manifest)
    assert (speaker_of(a), speaker_of(b)) == ("7", str(tmp_path / "b.wav"))
    manifest.write_text("\n".join([lines[0], lines[0]]))
    with pytest.raises(UserError, match=r"m\.jsonl:1: .*a\.wav is there twice"):
        read_panel(manifest)


def test_one_unreadable_file_in_a_thousand(tmp_path):
    speak(tmp_path / "a.wav", 0.5)
    lines = []
    for i in range(1000):
        name = "gone.wav" if i == 500 else f"{i}.wav"
        if i != 500:
            os.link(tmp_path / "a.wav", tmp_path / name)
        lines.append(json.dumps({"path": name, "duration": 0.5}))
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    failed = []
    assert len(read_panel(tmp_path / "m.jsonl", failed)) == 999
    assert [f.name for f in failed] == ["gone.wav"]
    assert re.match(r".*m\.jsonl:501: .*gone\.wav", failed[0].reason)
    with pytest.raises(UserError, match=r"m\.jsonl:501"):
        read_panel(tmp_path / "m.jsonl")


def test_a_panel_with_nothing_in_it(tmp_path):
    (tmp_path / "m.jsonl").write_text("")
    with pytest.raises(UserError, match=r"m\.jsonl: no recording that can be read"):
        read_panel(tmp_path / "m.jsonl", [])


def test_bad_input(tmp_path, tree):
    with pytest.raises(UserError, match="nowhere: no such folder or manifest"):
        read_panel(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no \.flac file under it"):
        read_panel(tmp_path / "empty")
    (tree / "small/11/emma/part_2.json").write_text("{")
    with pytest.raises(UserError, match=r"part_2\.json:1: not JSON"):
        read_panel(tree)
    (tree / "small/11/emma/part_2.json").unlink()
    (tree / "small/11/emma/part_2.flac").write_bytes(b"not audio")
    with pytest.raises(UserError, match=r"part_2\.flac: not readable as audio"):
        read_panel(tree)


class Letters:
    """A tokenizer of one token a letter."""

    def encode(self, text):
        return [10 + ord(c) % 26 for c in text]


def test_items_are_codes_beside_silence(tree, tmp_path):
    mimi = small_mimi()
    book = next(b for b in read_panel(tree) if b.name == "11/emma")
    cache = CodesCache(tmp_path / "codes", mimi)
    (item,) = make_items([book], cache, Letters())
    frames = item.codes.shape[-1]
    assert item.codes.shape == (17, 3 * 5)
    assert not item.text_known
    assert (item.codes[0] == 3).all()
    silence = encode_recording(mimi, torch.zeros(1, 5 * 1920))[0]
    assert torch.equal(item.codes[9:, :5], silence)
    assert torch.equal(item.codes[9:, 5:10], silence)
    parts = [encode_recording(mimi, read_audio(f.path))[0] for f in book.files]
    assert torch.equal(item.codes[1:9], torch.cat(parts, -1))

    other = CodesCache(tmp_path / "codes", mimi, mono_side="user")
    (swapped,) = make_items([book], other, Letters(), side="user")
    assert torch.equal(swapped.codes[9:], item.codes[1:9])
    assert torch.equal(swapped.codes[1:9], item.codes[9:])
    with pytest.raises(ValueError, match="side 'user' is not"):
        make_items([book], cache, Letters(), side="user")
    assert frames == 15


def test_a_transcript_of_moshis_side_is_text(tmp_path):
    words = [["hey", [0.1, 0.4], "SPEAKER_MAIN"]]
    speak(tmp_path / "d.wav", 0.8, channels=2, alignments=words)
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(json.dumps({"path": "d.wav", "duration": 0.8}))
    books = read_panel(manifest)
    mimi = small_mimi()
    (item,) = make_items(books, CodesCache(tmp_path / "codes", mimi), Letters())
    assert item.text_known
    assert item.codes[0, 1:4].tolist() == Letters().encode("hey")
    user = CodesCache(tmp_path / "codes", mimi, mono_side="user")
    (swapped,) = make_items(books, user, Letters(), side="user")
    assert not swapped.text_known
    assert (swapped.codes[0] == 3).all()
    assert torch.equal(swapped.codes[1:9], item.codes[9:])
