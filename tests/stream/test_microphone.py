"""A talk by microphone, and what may fail in it."""

import sys

import numpy as np
import pytest

from moshi_ttt import loops, reporter
from moshi_ttt.engine import Engine
from moshi_ttt.errors import UserError
from moshi_ttt.loops import talk
from moshi_ttt.stream import main
from tests.small import small_hybrid, small_mimi, small_tokenizer
from tests.stream.cards import RATE, FakeSoundDevice, card_of, tone
from tests.stream.streams import noise


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
