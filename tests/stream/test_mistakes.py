"""Mistakes on the command line of a stream are one line."""

import shutil
import socket

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moshi_ttt import stream
from moshi_ttt.errors import UserError
from moshi_ttt.reporter import Readings
from moshi_ttt.stream import main
from tests.stream.streams import engine_for, hybrid, refused, wave, write


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--filee", "a.wav"], "--file --mic --list-devices is required"),
        (["--file", "IN", "--out", "o.wav", "--chekpoint", "x"], "unrecognized arguments: --chekp"),
        (["--file", "IN", "--out", "o.wav", "--see", "3"], "unrecognized arguments: --see 3"),
        (["--file", "IN", "--out", "o.wav", "extra"], "unrecognized arguments: extra"),
        (["--file", "IN", "--out", "o.wav", "--seed", "x"], "--seed: invalid int value: 'x'"),
        (["--file", "IN", "--out", "o.wav", "--threads", "0"], "at least 1, got 0"),
        (["--file", "IN", "--out", "o.wav", "--device", "abacus"], "device 'abacus' is unknown"),
        (["--file", "IN", "--out", "o.wav", "--checkpoint", "no"], "no is not a checkpoint"),
        (["--file", "IN", "--out", "o.wav", "--base", "no"], "base no: no such folder"),
        (["--file", "IN", "--out", "IN"], "would overwrite the file"),
        (["--file", "IN", "--out", "o.wav", "--save-memory", "IN"], "would overwrite the file"),
        (
            ["--file", "IN", "--out", "o.wav", "--save-memory", "a", "--save-session", "./a"],
            "--save-session ./a would overwrite what --save-memory writes",
        ),
        (["--file", "IN", "--out", "o.wav", "--seed", "-1"], "--seed must be 0 to"),
        (["--file", "IN", "--out", "o.wav", "--device", "meta"], "device 'meta' is unknown"),
        (["--file", "IN", "--out", "o.mp3"], "should end in .wav"),
        (["--file", "IN", "--out", "no/o.wav"], "the folder no does not exist"),
        (["--file", "IN", "--out", "o.wav", "--save-session", "."], "is a folder"),
        (["--file", "IN"], "--file needs --out"),
        (["--file", "no.wav", "--out", "o.wav"], "no.wav: no such audio file"),
        (["--file", "EMPTY", "--out", "o.wav"], "the audio is empty"),
        (["--file", "NAN", "--out", "o.wav"], "sample 7 of channel 0 is nan"),
        (["--mic", "--out", "o.wav"], "--out and --channel go with --file"),
        (["--list-devices", "--input-device", "1"], "go with --mic"),
        (["--mic", "--load-memory", "a", "--load-session", "b"], "brings its own memory"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    write("IN.wav", wave(0.1, 24_000), 24_000)
    write("EMPTY.wav", wave(0, 24_000), 24_000)
    spoilt = wave(0.1, 24_000)
    spoilt[7] = np.nan
    write("NAN.wav", spoilt, 24_000)
    before = set(tmp_path.iterdir())
    names = {"IN", "EMPTY", "NAN"}
    assert words in refused(capsys, *(f"{o}.wav" if o in names else o for o in options))
    assert set(tmp_path.iterdir()) == before


def test_a_home_folder_is_the_same_for_all_that_is_written(monkeypatch, tmp_path):
    """`--out=~/o.wav` reaches us as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "in.wav", wave(0.1, 24_000), 24_000)
    args = stream.parse(["--file", f"{tmp_path}/in.wav", "--out=~/o.wav", "--stats=~/s.jsonl"])
    assert (args.out, args.stats) == (f"{tmp_path}/o.wav", f"{tmp_path}/s.jsonl")


def test_statistics_that_cannot_be_written_are_one_line(tmp_path):
    with socket.socket(socket.AF_UNIX) as something_else:
        something_else.bind(str(tmp_path / "s.jsonl"))
        with pytest.raises(UserError, match=r"--stats .*s\.jsonl: No such device or address"):
            Readings(str(tmp_path / "s.jsonl"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--temp", "-1"], "temp must not be negative, got -1.0"),
        (["--load-memory", "no"], "no: no such file"),
        (["--load-session", "no"], "no: no such file"),
    ],
)
def test_mistakes_found_with_the_model(talking, tmp_path, capsys, options, words):
    source = write(tmp_path / "in.wav", wave(0.1, 24_000), 24_000)
    talk_to = ["--file", source, "--out", str(tmp_path / "out.wav")]
    assert words in refused(capsys, *talk_to, "--checkpoint", talking.checkpoint, *options)
    assert not (tmp_path / "out.wav").exists()


def test_a_model_without_memory_says_so_before_the_talk(talking, tmp_path, capsys):
    source = write(tmp_path / "in.wav", wave(0.1, 24_000), 24_000)
    talk_to = ["--file", source, "--out", str(tmp_path / "out.wav"), "--base", str(talking.base)]
    kept = str(tmp_path / "kept")
    assert "has no memory" in refused(capsys, *talk_to, "--save-memory", kept)
    assert not (tmp_path / "out.wav").exists()


def test_a_broken_codec_is_named(talking, tmp_path, capsys):
    base = shutil.copytree(talking.base, tmp_path / "base")
    save_file({"x": torch.zeros(1)}, base / "mimi.safetensors")
    source = write(tmp_path / "in.wav", wave(0.1, 24_000), 24_000)
    talk_to = ["--file", source, "--out", str(tmp_path / "out.wav")]
    assert "its codec or tokenizer is broken" in refused(capsys, *talk_to, "--base", str(base))


def test_a_half_duplex_model_is_refused():
    lm = hybrid()
    lm.dep_q = lm.n_q
    with pytest.raises(UserError, match="not a full-duplex Moshi"):
        engine_for(lm)


def test_help_needs_no_model(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    assert "right channel is the user" in capsys.readouterr().out
