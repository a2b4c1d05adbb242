"""What can be heard to be wrong with a file, from levels alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from finetune.check.samples import FRAME_SECONDS, Array, Sound

SPEECH_SECONDS = 0.3
"""A channel with less sound than this has no speech: longer than a click, as a short "yes" is."""
SILENT_DBFS = -55.0
"""Below it is no speech: a quiet recording's syllables reach -40, a telephone line's noise -60."""
STEADY_DB = 6.0
"""Loudest 0.3 s over quietest tenth. Steady noise or hum has 1 dB, speech in loud noise 14."""
QUIET_DBFS = -45.0
"""Level of speech below which it is quiet: recordings for training lie at -35 to -15."""
SPEECH_RANGE_DB = 30.0
"""Frames this far below the loudest still belong to speech; pauses lie lower."""
IDENTICAL_CORRELATION = 0.98
"""Of left and right within 50 ms. A copy has 1, one through a codec 0.99; two voices 0."""
IDENTICAL_LEVEL_DB = 6.0
"""Of two copies, at most. A voice that leaks to the other side (crosstalk) is weaker by more."""
IDENTICAL_SHARE = 0.9
"""Of the speech: hold music or a beep on both sides of a true dialogue is less."""
CLIPPED_SHARE, BADLY_CLIPPED_SHARE = 1e-3, 1e-2
"""Of the time with speech. A peak-normalised file has 1e-5; at 1 % every loud vowel is cut flat."""
OVER_SCALE = 4.0
"""Largest sample of a float file: mixing goes over 1 by a little, 16-bit integers by 32768."""
LISTENING_SECONDS = 60.0
"""In a stereo recording shorter than this Moshi may well do nothing but listen: of a telephone call
cut into pieces of 20 s, a sixth have a silent side, of 60 s none."""
DC_OFFSET = 0.02
"""Mean of the samples, of full scale: cheap sound cards have 0.005."""
LOWEST_RATE = 16_000
"""Hz. Below it is telephone sound, which Moshi would learn to speak in."""


def channel_name(channel: int, channels: int) -> str:
    """What a person calls it."""
    return "the channel" if channels == 1 else ("left (Moshi)", "right (user)")[channel]


def decibels(power: float) -> float:
    """Of a mean square; -120 at the least."""
    return 10 * float(np.log10(max(power, 1e-12)))


def loudest(power: Array) -> float:
    """Level in dBFS that a channel `[F]` reaches for 0.3 s in all, or for as long as it is."""
    frames = min(len(power), round(SPEECH_SECONDS / FRAME_SECONDS))
    return decibels(float(np.partition(power, -frames)[-frames]))


def is_silent(power: Array) -> bool:
    """Whether a channel `[F]` has no speech: nothing, next to nothing, or steady noise."""
    top = loudest(power)
    return top < SILENT_DBFS or top - decibels(float(np.quantile(power, 0.1))) < STEADY_DB


def speech_power(power: Array) -> float:
    """Mean power of the frames of a channel `[F]` in which there is speech."""
    return float(power[_speech(power)].mean())


def _speech(power: Array) -> NDArray[np.bool_]:
    return power >= power.max() * 10 ** (-SPEECH_RANGE_DB / 10)


def listen(sound: Sound) -> Iterator[tuple[str, str]]:
    """Kind and detail of each finding."""
    if sound.first_not_finite is not None:
        index, channel = sound.first_not_finite
        name = channel_name(channel, sound.channels)
        yield "not finite", f"{sound.not_finite} of its samples; the first is {index} of {name}"
    if sound.sample_rate < LOWEST_RATE:
        yield "low sample rate", f"{sound.sample_rate} Hz"
    identical = same_share(sound)
    if identical >= IDENTICAL_SHARE:
        yield (
            "identical channels",
            f"left and right are one signal in {identical:.0%} of the speech",
        )
    for channel in range(sound.channels):
        for kind, detail in _listen_to(sound, channel):
            yield kind, f"{channel_name(channel, sound.channels)} {detail}"


def _listen_to(sound: Sound, channel: int) -> Iterator[tuple[str, str]]:
    power, peak = sound.power[:, channel], sound.peak[channel]
    if peak > OVER_SCALE:
        yield "scale", f"reaches {peak:.0f}, and 1 is full scale"
        return
    if abs(sound.mean[channel]) > DC_OFFSET:
        yield "DC offset", f"is {sound.mean[channel]:+.3f} on average"
    if is_silent(power):
        loud = loudest(power)
        how = "is silent" if loud < SILENT_DBFS else "has only steady noise or hum"
        yield _silence(sound, channel), f"{how} ({loud:.0f} dBFS)"
        return
    level = decibels(speech_power(power))
    if level < QUIET_DBFS:
        yield "quiet", f"has speech at {level:.0f} dBFS"
    clipped = sound.full_scale[channel] / (_speech(power).sum() * FRAME_SECONDS)
    if clipped >= CLIPPED_SHARE:
        kind = "badly clipped" if clipped >= BADLY_CLIPPED_SHARE else "clipped"
        yield kind, f"is at full scale in {clipped:.2%} of its speech"


def _silence(sound: Sound, channel: int) -> str:
    if channel == 1:
        return "user silent"
    listens = sound.channels == 2 and sound.seconds < LISTENING_SECONDS
    return "only listens" if listens and not is_silent(sound.power[:, 1]) else "silent"


def same_share(sound: Sound) -> float:
    """Share of the speech, of either side, in which left and right are the same; 0 where mono.

    The same is a copy, also one turned over, with another gain or through a codec.
    """
    if sound.channels == 1 or is_silent(sound.power.max(1)):
        return 0.0
    speech = _speech(sound.power.max(1))
    left, right = sound.power[speech].T + 1e-12
    alike = np.abs(sound.cross[speech]) > IDENTICAL_CORRELATION * np.sqrt(left * right)
    close = np.abs(10 * np.log10(left / right)) < IDENTICAL_LEVEL_DB
    return float((alike & close).mean())
