"""The sound card's side of a conversation: rates, queues, gaps, mute."""

import types

import numpy as np
import pytest

from moshi_ttt.frames import FRAME
from moshi_ttt.sound import LEAD_MS, Resampler, level_db
from tests.stream.cards import RATE, STATUS, card_of, lead_of, play, record, tone


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
