"""A conversation through PortAudio and a virtual sound card, as a user has it."""

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from contextlib import contextmanager

import numpy as np
import pytest

from moshi_ttt.base import find_base
from moshi_ttt.checkpoint import save_checkpoint
from moshi_ttt.engine import Engine
from moshi_ttt.frames import FRAME
from moshi_ttt.tiny.voice import speak, voices
from tests.small import small_base, small_hybrid, small_mimi, small_tokenizer
from tests.virtual_sound import RATE, raised, until, virtual_sound

SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "my sister lives in a small town by the sea",
    "it was a cold night when the train came to a stop",
    "please remember the word cucumber for me",
)
LOST = ("microphone: N frames dropped", "gaps, N frames dropped", "lost by the sound card: N")


@pytest.fixture(scope="module")
def sound():
    with virtual_sound() as running:
        yield running


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talking")
    base = find_base(small_base(folder / "base"))
    lm = small_hybrid(lm={"text_card": small_tokenizer().vocab_size()})
    return str(save_checkpoint(lm, folder / "runs/a/checkpoints/checkpoint_000001", base))


def speech(seconds):
    """A voice that speaks, `[N]` at 24 kHz."""
    (voice,) = voices("train", 1)
    clips = [np.pad(speak(text, voice).pcm, (0, RATE // 4)) for text in SENTENCES]
    once = np.concatenate(clips)
    return np.tile(once, -(-int(seconds * RATE) // len(once)))[: int(seconds * RATE)]


def raw(path):
    return np.fromfile(path, np.float32)


def talker_env(sound):
    return sound.env | {"OMP_NUM_THREADS": "1", "NO_TORCH_COMPILE": "1", "HF_HUB_OFFLINE": "1"}


@contextmanager
def talking(sound, tmp_path, *command, **env):
    """A process that talks; yields it and what it has said to stderr so far, as a function."""
    out, err = tmp_path / "stdout", tmp_path / "stderr"
    with out.open("wb") as words, err.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env=talker_env(sound) | env,
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=file,
            preexec_fn=raised,
        )
    try:
        yield process, err.read_text
    finally:
        process.kill()
        process.wait()


def at_terminal(sound, command, own):
    """A process at a terminal of its own."""
    env = talker_env(sound) | {"TERM": "xterm"}
    return subprocess.Popen(
        command, env=env, stdin=own, stdout=own, stderr=own, start_new_session=True,
        preexec_fn=lambda: (raised(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
    )  # fmt: skip


def number(words, text):
    (found,) = re.findall(words.replace("N", "([0-9]+)"), text)
    return int(found)


def frames_of(samples):
    return samples.reshape(-1, FRAME)


def place(part, whole):
    """Where in `whole` is the best match of `part`, and how well they correlate there."""
    size = 1 << int(np.ceil(np.log2(len(whole) + len(part))))
    both = np.fft.irfft(np.fft.rfft(whole, size) * np.fft.rfft(part, size).conj(), size)
    both = both[: len(whole) - len(part) + 1]
    energy = np.cumsum(np.concatenate([[0.0], whole.astype(np.float64) ** 2]))
    energy, own = energy[len(part) :] - energy[: -len(part)], float(part.astype(np.float64) @ part)
    match = both / np.sqrt((energy + 1e-4 * own) * own)  # silence matches nothing
    at = int(match.argmax())
    return at, float(match[at])


def at_best(talk, *lost):
    """What a talk gives, told words last, and the numbers in them of what was lost.

    Of up to three talks: a machine that is too busy for real time does lose something.
    """
    for _ in range(3):
        *found, told = talk()
        numbers = [number(words, told) for words in lost]
        if not any(numbers):
            break
    return *found, told, numbers


def one_talk(sound, checkpoint, tmp_path, spoken):
    """What was said and heard, what the loudspeaker played, and what the process told of it."""
    command = ["tests.telling_stream", str(tmp_path), "--mic", "--checkpoint", checkpoint]
    with (
        sound.recording() as recorded,
        talking(sound, tmp_path, *command, "--seed", "3") as (process, err),
    ):
        until(lambda: "Ctrl-C ends" in err() or process.poll() is not None, 60)
        with sound.speaking(spoken) as player:
            assert player.wait(len(spoken) / RATE + 30) == 0
            time.sleep(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130, err()
    return raw(tmp_path / "said.raw"), raw(tmp_path / "heard.raw"), raw(recorded), err()


@pytest.mark.parametrize("seconds", [4, pytest.param(120, marks=pytest.mark.slow)])
def test_what_is_spoken_is_heard_and_what_moshi_says_is_played(
    sound, checkpoint, tmp_path, seconds
):
    spoken, allowed = speech(seconds), 1 + seconds // 30
    said, heard, played, err, (gaps, *lost) = at_best(
        lambda: one_talk(sound, checkpoint, tmp_path, spoken), "loudspeaker: N gaps", *LOST
    )
    assert gaps <= allowed, "the machine is too busy for real time"
    assert not any(lost), err
    assert len(heard) == len(said) > (seconds + 0.5) * RATE
    # the microphone: every sample that was spoken, in one piece
    at, match = place(spoken, heard)
    assert match > 0.9999
    assert np.abs(heard[at : at + len(spoken)] - spoken).max() < 1e-4
    # the engine: what it says to that, the first ten seconds of it
    lm = small_hybrid(lm={"text_card": small_tokenizer().vocab_size()})
    with Engine(lm, small_mimi(), small_tokenizer(), seed=3) as engine:
        for one, answer in zip(frames_of(heard)[:125], frames_of(said), strict=False):
            assert np.array_equal(engine.step(one).pcm[0].numpy(), answer)
    # the loudspeaker: all of that, frame by frame, in order, nothing but silence in the gaps
    voice = frames_of(said)[:-8]  # the last were still under way
    assert np.sqrt(np.mean(np.square(voice))) > 1e-3
    start, match = place(np.concatenate(voice[:25]), played)
    places = [start]
    for frame in voice:
        at, match = place(frame, played[places[-1] : places[-1] + 25 * FRAME])
        assert match > 0.999
        places.append(places[-1] + at + FRAME)
    steps = np.diff(places) - FRAME
    assert (steps >= 0).all()
    assert np.count_nonzero(steps) <= gaps
    sounding = np.abs(played) > 1e-6
    length = np.flatnonzero(sounding)[-1] - np.flatnonzero(sounding)[0]
    assert abs(length - (len(said) + steps.sum())) < 0.7 * RATE


def one_echo(sound, tmp_path, spoken):
    """What was spoken and what was said as two recordings have it, and what was told of it."""
    with sound.recording() as recorded, sound.recording("room") as room:
        command = ["tests.echo_machine", "3", "44100", "2"]
        with talking(sound, tmp_path, *command) as (process, err):
            until(lambda: "delay" in err() or process.poll() is not None, 60)
            with sound.speaking(spoken):
                assert process.wait(30) == 0, err()
    return raw(room), raw(recorded), err()


def test_what_a_stereo_device_of_its_own_rate_hears_it_says(sound, tmp_path):
    """Microphone, both resamplers and loudspeaker, with a loop in place of the model."""
    spoken = np.zeros(2 * RATE, np.float32)
    spoken[RATE // 2 :] = speech(1.5)
    rooms, saids, told, lost = at_best(lambda: one_echo(sound, tmp_path, spoken), *LOST[::2])
    assert not any(lost), told
    words = spoken[RATE // 2 : RATE]
    heard, match = place(words, rooms)
    assert match > 0.999
    said, match = place(words, saids)
    assert match > 0.97  # between two samples
    level = np.abs(saids[said : said + len(words)]).max() / np.abs(words).max()
    assert level == pytest.approx(1, abs=0.02)
    # both recordings ended at once, give or take what the server and parec hold
    delay_ms = 1000 * ((len(rooms) - heard) - (len(saids) - said)) / RATE
    assert 100 < delay_ms < number("delay N ms", told) + 150


def test_a_sound_card_that_vanishes_ends_it_in_order(checkpoint, tmp_path):
    kept = tmp_path / "kept.safetensors"
    command = ["moshi_ttt.stream", "--mic", "--checkpoint", checkpoint, "--save-memory", str(kept)]
    with virtual_sound() as sound, talking(sound, tmp_path, *command) as (process, err):
        until(lambda: "Ctrl-C ends" in err() or process.poll() is not None, 60)
        time.sleep(1)
        sound.server.kill()
        assert process.wait(30) == 2, err()
    lines = err().splitlines()
    assert lines[-1].startswith("error: the sound card has stopped by itself"), err()
    assert "Traceback" not in err()
    assert "ms per frame" in err()
    assert f"saved {kept}" in err()
    assert kept.is_file()


def terminal_talk(sound, checkpoint):
    """All that a terminal shows of a talk: muted, unmuted, and then not read for some time."""
    controller, own = pty.openpty()
    before = termios.tcgetattr(own)
    termios.tcsetwinsize(own, (24, 100))
    command = [sys.executable, "-m", "moshi_ttt.stream", "--mic", "--checkpoint", checkpoint]
    process = at_terminal(sound, command, own)
    shown = bytearray()

    def seen(words, since=0):
        while select.select([controller], [], [], 0.05)[0]:
            shown.extend(os.read(controller, 65536))
        return words in shown[since:]

    try:
        with sound.speaking(speech(30)):
            until(lambda: seen(b"moshi [") or process.poll() is not None, 60)
            assert seen(b"m mutes the microphone, Ctrl-C ends; use headphones")
            until(lambda: re.search(rb"you \[#+-+\] +-\d+ dBFS  moshi \[", shown) or seen(b"~"), 20)
            os.write(controller, b"m")
            until(lambda: seen(b"you muted; m unmutes"), 20)
            os.write(controller, b"m")
            mark = len(shown)
            until(lambda: seen(b"you [", mark), 20)
            time.sleep(2.5)  # nobody reads the terminal: its buffer of 4 KiB is full in two
            os.write(controller, b"\x03")
            until(lambda: seen(b"ms per frame") and process.poll() is not None, 20)
    finally:
        process.kill()
    assert process.wait() == 130
    assert termios.tcgetattr(own) == before
    os.close(controller)
    os.close(own)
    return shown.decode()


def test_at_a_terminal_there_is_a_meter_and_a_key_to_mute(sound, checkpoint):
    told, dropped = at_best(lambda: (terminal_talk(sound, checkpoint),), *LOST[:2])
    assert not any(dropped), told


def test_a_closed_terminal_ends_it_and_what_was_learned_is_kept(sound, checkpoint, tmp_path):
    controller, own = pty.openpty()
    kept = tmp_path / "kept.safetensors"
    command = [sys.executable, "-m", "moshi_ttt.stream", "--mic", "--checkpoint", checkpoint]
    process = at_terminal(sound, [*command, "--save-memory", str(kept)], own)
    os.close(own)
    shown = bytearray()
    try:
        until(lambda: b"moshi [" in shown or shown.extend(os.read(controller, 65536)), 60)
        os.close(controller)
        assert process.wait(20) == 128 + signal.SIGHUP
    finally:
        process.kill()
        process.wait()
    assert kept.is_file()


@pytest.mark.slow
def test_a_microphone_that_hears_the_loudspeaker_is_told_of(sound, checkpoint, tmp_path):
    command = ["moshi_ttt.stream", "--mic", "--checkpoint", checkpoint]
    loop = sound.load("module-loopback", "source=loudspeaker.monitor", "sink=room")
    try:
        with talking(sound, tmp_path, *command) as (process, err):
            until(lambda: "echo:" in err() or process.poll() is not None, 90)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130, err()
    finally:
        sound.control("unload-module", loop)
    assert err().count("echo: the microphone hears the loudspeaker") == 2  # at once, and at the end
    assert "use headphones" in err()
