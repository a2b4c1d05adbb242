"""A file is talked to: what it gives, which model it is, how it ends."""

import os
import signal

import numpy as np
import pytest
import soundfile
import torch

from moshi_ttt import loops
from moshi_ttt.errors import UserError
from moshi_ttt.files import newest_checkpoint, written_whole
from moshi_ttt.frames import FRAME, FrameRing
from moshi_ttt.loops import stream_file
from moshi_ttt.stream import main
from tests.stream.streams import engine_for, noise, run, wave, write


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2)])
def test_a_file_gives_a_file_of_its_length(talking, tmp_path, capsys, rate, channels):
    samples = wave(0.73, rate, channels)
    source = write(tmp_path / "in.wav", samples, rate)
    out = tmp_path / "out.wav"
    main(["--file", source, "--out", str(out), "--checkpoint", talking.checkpoint])
    info = soundfile.info(out)
    assert (info.samplerate, info.channels, info.subtype) == (24_000, 1, "PCM_16")
    assert info.frames == -(-len(samples) * 24_000 // rate)
    said, _ = soundfile.read(out, dtype="float32")
    with engine_for(seed=0) as engine:
        pcm = loops.user_channel(source, None)
        wanted, text, _ = run(
            engine, torch.nn.functional.pad(pcm, (0, -len(pcm) % FRAME)).view(-1, FRAME)
        )
    wanted = wanted[0, : len(said)].numpy()
    assert np.abs(said - wanted).max() < 1 / 32_000  # the level, to a step of 16 bit
    assert wanted.std() > 1e-3
    captured = capsys.readouterr()
    assert captured.out == "".join(t[0] for t in text) + "\n"
    assert f"talking to checkpoint {talking.checkpoint}, on cpu" in captured.err
    assert "ms per frame: p50" in captured.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.wav", "out.wav"]


def test_of_a_stereo_file_the_right_channel_is_the_user(tmp_path, capsys):
    left, right = wave(0.2, 24_000, seed=1), wave(0.2, 24_000, seed=2)
    stereo = write(tmp_path / "s.wav", np.concatenate([left, right], 1), 24_000)
    mono = write(tmp_path / "m.wav", right, 24_000)
    assert torch.equal(loops.user_channel(stereo, None), loops.user_channel(mono, None))
    assert "its right channel is the user" in capsys.readouterr().err
    assert not torch.equal(loops.user_channel(stereo, "left"), loops.user_channel(mono, None))
    with pytest.raises(UserError, match="is mono"):
        loops.user_channel(mono, "right")


def test_what_breaks_off_leaves_nothing(tmp_path):
    out = tmp_path / "out.wav"
    out.write_bytes(b"before")

    def interrupted():
        raise KeyboardInterrupt

    with engine_for() as engine, pytest.raises(KeyboardInterrupt):
        stream_file(engine, noise(3).flatten(), out, lambda frame: None, interrupted)
    assert out.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(TypeError), written_whole(out) as beside:
        beside.write_bytes("no bytes")
    assert list(tmp_path.iterdir()) == [out]


def test_the_newest_checkpoint_is_the_one_written_last(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for i, name in enumerate(
        ["b/checkpoints/checkpoint_000002", "a/checkpoints/checkpoint_000009"]
    ):
        folder = tmp_path / name / "consolidated"
        folder.mkdir(parents=True)
        (folder / "ttt.json").write_text("{}")
        os.utime(folder / "ttt.json", (1000 - i, 1000 - i))
    assert newest_checkpoint(tmp_path) == tmp_path / "b/checkpoints/checkpoint_000002/consolidated"


def test_without_a_name_it_says_what_it_talks_to(talking, tmp_path, capsys, monkeypatch):
    source = write(tmp_path / "in.wav", wave(0.08, 24_000), 24_000)
    talk_to = ["--file", source, "--out", str(tmp_path / "out.wav")]
    monkeypatch.chdir(talking.root)
    main(talk_to)
    assert "(the newest under runs/)" in capsys.readouterr().err
    main([*talk_to, "--base", str(talking.base), "--stats"])
    err = capsys.readouterr().err
    assert f"base {talking.base}, without a memory" in err
    assert "|W - W0|" not in err
    monkeypatch.chdir(tmp_path)
    main(talk_to)
    assert "the embedded base data/tiny/base, untrained" in capsys.readouterr().err


def test_a_full_queue_loses_its_oldest():
    ring, out = FrameRing(3, size=2), np.zeros(2, np.float32)
    assert not ring.get(out)
    for i in range(5):
        ring.put(np.full(2, i, np.float32))
    assert ring.dropped == 2
    assert [ring.get(out) and out[0] for _ in range(3)] == [2, 3, 4]
    assert not ring.get(out)


def test_the_second_ctrl_c_insists():
    before = signal.getsignal(signal.SIGINT)  # a shell's background job ignores it
    interrupts = loops.Interrupts()
    with interrupts.taken():
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interrupts.check()
    assert signal.getsignal(signal.SIGINT) is before
