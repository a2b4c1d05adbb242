"""Manifests and transcripts: what is read, and which file, line and value a mistake names."""

import json
import struct

import numpy as np
import pytest
import soundfile

from finetune.data.manifest import read_manifest, read_sources
from finetune.data.transcript import Word, read_words
from moshi_ttt.errors import UserError


def wav(path, seconds=2.0, channels=2, rate=16_000):
    rng = np.random.default_rng(0)
    soundfile.write(path, 0.1 * rng.standard_normal((int(seconds * rate), channels)), rate)
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sound").mkdir()
    wav(tmp_path / "sound/a.wav")
    wav(tmp_path / "sound/b.wav", 1.0, channels=1)
    return tmp_path


def manifest(folder, *lines):
    path = folder / "m.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


A = {"path": "sound/a.wav", "duration": 2.0}
B = {"path": "sound/b.wav", "duration": 1.04}


def test_paths_are_relative_to_the_manifest(folder):
    a, b = read_manifest(manifest(folder, A, "", B))
    assert (a.files[0].path, a.duration, a.channels) == (folder / "sound/a.wav", 2.0, 2)
    assert (b.files[0].path, b.duration, b.channels) == (folder / "sound/b.wav", 1.0, 1)
    assert b.where == f"{folder / 'm.jsonl'}:3"
    absolute = {"path": str(folder / "sound/a.wav"), "duration": 2}
    assert read_manifest(manifest(folder, absolute))[0].files == a.files


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nonsense", "m.jsonl:2: not JSON"),
        ("[1, 2]", "m.jsonl:2: no path in '[1, 2]'"),
        ({"duration": 2.0}, "m.jsonl:2: no path in"),
        ({"path": 3, "duration": 2.0}, "m.jsonl:2: no path in"),
        ({"path": "sound/c.wav", "duration": 2.0}, "sound/c.wav: no such audio file"),
        ({"path": "sound/a.wav"}, "m.jsonl:2: duration of 'sound/a.wav' must be a positive number"),
        ({"path": "sound/a.wav", "duration": -2.0}, "must be a positive number of seconds, got -2"),
        ({"path": "sound/a.wav", "duration": "2"}, "must be a positive number of seconds, got '2'"),
        ({"path": "sound/a.wav", "duration": float("nan")}, "number of seconds, got nan"),
        ({"path": "sound/a.wav", "duration": 2.2}, "is 2.2, but the audio has 2.000 s"),
    ],
)
def test_a_bad_line_is_named(folder, line, message):
    with pytest.raises(UserError) as error:
        read_manifest(manifest(folder, A, line))
    assert message in str(error.value)
    assert str(error.value).startswith(f"{folder / 'm.jsonl'}:2: ")


def test_broken_audio_is_named_with_the_line(folder):
    path = folder / "sound/b.wav"
    whole = path.read_bytes()
    for data, message in [
        (b"", "is empty"),
        (whole[:20_000], "truncated"),
        (whole[:24] + struct.pack("<I", 0) + whole[28:], "0 Hz"),
        (wav(folder / "three.wav", 1.0, 3).read_bytes(), "3 channels"),
    ]:
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"m\.jsonl:2: .*b\.wav.*{message}"):
            read_manifest(manifest(folder, A, B))


