"""Detectors on made signals: each finds what it is for, and leaves good recordings alone."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from finetune.check import samples
from finetune.check.samples import read_sound
from finetune.check.sound import listen, same_share
from finetune.check.words import compare
from finetune.data.transcript import Word
from moshi_ttt.errors import UserError
from tests.finetune.check.made import LEFT, RATE, RIGHT, dialogue, voice, words, write

SPEECH = Path(__file__).parents[4] / "shared/speech/dialogue/auto_repairs_40.flac"
real_speech = pytest.mark.skipif(not SPEECH.is_file(), reason="no recordings beside the repository")


def sound_of(folder, pcm, rate=RATE, **kwargs):
    write(folder, "a.wav", pcm, rate=rate, **kwargs)
    return read_sound(folder / "a.wav", lambda _: None)


def kinds(folder, pcm, rate=RATE, **kwargs):
    return {kind for kind, _ in listen(sound_of(folder, pcm, rate, **kwargs))}


def compared(folder, pcm, alignments, rate=RATE):
    sound = sound_of(folder, pcm, rate)
    return {kind for kind, _ in compare(sound, [Word(w, *t, s) for w, t, s in alignments])}


def long(seconds=64.0):
    return np.tile(dialogue(), (int(seconds / 8), 1))


def noise(like, level):
    return level * np.random.default_rng(7).standard_normal(len(like))


def test_a_good_dialogue_has_no_finding(tmp_path):
    assert kinds(tmp_path, dialogue()) == set()
    assert kinds(tmp_path, voice(LEFT)) == set()
    assert compared(tmp_path, dialogue(), words() + words(RIGHT, "SPEAKER_USER")) == set()


@pytest.mark.parametrize("gain", [0.0316, 0.1, 0.3, 0.45])
def test_crosstalk_is_neither_identical_nor_swapped(tmp_path, gain):
    leaking = dialogue() + gain * dialogue()[:, ::-1]
    assert kinds(tmp_path, leaking) == set()
    assert compared(tmp_path, leaking, words()) == set()
    assert compared(tmp_path, leaking[:, ::-1], words()) == {"swapped channels"}


def test_channels(tmp_path):
    left, right = dialogue().T
    both = left + right
    for other in (both, -both, 0.6 * both, both + noise(both, 1e-4)):
        assert kinds(tmp_path, np.stack([both, other], 1)) == {"identical channels"}
    music = dialogue()
    music[: RATE // 2] += noise(music[: RATE // 2], 0.1)[:, None]  # on both sides, as on hold
    assert kinds(tmp_path, music) == set()
    assert same_share(sound_of(tmp_path, both)) == 0.0


def test_silent_channels(tmp_path):
    left, right = long().T
    nothing = 0 * left
    click = nothing.copy()
    click[1000] = 1.0
    hum = 0.05 * np.sin(2 * np.pi * 50 * np.arange(len(left)) / RATE)
    for quiet in (nothing, click, hum, noise(left, 0.02), noise(left, 1e-4)):
        assert kinds(tmp_path, np.stack([quiet, right], 1)) == {"silent"}
        assert kinds(tmp_path, np.stack([left, quiet], 1)) == {"user silent"}
        assert kinds(tmp_path, quiet) == {"silent"}
        assert kinds(tmp_path, np.stack([quiet, right], 1)[: 8 * RATE]) == {"only listens"}
    yes = voice([(30.0, 30.5)], 64.0)  # a word in a minute is no silence
    assert kinds(tmp_path, np.stack([left, yes], 1)) == set()


def test_levels(tmp_path):
    good = dialogue()
    assert kinds(tmp_path, good / np.abs(good).max()) == set()  # normalised to its peak
    assert kinds(tmp_path, np.clip(3 * good, -1, 1)) == {"clipped"}
    assert kinds(tmp_path, np.clip(30 * good, -1, 1)) == {"badly clipped"}
    assert kinds(tmp_path, 0.02 * good, subtype="FLOAT") == {"quiet"}
    assert kinds(tmp_path, good + 0.05) == {"DC offset"}
    assert kinds(tmp_path, 1.5 * good / np.abs(good).max(), subtype="FLOAT") == set()
    assert kinds(tmp_path, 32767 * good, subtype="FLOAT") == {"scale"}
    assert kinds(tmp_path, dialogue(rate=8_000), rate=8_000) == {"low sample rate"}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_no_number(tmp_path, value):
    pcm = long().astype(np.float32)
    pcm[21 * RATE, 1] = pcm[22 * RATE, 0] = value  # in the second block
    details = dict(listen(sound_of(tmp_path, pcm, subtype="FLOAT")))
    assert details == {"not finite": f"2 of its samples; the first is {21 * RATE} of right (user)"}


def test_swapped_and_foreign_transcripts(tmp_path):
    good, main = dialogue(), words()
    assert compared(tmp_path, good[:, ::-1], main) == {"swapped channels"}
    assert compared(tmp_path, np.stack([0 * good[:, 0], good[:, 0]], 1), main) == {
        "swapped channels"
    }
    assert compared(tmp_path, good, words(RIGHT)) == {"swapped channels"}
    assert compared(tmp_path, good[:, 0], words(RIGHT)) == {"words do not fit"}
    late = [[w, [a + 1.0, b + 1.0], s] for w, (a, b), s in main]
    assert compared(tmp_path, good, late) == {"words do not fit"}
    assert compared(tmp_path, good[:, ::-1], main[:4]) == set()  # too few to tell
    assert compared(tmp_path, good[:, ::-1] * [1, 0.05], main) == {"swapped channels"}  # any gain
    past = [["x", [20.0 + i, 20.5 + i], "SPEAKER_MAIN"] for i in range(6)]
    assert compared(tmp_path, good, past) == {"words do not fit"}


def test_the_block_size_changes_nothing(tmp_path, monkeypatch):
    pcm = dialogue()[:-123]
    one = sound_of(tmp_path, pcm)
    monkeypatch.setattr(samples, "_FRAMES_A_BLOCK", 3)
    other = sound_of(tmp_path, pcm)
    assert one.digest == other.digest
    np.testing.assert_allclose(one.power, other.power, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(one.full_scale, other.full_scale)
    assert one.power.shape == (160, 2)  # the last is short


def test_the_digest_is_that_of_the_sound(tmp_path):
    pcm = (32767 * dialogue()).astype(np.int16)
    write(tmp_path, "a.flac", pcm)
    one = sound_of(tmp_path, pcm)
    assert one.digest == read_sound(tmp_path / "a.flac", lambda _: None).digest
    assert one.digest != sound_of(tmp_path, pcm, rate=8_000).digest
    pcm[5, 0] += 1
    assert one.digest != sound_of(tmp_path, pcm).digest


def test_progress_is_told_in_seconds(tmp_path):
    write(tmp_path, "a.wav", long())
    told = []
    read_sound(tmp_path / "a.wav", told.append)
    assert len(told) == 4
    assert sum(told) == pytest.approx(64.0)


def test_a_cut_flac_is_named(tmp_path):
    write(tmp_path, "a.flac", dialogue())
    data = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="truncated"):
        read_sound(tmp_path / "a.flac", lambda _: None)


@real_speech
def test_no_false_alarm_on_a_telephone_call(tmp_path):
    pcm, rate = soundfile.read(SPEECH)
    assert kinds(tmp_path, pcm, rate) == {"low sample rate"}
    for start in range(0, 240, 60):
        piece = pcm[start * rate : (start + 60) * rate]
        assert kinds(tmp_path, piece, rate) == {"low sample rate"}
    leaking = 0.6 * (pcm + 0.4 * pcm[:, ::-1])
    assert kinds(tmp_path, leaking, rate) == {"low sample rate"}
    mixed = pcm.mean(1)
    assert "identical channels" in kinds(tmp_path, np.stack([mixed, 0.7 * mixed], 1), rate)


@real_speech
def test_swapped_channels_of_a_telephone_call(tmp_path):
    pcm, rate = soundfile.read(SPEECH)
    # where the left speaks, from its own samples in windows of 0.25 s, an eighth of a second off
    size = rate // 4
    loud = pcm[: len(pcm) // size * size, 0].reshape(-1, size).std(1) > 0.02
    main = [
        ["x", [i / 4 + 0.125, i / 4 + 0.375], "SPEAKER_MAIN"] for i in np.flatnonzero(loud)[:-1]
    ]
    for leak in (0.0, 0.3):
        both = 0.6 * (pcm + leak * pcm[:, ::-1])
        assert compared(tmp_path, both, main, rate) == set()
        assert compared(tmp_path, both[:, ::-1], main, rate) == {"swapped channels"}
