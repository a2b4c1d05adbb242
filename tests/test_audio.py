"""Audio in: exact length and time after resampling, and a clear error for every broken file."""

import math
import struct

import numpy as np
import pytest
import soundfile

from moshi_ttt.audio import SAMPLE_RATE, audio_info, read_audio
from moshi_ttt.errors import UserError


def tone(seconds, rate, channels=1):
    t = np.arange(int(seconds * rate)) / rate
    wave = 0.5 * np.sin(2 * np.pi * 440 * t)
    return np.stack([wave] * channels, axis=1).astype(np.float32)


def write(path, samples, rate=24_000, **kwargs):
    soundfile.write(path, samples, rate, **kwargs)
    return path


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 24_000, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_rate_comes_out_at_24_khz_in_place(tmp_path, rate, channels):
    samples = tone(1.0, rate, channels)
    pcm = read_audio(write(tmp_path / "a.wav", samples, rate, subtype="FLOAT"))
    assert pcm.shape == (channels, math.ceil(len(samples) * SAMPLE_RATE / rate))
    middle = slice(2_000, 22_000)
    wanted = tone(1.0, SAMPLE_RATE)[middle, 0]
    assert np.abs(pcm[0, middle].numpy() - wanted).max() < 5e-3  # no delay, no change of level


def test_flac_header(tmp_path):
    info = audio_info(write(tmp_path / "a.flac", tone(0.5, 8_000, 2), 8_000))
    assert (info.frames, info.sample_rate, info.channels, info.duration) == (4_000, 8_000, 2, 0.5)


def _cut(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _zero_rate(path):
    data = bytearray(path.read_bytes())
    data[24:28] = struct.pack("<I", 0)
    path.write_bytes(data)


def _noise(path):
    path.write_bytes(b"this is no audio at all, only text")


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("a.wav", lambda p: p.unlink(), "no such audio file"),
        ("a.wav", lambda p: p.write_bytes(b""), "is empty"),
        ("a.wav", lambda p: write(p, tone(0, 24_000)), "is empty"),
        ("a.wav", _cut, "truncated"),
        ("a.flac", _cut, "truncated"),
        ("a.wav", _zero_rate, "0 Hz"),
        ("a.wav", _noise, "not readable as audio"),
        ("a.wav", lambda p: write(p, tone(1, 24_000, 3)), "3 channels"),
    ],
    ids=["missing", "no-bytes", "no-samples", "cut-wav", "cut-flac", "0-Hz", "text", "3-channels"],
)
def test_broken_files_are_named(tmp_path, name, spoil, words):
    rng = np.random.default_rng(0)
    path = write(tmp_path / name, 0.1 * rng.standard_normal((24_000, 1)))
    spoil(path)
    with pytest.raises(UserError, match=words) as error:
        read_audio(path)
    assert str(path) in str(error.value)


def test_a_file_named_raw_has_no_header_and_is_named(tmp_path):
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(1000))
    with pytest.raises(UserError, match=r"a\.raw: not readable as audio"):
        audio_info(path)


def test_another_rate_where_it_is_asked_for(tmp_path):
    path = write(tmp_path / "a.wav", tone(1.0, 8_000, 2), 8_000, subtype="FLOAT")
    pcm = read_audio(path, 16_000)
    assert pcm.shape == (2, 16_000)
    middle = slice(2_000, 14_000)
    assert np.abs(pcm[1, middle].numpy() - tone(1.0, 16_000)[middle, 0]).max() < 5e-3


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_sample_that_is_no_number_is_named(tmp_path, value):
    samples = tone(1, 24_000, 2)
    samples[777, 1] = value
    path = write(tmp_path / "a.wav", samples, subtype="FLOAT")
    assert audio_info(path).channels == 2  # the header is fine
    with pytest.raises(UserError, match=r"sample 777 of channel 1 is (nan|inf)"):
        read_audio(path)


def test_a_wav_written_to_a_pipe_has_no_size_and_is_read(tmp_path):
    path = write(tmp_path / "a.wav", tone(1, 24_000))
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = struct.pack("<I", 0xFFFFFFFF)
    path.write_bytes(data)
    assert read_audio(path).shape == (1, 24_000)