def test_no_recordings_and_no_manifest(folder):
    with pytest.raises(UserError, match=r"m\.jsonl: no recordings"):
        read_manifest(manifest(folder, "", ""))
    with pytest.raises(UserError, match=r"x\.jsonl: no such manifest"):
        read_manifest(folder / "x.jsonl")
    (folder / "m.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"m\.jsonl:1: not text in UTF-8"):
        read_manifest(folder / "m.jsonl")


def test_sources(folder):
    m = manifest(folder, A)
    other = folder / "n.jsonl"
    other.write_text(m.read_text())

    def weights(text):
        return [(s.path, s.weight, len(s.recordings)) for s in read_sources(text)]

    assert weights(f"{m}:0.25, {other} ,") == [(m, 0.25, 1), (other, 1.0, 1)]
    assert weights(f"{folder}:3") == [(m, 3.0, 1), (other, 3.0, 1)]
    odd = folder / "12:30.jsonl"
    odd.write_text(m.read_text())
    assert weights(str(odd)) == [(odd, 1.0, 1)]
    for text, message in [
        ("", "no data source"),
        (f"{m}:0", "the weight must be positive, got 0"),
        (f"{m}:-1", "the weight must be positive, got -1"),
        (f"{m}:nan", "the weight must be positive, got nan"),
        (f"{m},{m}:2", "is named twice"),
        (f"{folder}/x.jsonl:2", "no such manifest"),
        (f"{folder}/sound", r"has no \.jsonl file"),
    ]:
        with pytest.raises(UserError, match=message):
            read_sources(text)


def transcript(folder, content):
    path = folder / "sound/a.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_words(folder):
    audio = folder / "sound/a.wav"
    assert read_words(audio, 2.0) is None
    transcript(folder, {"speaker": "102", "voice_activity": [[0.2, 2.2]]})  # Libri-Light's
    assert read_words(audio, 2.0) is None
    transcript(folder, {"alignments": []})
    assert read_words(audio, 2.0) == []
    entries = [
        ["a", [0, 0.5], "SPEAKER_MAIN"],
        ["b", [0.4, 0.9], "SPEAKER_MAIN"],  # words of an aligner overlap a little
        ["c", [0.1, 0.3], "SPEAKER_1"],
        ["d", [1.9, 2.3], "SPEAKER_MAIN"],
    ]
    transcript(folder, {"alignments": entries})
    assert read_words(audio, 2.0) == [Word(w, s, e, p) for w, (s, e), p in entries]


M = "SPEAKER_MAIN"


@pytest.mark.parametrize(
    ("alignments", "message"),
    [
        ([["a", [0.5, 0.6], M], ["b", [0.4, 0.6], M]], "alignment 1 .* is out of order"),
        ([["a", [-0.1, 0.6], M]], "alignment 0 .* is out of order: it starts before 0"),
        ([["a", [0.5, 0.4], M]], "alignment 0 .* ends before it starts"),
        ([["a", [0.1, 2.6], M]], r"alignment 0 .* past the end of the recording, 2\.00 s"),
        ([["a", [0.1, 0.2]]], "alignment 0 .* is not"),
        ([["a", 0.1, M]], "alignment 0 .* is not"),
        ([["a", ["0", "1"], M]], "alignment 0 .* is not"),
        ([["a", [0.1, float("nan")], M]], "alignment 0 .* no number"),
        ({"a": 1}, "'alignments' is not a list"),
    ],
)
def test_a_bad_alignment_is_named(folder, alignments, message):
    transcript(folder, {"alignments": alignments})
    with pytest.raises(UserError, match=rf"m\.jsonl:1: .*a\.json: .*{message}"):
        read_manifest(manifest(folder, A))


def test_a_transcript_that_is_not_json(folder):
    transcript(folder, '{"alignments":\n [,]}')
    with pytest.raises(UserError, match=r"m\.jsonl:1: .*a\.json:2: not JSON"):
        read_manifest(manifest(folder, A))
    (folder / "sound/a.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"a\.json: not text in UTF-8"):
        read_manifest(manifest(folder, A))


def several(folder, **words):
    """A recording of the mono files b, c and d, of 1 s each, with words where given."""
    for name in "cd":
        wav(folder / f"sound/{name}.wav", 1.0, channels=1)
    for name, entries in words.items():
        (folder / f"sound/{name}.json").write_text(json.dumps({"alignments": entries}))
    return {"path": [f"sound/{name}.wav" for name in "bcd"], "duration": 3.02}


def test_several_files_are_one_recording(folder):
    hey = [["hey", [0.5, 0.9], M]]
    line = several(folder, b=[["late", [1.2, 1.4], M]], c=hey, d=hey) | {"speaker": "7"}
    (found,) = read_manifest(manifest(folder, line))
    assert [f.path for f in found.files] == [folder / f"sound/{name}.wav" for name in "bcd"]
    assert (found.duration, found.channels, found.speaker) == (3.0, 1, "7")
    assert found.name == f"{folder / 'sound/b.wav'} and 2 more"
    words = found.words((13, 13, 13))
    assert [(w.text, round(w.start, 6), round(w.end, 6)) for w in words] == [
        ("late", 1.2, 1.4),  # after its file's end, as aligners do
        ("hey", 1.54, 1.94),  # 13 frames of 80 ms later
        ("hey", 2.58, 2.98),
    ]
    assert read_manifest(manifest(folder, several(folder)))[0].speaker is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": []}, "no path"),
        ({"path": ["sound/b.wav", 3]}, "no path"),
        ({"path": ["sound/b.wav", "sound/x.wav"]}, "x.wav: no such audio file"),
        ({"path": ["sound/b.wav", "sound/a.wav"]}, "a.wav has 2 channels and "),
        ({"duration": 2.5}, "duration of 'sound/b.wav + sound/c.wav + sound/d.wav' is 2.5, but"),
        ({"speaker": 7}, "speaker must be text, got 7"),
    ],
)
def test_a_bad_line_of_several_files(folder, change, message):
    with pytest.raises(UserError) as error:
        read_manifest(manifest(folder, A, several(folder) | change))
    assert str(error.value).startswith(f"{folder / 'm.jsonl'}:2: ")
    assert message in str(error.value)


def test_all_files_have_a_transcript_or_none(folder):
    line = several(folder, b=[], d=[])
    with pytest.raises(UserError, match=r"m\.jsonl:1: .*c\.wav has no transcript, but other files"):
        read_manifest(manifest(folder, line))
