"""The corpus: alignments, privacy of the splits, determinism, re-use."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from moshi_ttt.tiny.plan import CorpusSpec, plan_corpus, script
from moshi_ttt.tiny.speech import make_corpus, render, utterances
from moshi_ttt.tiny.text import SMALL_TALK
from moshi_ttt.tiny.voice import Voice, speak, voices

SMALL = CorpusSpec(
    hours=0.01,
    dialogue_share=0.5,
    train_seconds=(18, 18),
    heldout_readings=1,
    heldout_seconds=20,
    eval_readings=0,
    eval_dialogues=1,
    eval_seconds=20,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("speech")
    return root, make_corpus(root, SMALL, workers=1)


def _recordings(manifest: Path):
    for line in manifest.read_text().splitlines():
        entry = json.loads(line)
        path = manifest.parent / entry["path"]
        yield path, entry["duration"], json.loads(path.with_suffix(".json").read_text())


def test_speaking_is_a_pure_function():
    voice = Voice("en-us", "f2", 55, 175)
    once = speak("call bolavi 42", voice)
    speak("something else", Voice("it", "m3", 30, 190))
    again = speak("call bolavi 42", voice)
    assert np.array_equal(once.pcm, again.pcm)
    assert once.words == again.words


def test_an_unknown_voice_is_named():
    with pytest.raises(ValueError, match="xx-none"):
        speak("hello", Voice("xx-none", "m1", 50, 170))


def test_alignments_lie_in_order_inside_the_audio(corpus):
    _, found = corpus
    seen = 0
    for split in ("train", "eval", "heldout"):
        for path, duration, meta in _recordings(found[split]):
            info = soundfile.info(path)
            assert info.frames / info.samplerate == pytest.approx(duration, abs=1e-6)
            last = 0.0
            for word, (start, end), speaker in meta["alignments"]:
                assert word
                assert " " not in word
                assert last <= start <= end <= duration
                assert speaker in ("SPEAKER_MAIN", "SPEAKER_OTHER")
                last = start
                seen += 1
    assert seen > 50


def test_words_are_where_the_sound_is(corpus):
    _, found = corpus
    for path, _, meta in _recordings(found["train"]):
        pcm, rate = soundfile.read(path, always_2d=True)
        channels = {"SPEAKER_MAIN": 0, "SPEAKER_OTHER": pcm.shape[1] - 1}
        for _, (start, end), speaker in meta["alignments"]:
            word = pcm[int(start * rate) : int(end * rate) + 1, channels[speaker]]
            assert word.std() > 0.005


def test_dialogue_speakers_alternate_and_never_overlap(corpus):
    _, found = corpus
    stereo = [p for p, _, _ in _recordings(found["train"]) if soundfile.info(p).channels == 2]
    assert stereo
    pcm, _ = soundfile.read(stereo[0])
    assert (np.abs(pcm).max(0) > 0.1).all()
    assert not np.any((pcm[:, 0] != 0) & (pcm[:, 1] != 0))


def test_libri_lights_layout(corpus):
    root, found = corpus
    (flac,) = found["librilight"].glob("small/*/*/*.flac")
    meta = json.loads(flac.with_suffix(".json").read_text())
    assert meta["speaker"] == flac.parent.parent.name
    assert {"book_meta", "snr", "voice_activity"} <= set(meta)
    assert soundfile.info(flac).samplerate == 16_000
    assert root / json.loads(found["heldout"].read_text())["path"] == flac


def test_splits_share_no_voice_and_no_private_word():
    plan = plan_corpus(CorpusSpec())
    cast: dict[str, set] = {}
    for recording in plan:
        cast.setdefault(recording.split, set()).update(
            (voice.language, voice.variant) for voice in recording.voices
        )
    assert not cast["train"] & (cast["heldout"] | cast["eval"])
    assert not cast["eval"] & cast["heldout"]
    words = [word for recording in plan for word in recording.lexicon.words]
    assert len(words) == len(set(words))
    for recording in plan:
        assert all(
            recording.lexicon.words & set(phrase.split()) for phrase in recording.lexicon.phrases
        )
    assert sum(recording.split == "heldout" for recording in plan) >= 24
    assert all(120 <= recording.frames / 12.5 <= 360 for recording in plan)


def test_voices_of_a_larger_corpus_leave_the_held_out_ones_alone():
    few, many = plan_corpus(CorpusSpec(hours=1)), plan_corpus(CorpusSpec(hours=2))
    assert [r for r in few if r.split != "train"] == [r for r in many if r.split != "train"]
    with pytest.raises(ValueError, match="more voices"):
        plan_corpus(CorpusSpec(hours=500))
    with pytest.raises(ValueError, match="voices in heldout"):
        voices("heldout", 1000)


def test_phrases_return_beyond_a_window_of_four_seconds():
    recording = next(r for r in plan_corpus(CorpusSpec()) if r.split == "heldout")
    last: dict[str, int] = {}
    lags = []
    for line, _, first, _ in utterances(recording):
        if line.text not in SMALL_TALK:
            if line.text in last:
                lags.append(first - last[line.text])
            last[line.text] = first
    lags = np.array(lags)
    assert np.mean(lags > 50) > 0.95
    assert np.median(lags) < 200
    assert lags.max() > 750
    early = [line.text for line, _, first, _ in utterances(recording) if first < 200]
    assert len(set(early)) < len(early)


def test_the_same_seed_gives_the_same_bytes(corpus, tmp_path):
    root, found = corpus
    again = make_corpus(tmp_path, SMALL, workers=1)
    files = sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert all((root / p).read_bytes() == (tmp_path / p).read_bytes() for p in files)
    assert found.keys() == again.keys()


def test_a_corpus_is_reused_resumed_and_never_mixed(corpus, tmp_path):
    shutil.copytree(corpus[0], tmp_path, dirs_exist_ok=True)
    found = make_corpus(tmp_path, SMALL, workers=1)
    wavs = sorted((tmp_path / "train").glob("*.wav"))
    before = [p.stat().st_mtime_ns for p in wavs]
    assert make_corpus(tmp_path, SMALL, workers=1) == found
    marker = tmp_path / "corpus.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"complete": False}))
    whole = wavs[0].read_bytes()
    wavs[0].with_suffix(".json").unlink()
    wavs[0].write_bytes(b"half")
    make_corpus(tmp_path, SMALL, workers=2)
    assert wavs[0].read_bytes() == whole
    assert [p.stat().st_mtime_ns for p in wavs[1:]] == before[1:]
    with pytest.raises(ValueError, match="another corpus"):
        make_corpus(tmp_path, CorpusSpec(hours=0.02), workers=1)


def test_a_script_follows_its_seed():
    a, b = plan_corpus(SMALL)[:2]
    lines = [line for line, _ in zip(script(a), range(50), strict=False)]
    assert lines == [line for line, _ in zip(script(a), range(50), strict=False)]
    assert lines != [line for line, _ in zip(script(b), range(50), strict=False)]
    pcm, aligned = render(a)
    assert pcm.shape == (1, a.frames * 1920)
    assert aligned


@pytest.mark.parametrize(
    "bad", [{"hours": 0}, {"dialogue_share": 2}, {"train_seconds": (9, 3)}, {"eval_seconds": -1}]
)
def test_bad_specs_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        CorpusSpec(**bad)
