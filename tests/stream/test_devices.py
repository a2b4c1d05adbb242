"""Devices of sound: found, chosen, opened."""

import sys

import pytest

from moshi_ttt.devices import choose_sound, device_list
from moshi_ttt.errors import UserError
from moshi_ttt.stream import main
from tests.stream.cards import FakeSoundDevice
from tests.stream.streams import refused


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
