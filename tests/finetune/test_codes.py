"""Codes of whole recordings: what is kept, what is made again, and by how many processes."""

import errno
import logging
import math
import os
from functools import partial

import numpy as np
import pytest
import soundfile
import torch

from finetune.data import encoding
from finetune.data.codes import CodesCache
from finetune.data.encoding import mimi_fingerprint
from finetune.data.recording import AudioFile, Recording
from moshi_ttt.audio import read_audio
from moshi_ttt.codec import encode_recording
from moshi_ttt.errors import UserError
from tests.small import small_mimi


@pytest.fixture(scope="module")
def mimi():
    return small_mimi()


def described(path, seconds, channels, where):
    return Recording(str(path), seconds, channels, where, (AudioFile(path, seconds),))


def recording(path, seconds, channels=2, rate=24_000, seed=0):
    rng = np.random.default_rng(seed)
    soundfile.write(path, 0.1 * rng.standard_normal((int(seconds * rate), channels)), rate)
    return described(path, seconds, channels, f"m.jsonl:{seed + 1}")


@pytest.fixture
def two(tmp_path):
    return [
        recording(tmp_path / "a.wav", 1.5, rate=16_000),
        recording(tmp_path / "b.wav", 0.7, channels=1, seed=1),
    ]


def kept(folder):
    return sorted(p.name for p in folder.iterdir())


def test_stereo_is_the_codec_of_each_channel(tmp_path, mimi, two):
    cache = CodesCache(tmp_path / "c", mimi)
    assert cache.prepare(two) == 2
    stereo = two[0]
    wanted = encode_recording(mimi, read_audio(stereo.files[0].path))  # [2, 8, T]
    got = cache.load(stereo)
    assert cache.frames(stereo) == math.ceil(1.5 * 12.5)  # the last frame is filled
    assert got.dtype == torch.int16
    assert torch.equal(got.long(), wanted.reshape(16, -1))
    assert len(got.unique()) > 10
    assert torch.equal(cache.load(stereo, 3, 7), got[:, 3:7])


@pytest.mark.parametrize("side", ["moshi", "user"])
def test_mono_is_one_side_and_silence_the_other(tmp_path, mimi, two, side):
    cache = CodesCache(tmp_path / "c", mimi, mono_side=side)
    cache.prepare(two)
    mono = two[1]
    pcm = read_audio(mono.files[0].path)
    wanted = encode_recording(mimi, torch.cat([pcm, torch.zeros_like(pcm)]))
    wanted = wanted.reshape(2, 8, -1)
    got = cache.load(mono).long().reshape(2, 8, -1)
    assert torch.equal(got, wanted if side == "moshi" else wanted.flip(0))
    assert not torch.equal(got[0], got[1])


def test_silence_grows_with_the_longest_recording(tmp_path, mimi, two):
    cache = CodesCache(tmp_path / "c", mimi)
    cache.prepare(two)
    before = cache.load(two[1])
    longer = recording(tmp_path / "l.wav", 3.0, channels=1, seed=5)
    cache.prepare([*two, longer])
    assert cache.load(longer).shape == (16, 38)
    assert torch.equal(cache.load(two[1]), before)


def test_codes_are_reused_wherever_the_audio_lies(tmp_path, mimi, two, monkeypatch):
    CodesCache(tmp_path / "c", mimi).prepare(two)
    before = kept(tmp_path / "c")
    moved = tmp_path / "elsewhere.wav"
    two[0].files[0].path.rename(moved)
    again = [described(moved, 1.5, 2, "n.jsonl:1"), two[1]]
    monkeypatch.setattr(encoding, "encode_recording", None)  # encoding would raise
    assert CodesCache(tmp_path / "c", mimi).prepare(again) == 0
    assert kept(tmp_path / "c") == before


