"""The engine is moshi's own loop; files, microphones and mistakes on the command line."""

import json
import os
import shutil
import signal
import socket
import types

import numpy as np
import pytest
import soundfile
import torch
from moshi.run_inference import InferenceState
from safetensors.torch import save_file

from moshi_ttt import loops, stream
from moshi_ttt.base import find_base
from moshi_ttt.checkpoint import save_checkpoint
from moshi_ttt.codec import encode_recording
from moshi_ttt.engine import Engine, Sampling, memory_norms
from moshi_ttt.errors import UserError
from moshi_ttt.files import newest_checkpoint, written_whole
from moshi_ttt.frame_times import FrameTimes
from moshi_ttt.frames import FRAME, FrameRing
from moshi_ttt.loops import stream_file
from moshi_ttt.reporter import Readings, statistics
from moshi_ttt.ring import widen_kv_rings
from moshi_ttt.stream import main
from tests.small import small_base, small_hybrid, small_lm, small_mimi, small_tokenizer

CARD = small_tokenizer().vocab_size()


def hybrid(**overrides):
    return small_hybrid(lm={"text_card": CARD}, **overrides)


def engine_for(lm=None, **options):
    return Engine(lm or hybrid(), small_mimi(), small_tokenizer(), **options)


def noise(frames, rows=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(frames, rows, 1, FRAME, generator=generator)


def run(engine, frames):
    """Voice [B, T * 1920], texts and tokens [B, 9, T]."""
    said = [(f.pcm.clone(), f.text, f.tokens.clone()) for f in map(engine.step, frames)]
    pcm, text, tokens = zip(*said, strict=True)
    return torch.cat(pcm, 1), list(text), torch.stack(tokens, 2)


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """A base and a checkpoint with a memory on disk."""
    folder = tmp_path_factory.mktemp("talking")
    base = find_base(small_base(folder / "base"))
    lm = hybrid()
    out = save_checkpoint(lm, folder / "runs/a/checkpoints/checkpoint_000001", base)
    return types.SimpleNamespace(root=folder, base=folder / "base", checkpoint=str(out))


# -- the engine -----------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [1, 2])
@pytest.mark.parametrize("greedy", [False, True])
def test_a_stream_is_moshis_own_run_inference_with_whole_rings(greedy, late):
    delays = [0] + 2 * ([0] + 7 * [late])
    lm, mimi, frames = hybrid(), small_mimi(), noise(24)
    lm.delays = delays
    with engine_for(lm, sampling=Sampling(greedy=greedy), seed=5) as engine:
        pcm, text, tokens = run(engine, frames)
        assert engine.frames == engine.times.count == 24
    info = types.SimpleNamespace(model_type="moshi")
    theirs = InferenceState(
        info, mimi, small_tokenizer(), lm, 1, 1.0, "cpu", use_sampling=not greedy
    )
    widen_kv_rings(mimi, 2)  # as the engine does; moshi's own ring drops keys of 25 Hz steps
    torch.manual_seed(5)
    with torch.no_grad():
        ((texts, wanted),) = theirs.run(frames[:, 0, 0].reshape(1, 1, -1))
    silent = (late - 1) * FRAME  # a longer delay starts later: silence, and tokens of -2
    assert torch.equal(pcm[:, silent:], wanted)
    assert torch.equal(tokens[0, 0, late - 1 :], texts)
    assert not pcm[:, :silent].any()
    assert bool((tokens[..., : late - 1] == -2).all())
    pieces = [
        small_tokenizer().id_to_piece(int(t)).replace("▁", " ") for t in texts if t not in (0, 3)
    ]
    assert "".join(t[0] for t in text) == "".join(pieces)
    assert len(pieces) > 3
    assert wanted.std() > 1e-3


def test_what_the_engine_hears_is_what_training_has_seen():
    """Codes of a stream, past Mimi's own window, are those of `encode_recording`."""
    frames, heard = noise(40), []
    lm, mimi = hybrid(), small_mimi()
    whole = encode_recording(small_mimi(), frames.flatten()[None])
    with Engine(lm, mimi, small_tokenizer()) as engine:
        take = mimi.encode
        mimi.encode = lambda pcm: heard.append(take(pcm)) or heard[-1]
        run(engine, frames)
    assert torch.equal(torch.cat(heard, -1), whole)


def test_a_row_starts_anew_and_the_other_does_not_notice():
    frames = noise(20, rows=2)
    lm = hybrid()
    lm.delays = [0] + 2 * ([0] + 7 * [2])
    with engine_for(lm, sampling=Sampling(greedy=True), rows=2) as engine:
        whole, _, tokens = run(engine, frames)
    with engine_for(lm, sampling=Sampling(greedy=True), rows=2) as engine:
        run(engine, frames[:7])
        engine.start(np.array([False, True]))
        anew = torch.cat([frames[:1, 1:], frames[:12, 1:]])  # nobody hears the first
        later, _, later_tokens = run(engine, torch.cat([frames[7:, :1], anew], 1))
    assert torch.equal(later[0], whole[0, 7 * FRAME :])
    assert torch.equal(later_tokens[0], tokens[0, :, 7:])
    assert not later[1, :FRAME].any()
    assert torch.equal(later[1, FRAME:], whole[1, : 12 * FRAME])
    assert torch.equal(later_tokens[1, :, 1:], tokens[1, :, :12])


def test_a_closed_engine_leaves_the_models_as_they_were():
    lm, mimi = hybrid(), small_mimi()
    engine = Engine(lm, mimi, small_tokenizer())
    with pytest.raises(ValueError, match="another stream"):
        Engine(lm, mimi, small_tokenizer())
    engine.close()
    assert not any(getattr(m, "is_streaming", False) for p in (lm, mimi) for m in p.modules())
    with Engine(lm, mimi, small_tokenizer(), seed=0) as again:
        again.step(noise(1)[0])


def test_statistics_name_what_was_measured():
    times = FrameTimes()
    assert np.isnan(times.real_time_factor)
    assert all(map(np.isnan, times.percentiles()))
    for ms in range(1, 101):
        times.add(float(ms))
    assert times.percentiles() == pytest.approx((50.5, 95.05, 99.01))
    assert times.real_time_factor == pytest.approx(50.5 / 80)
    assert times.late == 20
    with engine_for() as engine:
        norms = memory_norms(engine.lm)
        assert list(norms) == ["transformer.layers.0", "transformer.layers.1"]
        assert not any(norms.values())  # the only frame so far is in the unfinished chunk
        run(engine, noise(5))
        assert all(norm > 1e-3 for norm in memory_norms(engine.lm).values())
        said = statistics(engine)
    assert "5 frames (0.4 s)" in said
    assert "memory transformer.layers.1: |W - W0| = " in said


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_temperatures_are_checked(value):
    with pytest.raises(ValueError, match="temp_text must not be negative"):
        Sampling(temp_text=value)


# -- a file ---------------------------------------------------------------------------------------


def write(path, samples, rate):
    soundfile.write(path, samples, rate, subtype="FLOAT")
    return str(path)


def wave(seconds, rate, channels=1, seed=0):
    rng = np.random.default_rng(seed)
    return 0.1 * rng.standard_normal((int(seconds * rate), channels))


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


# -- what is talked to ----------------------------------------------------------------------------


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


# -- queues and signals ----------------------------------------------------------------------------


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


# -- mistakes -------------------------------------------------------------------------------------


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as left:
        main(list(argv))
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == 1
    assert err.endswith("\n")
    return err.splitlines()[-1]


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


# -- statistics of the memories -------------------------------------------------------------------


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
