"""What the command line tells of the memories of a stream."""

import json

import pytest
import torch

from moshi_ttt.base import find_base
from moshi_ttt.checkpoint import save_checkpoint
from moshi_ttt.stream import main
from tests.small import small_lm
from tests.stream.streams import CARD, engine_for, hybrid, noise, refused, wave, write


def said_by(talking, tmp_path, name, *options):
    source = write(tmp_path / "in.wav", wave(2.0, 24_000), 24_000)
    out = tmp_path / f"{name}.wav"
    main(["--file", source, "--out", str(out), "--checkpoint", talking.checkpoint, *options])
    return out.read_bytes()


def test_statistics_change_nothing_and_say_what_the_memories_do(talking, tmp_path, capsys):
    file = tmp_path / "stats.jsonl"
    plain = said_by(talking, tmp_path, "plain")
    assert "inner loss" not in capsys.readouterr().err
    assert said_by(talking, tmp_path, "stats", "--stats") == plain
    err = capsys.readouterr().err
    assert "inner loss" in err
    assert "memories: nothing wrong was found" in err
    assert said_by(talking, tmp_path, "file", "--stats", str(file)) == plain
    (line,) = map(json.loads, file.read_text().splitlines())
    assert line["frame"] == 7  # position 0 is taken before the first frame: 3 to go, then 4
    assert line["layers"]["transformer.layers.1"]["loss_after"][0] > 0


def test_a_stream_too_short_for_a_reading_says_so(talking, tmp_path, capsys):
    source = write(tmp_path / "in.wav", wave(0.3, 24_000), 24_000)
    argv = ["--file", source, "--out", str(tmp_path / "o.wav"), "--checkpoint", talking.checkpoint]
    main([*argv, "--stats"])
    assert "no reading, the stream was too short for one" in capsys.readouterr().err


def test_a_file_of_statistics_needs_a_memory_and_a_name(talking, tmp_path, capsys):
    source = write(tmp_path / "in.wav", wave(0.3, 24_000), 24_000)
    argv = ["--file", source, "--out", str(tmp_path / "o.wav"), "--base", str(talking.base)]
    file = tmp_path / "s.jsonl"
    assert "no memory that keeps a state" in refused(capsys, *argv, "--stats", str(file))
    assert not file.exists()
    assert "should end in .jsonl" in refused(capsys, *argv, "--stats", source)


def test_what_a_memory_has_wrong_is_said_at_the_end(talking, tmp_path, capsys):
    lm = hybrid()
    with torch.no_grad():
        lm.transformer.layers[1].seq_modeling_block.gate.zero_()
    closed = save_checkpoint(lm, tmp_path / "closed", find_base(talking.base))
    source = write(tmp_path / "in.wav", wave(1.0, 24_000), 24_000)
    main(
        ["--file", source, "--out", str(tmp_path / "o.wav"), "--checkpoint", str(closed), "--stats"]
    )
    err = capsys.readouterr().err
    assert "found: layer 1: the gate is closed, mean |tanh(gate)| = 0: nothing is heard" in err
    assert err.count("found:") == 1


def test_the_engine_is_watched_from_its_own_frames_on():
    readings = []
    with engine_for(watch_every=8) as engine:
        for frame in noise(30):
            readings += engine.step(frame).readings
        assert engine.lm.transformer.layers[0].seq_modeling_block.watch is not None
    assert [r.at for r in readings if r is not None] == [7, 15, 23]
    assert engine.lm.transformer.layers[0].seq_modeling_block.watch is None
    stock = small_lm(text_card=CARD).eval()
    with pytest.raises(ValueError, match="nothing to monitor"):
        engine_for(stock, watch_every=8)
    assert not stock.is_streaming