def test_the_same_sound_twice_is_encoded_once(tmp_path, mimi, two):
    copy = tmp_path / "copy.wav"
    copy.write_bytes(two[0].files[0].path.read_bytes())
    assert CodesCache(tmp_path / "c", mimi).prepare([two[0], described(copy, 1.5, 2, "m:9")]) == 1


def test_another_codec_finds_nothing(tmp_path, mimi, two):
    CodesCache(tmp_path / "c", mimi).prepare(two)
    other = small_mimi(seed=1)
    assert CodesCache(tmp_path / "c", other).prepare(two) == 2
    fewer = small_mimi()
    assert mimi_fingerprint(fewer) == mimi_fingerprint(mimi)
    fewer.set_num_codebooks(4)
    assert mimi_fingerprint(fewer) != mimi_fingerprint(mimi)


def _cut(data):
    return data[: len(data) // 2]


def _flip(data):
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


@pytest.mark.parametrize("spoil", [_cut, _flip, lambda data: b""], ids=["cut", "flipped", "empty"])
def test_a_broken_file_is_made_again_and_that_is_said(tmp_path, mimi, two, spoil, caplog):
    cache = CodesCache(tmp_path / "c", mimi)
    cache.prepare(two)
    wanted, file = cache.load(two[0]), cache.file(two[0].files[0].path)
    whole = file.read_bytes()
    file.write_bytes(spoil(whole))
    with caplog.at_level(logging.WARNING):
        assert cache.prepare(two) == 1
    assert f"{file} is broken" in caplog.text
    assert "made again" in caplog.text
    assert file.read_bytes() == whole
    assert torch.equal(cache.load(two[0]), wanted)


def test_a_write_that_fails_leaves_nothing(tmp_path, mimi, two, monkeypatch):
    cache = CodesCache(tmp_path / "c", mimi)

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(encoding, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        cache.prepare(two)
    assert kept(tmp_path / "c") == []


def test_broken_samples_are_named_with_their_line(tmp_path, mimi, two):
    samples = np.zeros((24_000, 2), dtype=np.float32)
    samples[321, 1] = np.nan
    soundfile.write(tmp_path / "nan.wav", samples, 24_000, subtype="FLOAT")
    bad = described(tmp_path / "nan.wav", 1.0, 2, "m.jsonl:7")
    cache = CodesCache(tmp_path / "c", mimi)
    with pytest.raises(UserError, match=r"m\.jsonl:7: .*nan\.wav: sample 321 of channel 1 is nan"):
        cache.prepare([*two, bad])
    assert cache.prepare(two) <= 1  # what was done before stays


def test_a_folder_that_cannot_be(tmp_path, mimi):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="no folder for codes"):
        CodesCache(tmp_path / "file" / "c", mimi)


def test_two_processes_give_what_one_gives(tmp_path, mimi, two):
    one, many = (CodesCache(tmp_path / name, mimi, load_mimi=partial(small_mimi)) for name in "ab")
    one.prepare(two)
    assert many.prepare(two, workers=2) == 2
    assert kept(tmp_path / "a") == kept(tmp_path / "b")
    for r in two:
        assert torch.equal(one.load(r), many.load(r))
    bad = described(tmp_path / "nan.wav", 1.0, 2, "m.jsonl:7")
    soundfile.write(tmp_path / "nan.wav", np.full((24_000, 2), np.nan), 24_000, subtype="FLOAT")
    late = recording(tmp_path / "late.wav", 0.5, seed=8)
    with pytest.raises(UserError, match=r"m\.jsonl:7: .*sample 0 of channel 0 is nan"):
        many.prepare([bad, late], workers=2)


def test_several_processes_need_to_know_the_codec(tmp_path, mimi, two):
    with pytest.raises(ValueError, match="2 workers need load_mimi"):
        CodesCache(tmp_path / "c", mimi).prepare(two, workers=2)
    with pytest.raises(ValueError, match="mono_side must be"):
        CodesCache(tmp_path / "c", mimi, mono_side="left")
