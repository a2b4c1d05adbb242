"""An echo is found, with its delay, and two people who talk at once are none."""

import numpy as np
import pytest

from moshi_ttt.echo import HZ, Echo, EchoMeter, Envelope
from moshi_ttt.tiny.voice import speak, voices

RATE, BLOCK = 24_000, 480
SENTENCES = (
    "the quick brown fox jumps over the lazy dog near the river bank",
    "well I think we should go there tomorrow if the weather is good",
    "what do you think about that",
    "it was a cold night in november when the train came to a stop",
)


@pytest.fixture(scope="module")
def people():
    """Three who speak for 40 s each, in their own order and with their own pauses."""
    rng, found = np.random.default_rng(0), []
    for voice in voices("train", 3):
        clips = [speak(text, voice).pcm for text in SENTENCES]
        said = [np.pad(clips[rng.integers(4)], (0, rng.integers(2 * RATE))) for _ in range(30)]
        found.append(np.concatenate(said)[: 40 * RATE].astype(np.float32))
    return found


def echoed(samples, gain, delay_ms=140, seed=0):
    """As a room with a loudspeaker and a microphone does it, with noise."""
    rng, delay = np.random.default_rng(seed), delay_ms * RATE // 1000
    room = np.zeros(delay + RATE // 10)
    room[delay] = 1
    room[delay:] += 0.05 * rng.standard_normal(RATE // 10) * np.exp(-np.arange(RATE // 10) / 400)
    size = 1 << 20
    wet = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(room, size), size)[: len(samples)]
    return (gain * wet + 1e-3 * rng.standard_normal(len(samples))).astype(np.float32)


def met(played, heard, rates=(RATE, RATE), when=lambda i: 0.02 * i, skip=()):
    """What a meter finds when both go by in blocks of 20 ms; `skip`: blocks never recorded."""
    meter = EchoMeter(*map(Envelope, rates))
    sizes = [rate // 50 for rate in rates]
    for i in range(len(played) // sizes[0]):
        meter.played.add(played[i * sizes[0] : (i + 1) * sizes[0]], when(i))
        if i not in skip:
            meter.heard.add(heard[i * sizes[1] : (i + 1) * sizes[1]], when(i))
        if i % 4 == 3:
            meter.update()
    return meter


@pytest.mark.parametrize("gain", [1.0, 0.3, 0.03])
def test_an_echo_is_found(people, gain):
    meter = met(people[0], echoed(people[0], gain))
    assert meter.worst is not None
    assert meter.worst.correlation > 0.6
    assert meter.worst.delay_ms in (140, 150)


def test_an_echo_is_found_below_another_voice(people):
    worst = met(people[0], echoed(people[0], 0.5) + people[1]).worst
    assert worst is not None
    assert worst.delay_ms in (140, 150)


def test_an_echo_in_a_conversation_of_turns(people):
    """Each for four seconds; the user's own turns do not hide the echo."""
    moshi, user = people[0].copy(), people[1].copy()
    for at in range(0, len(moshi), 8 * RATE):
        user[at : at + 4 * RATE] = 0
        moshi[at + 4 * RATE : at + 8 * RATE] = 0
    assert met(moshi, echoed(moshi, 0.1) + user).worst.correlation > 0.6
    assert met(moshi, user).worst is None


@pytest.mark.parametrize(("played", "heard"), [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)])
def test_another_voice_is_no_echo(people, played, heard):
    meter = met(people[played], people[heard] + echoed(people[heard], 0.0))
    assert meter.enough
    assert meter.worst is None
    assert meter.correlation < 0.3


def test_a_user_who_repeats_what_moshi_heard_first_is_no_echo(people):
    """What was heard before it was played: Moshi repeats the user."""
    assert met(echoed(people[0], 0.5), people[0]).worst is None


def test_a_beat_is_no_echo():
    at = np.arange(40 * RATE) / RATE
    beat = (np.sin(2 * np.pi * 200 * at) * (at % 0.5 < 0.1)).astype(np.float32)
    assert met(beat, beat).worst is None


def test_nothing_played_is_nothing_known(people):
    meter = met(np.zeros_like(people[0]), people[0])
    assert not meter.enough
    assert meter.worst is None


def test_rates_may_differ(people):
    slow = people[0].reshape(-1, 3).mean(1)  # 8 kHz
    worst = met(people[0], echoed(slow.repeat(3), 1.0).reshape(-1, 3).mean(1), (RATE, 8_000)).worst
    assert worst.delay_ms in (140, 150)


def test_a_sound_card_that_stalls_does_not_hide_the_echo(people):
    """Ten blocks were never recorded; the clock tells."""
    heard = echoed(people[0], 1.0)
    assert met(people[0], heard, skip=range(1000, 1010)).worst.correlation > 0.6
    # and a second that neither recorded nor played, as when a laptop sleeps
    meter = met(people[0], heard, when=lambda i: 0.02 * i + 3600 * (i > 1000))
    assert meter.worst.correlation > 0.6


def test_levels_go_by_the_clock():
    envelope = Envelope(22_050)
    for i in range(100):
        envelope.add(np.ones(441, np.float32), 0.02 * i)
    assert envelope.count == 2 * HZ
    envelope.add(np.ones(441, np.float32), 5.0)
    assert envelope.count == pytest.approx(5.02 * HZ, abs=2)
    assert envelope.active(100, 110).all()
    assert not envelope.active(300, 310).any()


def test_the_worst_is_kept():
    meter = EchoMeter(Envelope(RATE), Envelope(RATE))
    assert meter.worst is None
    assert Echo(0.5, 100.0) > Echo(0.4, 900.0)
