"""The sound devices: what there is, which are meant, and how they can be opened."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from moshi_ttt.audio import SAMPLE_RATE
from moshi_ttt.errors import UserError

INSTALL = (
    "PortAudio is missing, which microphone and loudspeaker need: install it with "
    "`apt-get install libportaudio2` (macOS: `brew install portaudio`), or use --file"
)
SOUND_SERVER = (
    "behind `pulse` and `default` is a sound server with devices of its own: `pactl list short "
    "sources` and `sinks` name them, PULSE_SOURCE=NAME and PULSE_SINK=NAME before the command "
    "choose among them"
)
KINDS = {"input": "microphone", "output": "loudspeaker"}


@dataclass(frozen=True)
class Device:
    """One side of the sound, and how it is opened.

    Attributes:
        index: PortAudio's number.
        name: PortAudio's name.
        rate: Hz.
        channels: what is opened; Moshi hears and says one.
    """

    index: int
    name: str
    rate: int
    channels: int

    def __str__(self) -> str:
        """For people."""
        channels = {1: "mono", 2: "stereo"}.get(self.channels, f"{self.channels} channels")
        return f"{self.name} ({self.rate / 1000:g} kHz {channels})"


def sounddevice() -> ModuleType:
    """The module sounddevice, which looks for PortAudio when it is imported.

    Raises:
        UserError: PortAudio is not there; how to install it.
    """
    try:
        import sounddevice as module
    except OSError as error:
        raise UserError(INSTALL) from error
    return module


def device_list() -> str:
    """The sound devices, a line each, and how one is chosen.

    Raises:
        UserError: PortAudio is missing, or finds no device.
    """
    sd = sounddevice()
    found, systems = list(sd.query_devices()), sd.query_hostapis()
    if not found:
        raise UserError("no audio device: PortAudio finds neither microphone nor loudspeaker")
    width = max(len(d["name"]) for d in found)
    lines = [f"  #  {'name':{width}}  system  microphone  loudspeaker  own rate"]
    for i, d in enumerate(found):
        sides = [
            ("default" if i == default else "yes") if d[f"max_{kind}_channels"] else "-"
            for kind, default in zip(KINDS, sd.default.device, strict=True)
        ]
        lines.append(
            f"{i:3}  {d['name']:{width}}  {systems[d['hostapi']]['name']:6}  {sides[0]:10}  "
            f"{sides[1]:11}  {d['default_samplerate'] / 1000:g} kHz"
        )
    lines.append("choose with --input-device and --output-device: # or part of the name")
    if any(d["name"] in ("pulse", "pipewire") for d in found):
        lines.append(SOUND_SERVER)
    return "\n".join(lines)


def choose_sound(
    input_device: str | None = None, output_device: str | None = None
) -> tuple[Device, Device]:
    """Microphone and loudspeaker, and how they can be opened.

    Args:
        input_device: number or part of the name, as `device_list` says; None is the default.
        output_device: likewise.

    Raises:
        UserError: PortAudio is missing, there is no such device, or it cannot be opened.
    """
    sd = sounddevice()
    return _choose(sd, "input", input_device), _choose(sd, "output", output_device)


def _choose(sd: ModuleType, kind: str, name: str | None) -> Device:
    found = [(i, d) for i, d in enumerate(sd.query_devices()) if d[f"max_{kind}_channels"]]
    if name is None:
        default = sd.default.device[kind == "output"]
        chosen = [(i, d) for i, d in found if i == default]
    elif name.isdecimal():
        chosen = [(i, d) for i, d in found if i == int(name)]
    else:
        chosen = [(i, d) for i, d in found if name.casefold() in d["name"].casefold()]
        exact = [(i, d) for i, d in chosen if name.casefold() == d["name"].casefold()]
        chosen = exact or chosen
    if len(chosen) != 1:
        names = ", ".join(f"{i} {d['name']!r}" for i, d in chosen or found) or "none"
        wanted = f"--{kind}-device {name!r}: "
        if len(chosen) > 1:
            reason = f"more than one {KINDS[kind]} has that in its name: {names}"
        else:
            reason = f"no such {KINDS[kind]}; there are: {names}"
        if name is None:
            wanted, reason = "", f"there is no default {KINDS[kind]}; there are: {names}"
        raise UserError(f"no audio device to use: {wanted}{reason} (see --list-devices)")
    index, device = chosen[0]
    return _openable(sd, kind, index, device)


def _openable(sd: ModuleType, kind: str, index: int, device: Any) -> Device:
    """24 kHz mono if that can be had; else the device's own rate, stereo, or all its channels."""
    check = getattr(sd, f"check_{kind}_settings")
    most, reason = device[f"max_{kind}_channels"], ""
    for rate in dict.fromkeys((SAMPLE_RATE, round(device["default_samplerate"]))):
        for channels in dict.fromkeys((1, min(2, most), most)):
            try:
                check(device=index, samplerate=rate, channels=channels, dtype="float32")
            except sd.PortAudioError as error:
                reason = str(error)
            else:
                return Device(index, device["name"], rate, channels)
    raise UserError(f"the {KINDS[kind]} {device['name']!r} cannot be opened: {reason}")
