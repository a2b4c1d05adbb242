"""The sound card's side of a conversation: rates, queues, gaps, mute, devices."""

import os
import signal
import sys
import threading
import time
import types

import numpy as np
import pytest

from moshi_ttt import loops, reporter
from moshi_ttt.devices import Device, choose_sound, device_list
from moshi_ttt.engine import Engine
from moshi_ttt.errors import UserError
from moshi_ttt.frames import FRAME
from moshi_ttt.loops import talk
from moshi_ttt.sound import LEAD_MS, Resampler, SoundCard, level_db
from moshi_ttt.stream import main
from tests.small import small_hybrid, small_mimi, small_tokenizer
from tests.test_stream import noise, refused, talking

__all__ = ["talking"]
RATE = 24_000
STATUS = types.SimpleNamespace(input_overflow=False, output_underflow=False)


def card_of(rate=RATE, channels=1, **options):
    return SoundCard(*(Device(0, "a device", rate, channels) for _ in range(2)), **options)


def lead_of(card, rate=RATE):
    """Samples of silence before the first."""
    return round((LEAD_MS + Resampler(RATE, rate).delay_ms) / 1000 * rate)


def tone(seconds, rate, hz=440.0, level=0.5):
    return (level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype("f4")


def record(card, samples, block, channels=1):
    """Have the card record `samples [N]`, and return all frames it made of them `[M]`."""
    heard, frame = [], np.zeros(FRAME, np.float32)
    for at in range(0, len(samples), block):
        part = np.repeat(samples[at : at + block, None], channels, 1)
        card.on_input(part, len(part), None, STATUS)
        while card.heard.get(frame):
            heard.append(frame.copy())
    return np.concatenate(heard)


def play(card, said, blocks, block, channels=1):
    """Have the card play the frames of `said [N]`, one each 80 ms; returns `[M, channels]`."""
    frames, played = list(said.reshape(-1, FRAME)), []
    for i in range(blocks):
        if i % 4 == 0 and frames:
            card.said.put(frames.pop(0))
        out = np.full((block, channels), 9, np.float32)
        card.on_output(out, block, None, STATUS)
        played.append(out)
    return np.concatenate(played)


# -- rates ----------------------------------------------------------------------------------------


def fitted(samples, rate, hz=440.0):
    """Amplitude of the tone of `hz` that fits `samples` best, and the largest departure from it."""
    at = 2 * np.pi * hz * np.arange(len(samples)) / rate
    basis = np.stack([np.sin(at), np.cos(at)], 1)
    found = np.linalg.lstsq(basis, samples.astype(np.float64), rcond=None)[0]
    return float(np.hypot(*found)), float(np.abs(basis @ found - samples).max())


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 24_000, 44_100, 48_000, 96_000])
def test_a_tone_is_heard_and_said_at_any_rate(rate, channels):
    """Right in frequency, level and length, with no click where blocks meet."""
    card, seconds, block = card_of(rate, channels), 4.0, rate // 50
    heard = record(card, tone(seconds, rate), block, channels)
    late = seconds * RATE - len(heard)  # what is still held, with the unfinished frame
    assert 0 <= late <= FRAME + Resampler(rate, RATE).delay_ms / 1000 * RATE
    level, click = fitted(heard[RATE // 4 :], RATE)
    assert level == pytest.approx(0.5, abs=0.001)
    assert click < 0.001
    said = tone(seconds, RATE)
    played = play(card, said, 220, block, channels)
    assert played.shape == (220 * block, channels)
    assert (played == played[:, :1]).all()
    assert card.gaps == 1  # after the last of them
    sounding = np.flatnonzero(np.abs(played[:, 0]) > 1e-3)
    first, last = sounding[0], sounding[-1]
    assert first / rate <= (lead_of(card, rate) + 2) / rate
    held = Resampler(RATE, rate).delay_ms / 1000
    assert seconds - held - 0.02 <= (last - first) / rate <= seconds
    middle = played[first + rate // 4 : last - rate // 10, 0]
    level, click = fitted(middle, rate)
    assert level == pytest.approx(0.5, abs=0.001)
    assert click < 0.001


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000, 96_000])
def test_the_delay_is_what_is_said(rate):
    """From a click at the microphone to where it is played, if what is heard is said at once."""
    card, block = card_of(rate), rate // 50
    samples = np.zeros(rate, np.float32)
    samples[rate // 10] = 1
    frame, played = np.zeros(FRAME, np.float32), []
    for at in range(0, rate, block):
        card.on_input(samples[at : at + block, None], block, None, STATUS)
        while card.heard.get(frame):
            card.said.put(frame)
        out = np.zeros((block, 1), np.float32)
        card.on_output(out, block, None, STATUS)
        played.append(out[:, 0])
    click = int(np.abs(np.concatenate(played)).argmax())
    delay_ms = 1000 * (click - rate // 10) / rate
    assert LEAD_MS < delay_ms <= card.delay_ms + 20  # and the block that is being recorded
    assert card.delay_ms < 250


def test_resampling_for_hours_takes_no_more_memory():
    resample, block = Resampler(44_100, RATE), tone(0.02, 44_100)
    counts = [len(resample(block)) for _ in range(50 * 60)]
    assert max(counts) < 2000  # 83 ms at the most, whatever went before
    assert sum(counts) == pytest.approx(60 * RATE, abs=0.05 * RATE)


# -- queues ---------------------------------------------------------------------------------------


def test_the_card_cuts_any_block_into_frames_and_counts_what_is_lost():
    card, samples = card_of(), np.arange(10 * FRAME, dtype=np.float32)[:, None]
    for block in np.split(samples, range(700, len(samples), 700)):
        card.on_input(block, len(block), None, STATUS)
    heard = np.zeros(FRAME, np.float32)
    assert card.heard.dropped == 2
    for i in range(2, 10):
        assert card.heard.get(heard)
        assert np.array_equal(heard, samples[i * FRAME : (i + 1) * FRAME, 0])
    card.on_input(samples[:1], 1, None, types.SimpleNamespace(input_overflow=True))
    assert "microphone: 2 frames dropped" in card.report()
    assert "lost by the sound card: 1" in card.report()


def test_gaps_are_silence_and_are_counted_once_each():
    card, block = card_of(), 480
    lead = lead_of(card) // block

    def taken():
        out = np.full((block, 1), 9, np.float32)
        card.on_output(out, block, None, STATUS)
        return out

    assert not any(taken().any() for _ in range(5))
    assert card.gaps == 0  # Moshi has not begun
    for gaps in range(2):
        card.said.put(np.full(FRAME, 3, np.float32))
        blocks = [taken() for _ in range(lead + 4 + 3)] if gaps == 0 else [taken() for _ in "1234"]
        sounding = [bool((b == 1).all()) for b in blocks]  # beyond full scale is cut off
        assert sounding == ([False] * lead + [True] * 4 + [False] * 3 if gaps == 0 else [True] * 4)
        assert not any(b.any() for b, s in zip(blocks, sounding, strict=True) if not s)
    assert card.gaps == 1
    taken()
    assert card.gaps == 2
    card.said.put(np.ones(FRAME, np.float32))
    card.ended = True
    assert not [taken() for _ in range(6)][-1].any()
    assert card.gaps == 2


def test_a_delay_that_is_over_is_made_up_for_in_a_pause():
    card, block = card_of(), FRAME
    loud, quiet = tone(0.08, RATE), tone(0.08, RATE, level=1e-3)
    for _ in range(4):  # three frames late
        card.said.put(loud)
    for i in range(260):
        card.said.put(quiet if i % 10 == 0 else loud)
        card.on_output(np.zeros((block, 1), np.float32), block, None, STATUS)
    assert card.shortened == 3
    assert card.said.held <= 2
    assert card.gaps == card.said.dropped == 0


def test_a_muted_microphone_brings_silence_at_once():
    card = card_of(muted=True)
    assert not record(card, tone(0.4, RATE), 480).any()
    card.muted = False
    assert record(card, tone(0.4, RATE), 480).any()
    for _ in range(0, 2 * FRAME, 480):
        card.on_input(tone(0.02, RATE)[:, None], 480, None, STATUS)
    card.muted = True  # with two frames in the queue
    heard = np.ones(FRAME, np.float32)
    assert card.hear(heard, 0.0)
    assert not heard.any()


def test_levels():
    assert level_db(tone(0.1, RATE, level=1.0)) == pytest.approx(-3.01, abs=0.1)
    assert level_db(np.zeros(FRAME, np.float32)) == -100


# -- the loop -------------------------------------------------------------------------------------


@pytest.fixture
def engine():
    lm = small_hybrid(lm={"text_card": small_tokenizer().vocab_size()})
    with Engine(lm, small_mimi(), small_tokenizer(), seed=0) as engine:
        yield engine


def test_a_microphone_that_is_silent_for_ever_is_an_error(engine, monkeypatch):
    monkeypatch.setattr(loops, "DEAD_SECONDS", 0.2)
    card = card_of()
    with pytest.raises(UserError, match="the microphone has brought nothing"):
        talk(engine, card, lambda frame: None, lambda: False)
    assert card.ended


def test_a_sound_card_that_stops_is_an_error(engine):
    card = card_of()
    card.heard.put(tone(0.08, RATE))
    with pytest.raises(UserError, match="the sound card has stopped by itself"):
        talk(engine, card, lambda frame: card.on_finished(), lambda: False)
    assert engine.frames == 1


def test_a_loudspeaker_that_takes_nothing_is_an_error(engine, monkeypatch):
    monkeypatch.setattr(loops, "DEAD_SECONDS", 0.4)
    card = card_of()
    with pytest.raises(UserError, match="the loudspeaker has taken nothing"):
        talk(engine, card, lambda frame: None, lambda: _put_one(card))
    assert engine.frames == 5


def _put_one(card):
    if not card.heard.held:
        card.heard.put(tone(0.08, RATE))
    return False


class FakeSoundDevice(types.ModuleType):
    """PortAudio's streams, their callbacks called by hand; the model behind them is real.

    The microphone brings 12 frames at once (4 too many); the loudspeaker asks for more than it gets
    and then presses Ctrl-C.
    """

    class PortAudioError(Exception):
        pass

    DEVICE = {  # noqa: RUF012
        "name": "a microphone", "hostapi": 0, "max_input_channels": 2, "max_output_channels": 2,
        "default_samplerate": 44_100.0,
    }  # fmt: skip

    def __init__(self, error=None, devices=(DEVICE,), rates=(RATE,)):
        super().__init__("sounddevice")
        self.error, self.played, self.threads = error, [], []
        self.devices, self.rates = devices, rates
        self.default = types.SimpleNamespace(device=[0 if devices else -1] * 2)

    def query_devices(self):
        return list(self.devices)

    def query_hostapis(self):
        return ({"name": "ALSA"},)

    def check_input_settings(self, samplerate, **_):
        if self.error:
            raise self.error
        if samplerate not in self.rates:
            raise self.PortAudioError(f"Invalid sample rate {samplerate}")

    check_output_settings = check_input_settings

    def InputStream(self, callback, **_):
        return self._stream(lambda: callback(noise(12).view(-1, 1).numpy(), 12 * FRAME, 0, STATUS))

    def OutputStream(self, callback, **_):
        def listen():
            block = np.zeros((FRAME, 1), np.float32)
            while sum(map(np.count_nonzero, self.played)) < 8 * FRAME - 99:
                callback(block, FRAME, 0, STATUS)
                if block.any():
                    self.played.append(block.copy())
                else:
                    time.sleep(0.002)  # a thread that spins leaves the model no interpreter
            callback(block, FRAME, 0, STATUS)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=listen)
        self.threads.append(thread)
        return self._stream(thread.start)

    def _stream(self, start):
        return types.SimpleNamespace(
            start=start, abort=lambda: None, close=lambda: None, latency=0.05
        )


def test_a_talk_by_microphone_ends_with_its_statistics(talking, tmp_path, capsys, monkeypatch):
    fake = FakeSoundDevice()
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    kept = tmp_path / "kept.safetensors"
    with pytest.raises(SystemExit) as left:
        main(["--mic", "--checkpoint", talking.checkpoint, "--save-memory", str(kept)])
    fake.threads[0].join()
    assert left.value.code == 130
    captured = capsys.readouterr()
    err = captured.err
    assert "microphone: a microphone (24 kHz mono); loudspeaker: a microphone (24 kHz mono)" in err
    assert "from ear to voice 260 ms, and what a frame takes to compute" in err
    assert "use headphones" in err
    assert "\x1b" not in captured.err + captured.out  # no meter where there is no terminal
    assert "microphone: 4 frames dropped" in err
    assert "8 frames (0.6 s)" in err
    assert "echo: not known" in err
    assert int(err.partition("loudspeaker: ")[2].partition("loudspeaker: ")[2].split()[0]) >= 1
    assert kept.is_file()
    lm = small_hybrid(lm={"text_card": small_tokenizer().vocab_size()})
    with Engine(lm, small_mimi(), small_tokenizer(), seed=0) as engine:
        said = [engine.step(frame) for frame in noise(12)[4:]]
        assert captured.out == "".join(f.text[0] for f in said) + "\n"
    assert np.concatenate(fake.played)[:, 0].std() > 1e-3


def test_what_was_learned_before_the_sound_card_failed_is_kept(
    talking, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "sounddevice", FakeSoundDevice())
    monkeypatch.setattr(FakeSoundDevice, "OutputStream", lambda self, **_: self._stream(list))
    monkeypatch.setattr(loops, "DEAD_SECONDS", 1.0)
    monkeypatch.setattr(reporter, "STATS_SECONDS", 0.0)
    kept = tmp_path / "kept"
    argv = ["--mic", "--stats", "--checkpoint", talking.checkpoint, "--save-memory", str(kept)]
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert "error: the microphone has brought nothing" in err
    assert err.count("ms per frame") == 9  # after each frame, and at the end
    assert "2 frames dropped; lost" in err  # nobody listened
    assert kept.is_file()


# -- devices --------------------------------------------------------------------------------------


def devices(monkeypatch, *names, **options):
    found = [dict(FakeSoundDevice.DEVICE, name=name) for name in names]
    fake = FakeSoundDevice(devices=found, **options)
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    return found


def test_devices_are_listed(capsys, monkeypatch):
    found = devices(monkeypatch, "Built-in", "pulse")
    found[1]["max_input_channels"] = 0
    main(["--list-devices"])
    head, first, second, choose, server = capsys.readouterr().out.splitlines()
    assert head.split() == ["#", "name", "system", "microphone", "loudspeaker", "own", "rate"]
    assert first.split() == ["0", "Built-in", "ALSA", "default", "default", "44.1", "kHz"]
    assert second.split() == ["1", "pulse", "ALSA", "-", "yes", "44.1", "kHz"]
    assert "--input-device" in choose
    assert "PULSE_SOURCE=NAME" in server


def test_devices_go_by_number_or_name(monkeypatch):
    found = devices(monkeypatch, "USB Audio", "USB", "USB Headset")
    assert [d.index for d in choose_sound()] == [0, 0]
    assert [d.index for d in choose_sound("2", "usb")] == [2, 1]
    assert [d.index for d in choose_sound("head", "Audio")] == [2, 0]
    found[2]["max_input_channels"] = 0
    for name, words in (
        ("us", "more than one microphone has that in its name: 0 'USB Audio', 1 'USB'"),
        ("2", "--input-device '2': no such microphone; there are: 0 'USB Audio', 1 'USB'"),
        ("9", "no such microphone"),
        ("mine", "no such microphone"),
    ):
        with pytest.raises(UserError, match=words):
            choose_sound(name)


@pytest.mark.parametrize(
    ("rates", "most", "chosen"),
    [
        ((24_000, 48_000), 2, (24_000, 1)),
        ((44_100, 48_000), 2, (44_100, 1)),
    ],
)
def test_a_device_is_opened_at_24_khz_or_its_own_rate(monkeypatch, rates, most, chosen):
    devices(monkeypatch, "card", rates=rates)
    assert [(d.rate, d.channels) for d in choose_sound()] == [chosen] * 2


def test_a_device_that_has_only_stereo_is_opened_so(monkeypatch):
    devices(monkeypatch, "card")

    def only_stereo(self, channels, samplerate, **_):
        if (channels, samplerate) != (2, 44_100):
            raise self.PortAudioError("Invalid number of channels")

    monkeypatch.setattr(FakeSoundDevice, "check_input_settings", only_stereo)
    microphone, loudspeaker = choose_sound()
    assert str(microphone) == "card (44.1 kHz stereo)"
    assert str(loudspeaker) == "card (24 kHz mono)"


class NoPortAudio:
    """An import of sounddevice where PortAudio is missing."""

    def find_spec(self, name, *_):
        if name == "sounddevice":
            raise OSError("PortAudio library not found")


@pytest.mark.parametrize("option", ["--mic", "--list-devices"])
def test_without_portaudio_it_says_what_to_install(capsys, monkeypatch, option):
    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    monkeypatch.setattr(sys, "meta_path", [NoPortAudio(), *sys.meta_path])
    assert "apt-get install libportaudio2" in refused(capsys, option)


def test_without_a_device_it_is_one_line(talking, capsys, monkeypatch, tmp_path):
    devices(monkeypatch)
    assert "no audio device" in refused(capsys, "--list-devices")
    kept = tmp_path / "kept"
    argv = ["--mic", "--checkpoint", talking.checkpoint, "--save-memory", str(kept)]
    assert "there is no default microphone; there are: none" in refused(capsys, *argv)
    error = FakeSoundDevice.PortAudioError("Device unavailable")
    devices(monkeypatch, "card", error=error)
    said = refused(capsys, *argv)
    assert "the microphone 'card' cannot be opened: Device unavailable" in said
    assert not kept.exists()
    assert device_list().startswith("  #")
