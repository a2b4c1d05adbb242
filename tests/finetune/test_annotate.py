"""Transcripts: channels, files, resuming, errors; the recogniser here hears bursts of sound."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from finetune.annotate import annotate, main, parse
from finetune.check.command import check
from finetune.data.manifest import read_manifest
from finetune.data.transcript import Word, read_words
from moshi_ttt.errors import UserError
from tests.finetune.check.made import LEFT, RATE, RIGHT, dialogue, manifest, voice, write

ROOT = Path(__file__).parents[2]


def hear(pcm):
    """A word for every quarter of a second with sound in it."""
    assert pcm.dtype == np.float32
    assert pcm.ndim == 1
    size = 4_000  # at 16 kHz
    for i in range(len(pcm) // size):
        if pcm[i * size : (i + 1) * size].std() > 0.01:
            yield f" w{i}", i / 4, (i + 1) / 4


def run(path, recogniser=hear, **kwargs):
    annotate([path], lambda: recogniser, **kwargs)


def never():
    raise AssertionError("there is nothing to transcribe")


def spans(turns):
    return [(a + k / 4, a + (k + 1) / 4) for a, b in turns for k in range(round((b - a) * 4))]


def test_left_is_moshi_and_right_the_user(tmp_path):
    turns = ([(0.5, 2.0), (4.0, 5.5)], [(2.5, 3.5), (6.0, 7.5)])  # on quarters
    pcm = np.stack([voice(turns[0]), voice(turns[1], seed=1)], 1)
    path = manifest(tmp_path, write(tmp_path, "a.wav", pcm))
    run(path)
    words = read_words(tmp_path / "a.wav", 8.0)
    for speaker, said in zip(("SPEAKER_MAIN", "SPEAKER_USER"), turns, strict=True):
        assert [(w.start, w.end) for w in words if w.speaker == speaker] == spans(said)
    assert words[0] == Word("w2", 0.5, 0.75, "SPEAKER_MAIN")
    assert [w.start for w in words] == sorted(w.start for w in words)
    assert check([path])[1] == []  # the checker agrees
    assert read_manifest(path)


def test_mono_another_rate_and_several_files(tmp_path):
    write(tmp_path, "a.wav", voice(LEFT, rate=8_000), rate=8_000)
    write(tmp_path, "b.flac", voice(RIGHT, rate=48_000), rate=48_000)
    path = manifest(tmp_path, {"path": ["a.wav", "b.flac"], "duration": 16.0})
    run(path)
    for name, turns in (("a.wav", LEFT), ("b.flac", RIGHT)):
        words = read_words(tmp_path / name, 8.0)
        assert {w.speaker for w in words} == {"SPEAKER_MAIN"}
        assert words[0].start == pytest.approx(turns[0][0], abs=0.3)


def test_silence_is_a_transcript_without_words(tmp_path):
    path = manifest(tmp_path, write(tmp_path, "a.wav", np.zeros((RATE, 2))))
    run(path)
    assert read_words(tmp_path / "a.wav", 1.0) == []


def test_other_keys_are_kept(tmp_path):
    path = manifest(tmp_path, write(tmp_path, "ü.flac", dialogue()))
    beside = {"speaker": "102", "voice_activity": [[0.28, 2.23]], "title": "日本"}
    (tmp_path / "ü.json").write_text(json.dumps(beside))
    run(path)
    content = json.loads((tmp_path / "ü.json").read_text(encoding="utf-8"))
    assert content.pop("alignments")
    assert content == beside


def test_it_goes_on_where_it_was_broken_off(tmp_path, capsys):
    path = manifest(tmp_path, *(write(tmp_path, f"{i}.wav", dialogue(i)) for i in range(3)))
    heard = []

    def interrupted(pcm):
        heard.append(len(pcm))
        if len(heard) == 4:  # the second file's right side
            raise KeyboardInterrupt
        return hear(pcm)

    with pytest.raises(KeyboardInterrupt):
        run(path, interrupted)
    assert sorted(f.name for f in tmp_path.glob("*.json")) == ["0.json"]
    assert not list(tmp_path.glob(".*"))
    first = (tmp_path / "0.json").read_bytes()
    capsys.readouterr()
    run(path, lambda _: [("again", 0.0, 1.0)])
    out = capsys.readouterr().out
    assert "1 file with a transcript left as it was (--overwrite does it again)" in out
    assert "2 files to transcribe, 0.00 hours of audio" in out
    assert "hours an hour" in out
    assert (tmp_path / "0.json").read_bytes() == first
    assert read_words(tmp_path / "2.wav", 8.0)[0].text == "again"
    annotate([path], never)  # no model is loaded for nothing
    run(path, overwrite=True)
    assert read_words(tmp_path / "2.wav", 8.0)[0].text == "w2"


def test_times_are_made_to_fit(tmp_path):
    duration = 1.9995
    pcm = np.zeros(int(duration * RATE))
    path = manifest(tmp_path, write(tmp_path, "a.wav", pcm))
    odd = [
        (" late ", 1.9, 2.4),
        ("past", 7.0, 8.0),
        ("point", 0.5, 0.5),
        ("back", 0.9, 0.7),
        ("early", -0.2, 0.1),
        ("  ", 0.3, 0.4),
        ("\n", 0.3, 0.4),
        ("first", 0.01, 0.02),
    ]
    run(path, lambda _: odd)
    words = read_words(tmp_path / "a.wav", duration)
    assert {w.text: (w.start, w.end) for w in words} == {
        "late": (1.9, 1.999),
        "past": (1.979, 1.999),
        "point": (0.5, 0.52),
        "back": (0.9, 0.92),
        "early": (0.0, 0.1),
        "first": (0.01, 0.03),
    }
    assert [w.start for w in words] == sorted(w.start for w in words)


def test_a_file_of_one_sample(tmp_path):
    path = manifest(tmp_path, write(tmp_path, "a.wav", np.zeros(1)))
    run(path, lambda _: [("a", 0.0, 1.0)])
    assert read_words(tmp_path / "a.wav", 1 / RATE) == [Word("a", 0.0, 0.0, "SPEAKER_MAIN")]


def test_what_is_broken_is_named_and_the_rest_goes_on(tmp_path, capsys):
    whole = write(tmp_path, "whole.wav", dialogue())
    nan = dialogue().astype(np.float32)
    nan[9, 0] = np.nan
    lines = [
        write(tmp_path, "nan.wav", nan, subtype="FLOAT"),
        write(tmp_path, "three.wav", np.zeros((RATE, 3))),
        write(tmp_path, "none.wav", np.zeros((0, 2))),
        {"path": "gone.wav", "duration": 1},
        "{",
        {"path": "a.wav", "duration": 1, "shard": "s.safetensors"},
        write(tmp_path, "json.wav", dialogue()),
        write(tmp_path, "list.wav", dialogue()),
        {"path": ["x" * 5000, "\udcff.wav"], "duration": 1},
        whole,
    ]
    (tmp_path / "json.json").write_bytes(b"\xff{")
    (tmp_path / "list.json").write_text("[1]")
    path = manifest(tmp_path, *lines)
    with pytest.raises(UserError, match="10 recordings could not be transcribed: see above"):
        run(path)
    out = capsys.readouterr().out
    for number, said in [
        (1, "nan.wav: sample 9 of channel 0 is nan"),
        (2, "three.wav: 3 channels"),
        (3, "none.wav: the audio is empty"),
        (4, "gone.wav: no such audio file"),
        (5, "not JSON"),
        (6, "a line of codes has no audio"),
        (7, "json.json: not JSON"),
        (8, "list.json: not a JSON object"),
        (9, "File name too long"),
        (9, "\\udcff.wav: no such audio file"),
    ]:
        assert any(
            line.startswith(f"{path}:{number}: ") and said in line for line in out.splitlines()
        ), (number, said)
    assert read_words(tmp_path / "whole.wav", 8.0)
    assert (tmp_path / "list.json").read_text() == "[1]"
    assert sorted(f.name for f in tmp_path.glob("*.json")) == [
        "json.json",
        "list.json",
        "whole.json",
    ]


def test_a_recogniser_that_fails_is_named_with_the_file(tmp_path, capsys):
    path = manifest(tmp_path, *(write(tmp_path, f"{i}.wav", dialogue(i)) for i in range(2)))
    calls = []

    def fails(pcm):
        calls.append(pcm)
        if len(calls) == 1:
            raise UserError("faster-whisper failed: out of memory")
        return hear(pcm)

    with pytest.raises(UserError, match="1 recording could not"):
        run(path, fails)
    assert f"{path}:1: {tmp_path}/0.wav: faster-whisper failed" in capsys.readouterr().out
    assert (tmp_path / "1.json").exists()


def test_two_files_with_one_transcript_are_refused(tmp_path):
    lines = [write(tmp_path, name, dialogue()) for name in ("a.wav", "a.flac")]
    with pytest.raises(UserError, match=r"a\.wav and .*a\.flac would share one transcript"):
        annotate([manifest(tmp_path, *lines)], never)


def test_a_transcript_that_cannot_be_written_is_named_before_the_work(tmp_path, capsys):
    path = manifest(tmp_path, write(tmp_path, "a.wav", dialogue()))
    (tmp_path / "a.json").mkdir()
    with pytest.raises(UserError, match="1 recording could not"):
        annotate([path], never)
    assert f"{path}:1: {tmp_path}/a.json" in capsys.readouterr().out


def test_the_same_file_twice_is_transcribed_once(tmp_path):
    line = write(tmp_path, "a.wav", voice(LEFT))
    calls = []
    run(manifest(tmp_path, line, line), lambda pcm: calls.append(pcm) or [])
    assert len(calls) == 1


def test_wrong_use(tmp_path):
    (tmp_path / "garbage").write_bytes(bytes(1000))
    (tmp_path / "empty").mkdir()
    for args, message in [
        ([], "required"),
        ([str(tmp_path / "gone.jsonl")], "no such manifest"),
        ([str(tmp_path / "garbage")], "binary file"),
        ([str(tmp_path / "empty")], r"no \.jsonl"),
        (["m.jsonl", "--device", "tpu"], "invalid choice"),
        (["m.jsonl", "--modell", "x"], "unrecognized"),
    ]:
        with pytest.raises(UserError, match=message):
            main(args)


def test_an_empty_manifest_is_said(tmp_path):
    path = manifest(tmp_path, "")
    with pytest.raises(UserError, match="no recordings"):
        annotate([path], never)


def test_without_faster_whisper_the_extra_is_named(tmp_path, monkeypatch):
    path = manifest(tmp_path, write(tmp_path, "a.wav", dialogue()))
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(UserError, match=r"pip install 'moshi-ttt\[annotate\]'"):
        main([str(path)])


def test_the_command(tmp_path):
    path = manifest(tmp_path, write(tmp_path, "a.wav", np.zeros((0, 1))))
    done = subprocess.run(
        [sys.executable, "-m", "finetune.annotate", str(path)],
        cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == f"{path}:1: {tmp_path}/a.wav: the audio is empty (0 samples)\n"
    assert done.stderr == "error: 1 recording could not be transcribed: see above\n"


def test_help(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    out = capsys.readouterr().out
    assert "SPEAKER_USER" in out
    assert "--overwrite" in out
