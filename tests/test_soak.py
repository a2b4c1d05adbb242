"""Soaks: short ones that must come through, and what they must see if it were there."""

import json
import math

import numpy as np
import pytest
import torch

from eval.bench import soak, soak_watch
from eval.bench.soak_crowd import soak_sessions
from eval.bench.soak_runs import engine_twin, soak_codes, soak_engine, speech
from eval.bench.soak_watch import Twin, Watch, Window, resident_bytes
from moshi_ttt.errors import UserError, run_cli
from moshi_ttt.models import Talker
from tests.small import small_base, small_hybrid, small_lm, small_mimi, small_tokenizer

CARD = small_tokenizer().vocab_size()
CPU = torch.device("cpu")
GROWN = 1.05  # of a process that has just begun


def talker(lm=None):
    lm = lm or small_hybrid(lm={"text_card": CARD})
    return Talker(lm, small_mimi(), small_tokenizer(), {}, "small")


def check(found, frames, windows):
    assert found["frames"] == frames
    assert found["finite"], found["bad"]
    assert found["grown"] < GROWN
    assert len(found["windows"]) == windows
    assert all(0 < w["ms"] <= 2 * w["wall_ms"] for w in found["windows"])


def test_minutes_of_codes():
    found = soak_codes(talker(), frames=1800, window=600)
    check(found, 1800, 3)
    assert found["windows"][0]["age"] == pytest.approx(1, abs=0.7)
    assert 0 < found["nats a frame of codebook 0"] < 10


def test_a_minute_of_the_engine():
    found = soak_engine(talker(), frames=120, window=40)
    check(found, 120, 3)
    assert found["windows"][0]["age"] == pytest.approx(1, abs=0.7)
    assert 0 <= found["frames that repeat the one before"] < 1


def test_a_model_without_a_memory_is_soaked_too():
    check(soak_engine(talker(small_lm(text_card=CARD).eval()), frames=45, window=15), 45, 3)


def test_conversations_that_come_and_go(monkeypatch):
    for name in ("PAUSES", "RESTARTS", "KEEPS", "LEAVES", "KNOCKS"):
        monkeypatch.setattr(f"eval.bench.soak_crowd.{name}", 0.04)
    monkeypatch.setattr("eval.bench.soak_crowd.COMES", 0.3)
    monkeypatch.setattr("eval.bench.soak_crowd.FRAME_MS", 20.0)  # faster than real time
    found = soak_sessions(talker(), rows=3, frames=240, window=80)
    check(found, 240, 3)
    happened = found["happened"]
    assert happened["came"] == happened["left"] > 3
    for what in ("came with a memory", "turned away", "paused", "started over", "memory kept"):
        assert happened[what] > 0, what
    assert 0 < happened["frames said"] <= 3 * found["steps"]


def test_a_memory_that_is_no_number_is_seen():
    lm = small_hybrid(lm={"text_card": CARD})
    lm.transformer.layers[0].seq_modeling_block.memory.W1.data[:] = math.nan
    found = soak_engine(talker(lm), frames=36, window=12)
    assert not found["finite"]
    assert any("started over" in bad for bad in found["bad"])


def test_sound_that_is_no_number_is_seen_with_its_place():
    watch = Watch(CPU, Twin(lambda: None, lambda: None))
    watch.frames = 7
    watch.finite("sound", torch.tensor([1.0, 2.0]), torch.tensor([3]))
    assert not watch.bad
    watch.finite("sound", torch.tensor([1.0, math.inf]))
    assert watch.bad == ["sound, frame 7"]


def windows(**last):
    """Three windows, the last with values of its own."""
    same = {"frames": 1, "age": 1.1, "ms": 2.0, "wall_ms": 3.0, "resident": 1000, "cuda": 0}
    return [Window(**same), Window(**same), Window(**{**same, **last})]


@pytest.mark.parametrize(
    ("last", "broken"),
    [
        ({}, None),
        ({"age": 1.15, "resident": 1010}, None),
        ({"ms": 9.0, "wall_ms": 99.0}, None),  # the machine has other work
        ({"age": 1.17}, "steady"),
        ({"resident": 1011}, "flat"),
        ({"cuda": 5}, "flat"),
    ],
)
def test_what_grows_or_slows_is_told_from_what_does_not(last, broken):
    watch = Watch(CPU, Twin(lambda: None, lambda: None), windows=windows(**last))
    found = watch.result()
    assert [name for name in ("flat", "steady", "finite") if not found[name]] == (
        [broken] if broken else []
    )


def test_a_step_that_slows_down_is_told_from_a_machine_that_does():
    """The twin makes up for the machine, not for age."""
    work, age = 1, 1

    def burn(units):
        for _ in range(units):
            np.linalg.svd(np.ones((24, 24)))

    watch = Watch(CPU, Twin(lambda: burn(10 * work), lambda: None), twin_every=1)
    step = watch.timed(lambda pcm, mask: burn(10 * work * age))
    for work, age in ((1, 1), (1, 1), (4, 1), (1, 2)):  # noqa: B007
        for _ in range(15):
            step(None)
        watch.close_window()
    relative = [w.age / watch.windows[1].age for w in watch.windows]
    assert relative[2] == pytest.approx(1, abs=0.3)
    assert relative[3] == pytest.approx(2, abs=0.6)


def test_the_twin_is_renewed_in_every_window_and_no_other_time():
    renewed = []
    watch = Watch(CPU, Twin(lambda: None, lambda: renewed.append(watch.frames)), twin_every=2)
    step = watch.timed(lambda pcm, mask: None)
    for n in range(40):
        watch.frames = n
        step(None)
        if n % 10 == 9:
            watch.close_window()
    assert renewed == [11, 21, 31]


def test_the_twin_of_an_engine_shares_its_weights_but_not_its_stream():
    from contextlib import ExitStack

    own = talker()
    with ExitStack() as stack:
        twin = engine_twin(stack, own, 2, torch.randn(5, 1920))
        assert not own.lm.is_streaming
        for _ in range(7):
            twin.step()
        twin.renew()
    with pytest.raises(ValueError, match="too few"):
        Watch(CPU, twin).result()


def test_resident_bytes_follow_what_is_held():
    before = resident_bytes()
    held = np.ones(50_000_000 // 8)
    assert resident_bytes() - before > 0.8 * held.nbytes


def test_speech_is_two_channels_and_as_long_as_asked():
    found = list(speech(0.2))
    assert [x.shape[0] for x in found] == [2]
    assert all(x.abs().max(1).values.min() > 0.05 for x in found)


def test_the_command_writes_a_part_and_leaves_the_others(tmp_path, monkeypatch):
    base = small_base(tmp_path / "base")
    common = ["--base", str(base), "--device", "cpu", "--out", str(tmp_path)]
    (tmp_path / "soak.json").write_text(json.dumps({}))
    monkeypatch.setattr(soak_watch, "STEADY", 9.0)  # this machine has other work
    monkeypatch.setattr(soak_watch, "FLAT", 0.5)
    for part in (["--codes", "0.02", "--window", "24"], ["--engine", "0.001", "--window", "0.8"]):
        soak.main([*part, *common])
    parts = json.loads((tmp_path / "soak.json").read_text())
    assert list(parts) == ["codes", "engine"]
    assert all(part["finite"] and len(part["windows"]) >= 3 for part in parts.values())
    text = (tmp_path / "soak.md").read_text()
    for words in ("## codes", "## engine", "all finite", "- command: python -m eval.bench.soak"):
        assert words in text


def test_a_broken_promise_ends_in_status_1(tmp_path, monkeypatch, capsys):
    base = small_base(tmp_path / "base")
    monkeypatch.setattr(soak_watch, "FLAT", -0.5)
    with pytest.raises(SystemExit) as stopped:
        soak.main(["--engine", "0.001", "--base", str(base), "--device", "cpu", "--out",
                   str(tmp_path), "--window", "0.8"])  # fmt: skip
    assert stopped.value.code == 1
    assert "MEMORY GREW" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "match"),
    [
        ([], "required"),
        (["--codes", "1", "--engine", "1"], "not allowed"),
        (["--codes", "0"], "--codes must be positive"),
        (["--engine", "nan"], "--engine must be positive"),
        (["--engine", "1", "--minutes", "3"], "--minutes belongs to --sessions"),
        (["--engine", "0.02"], "three windows"),
        (["--engine", "1", "--window", "0.01"], "three windows"),
    ],
)
def test_a_wrong_option_is_one_line(typed, match, capsys):
    with pytest.raises(UserError, match=match):
        soak.main(typed)
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: soak.main(typed))
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "typed", [["--codes", "10"], ["--engine", "1"], ["--sessions", "8", "--minutes", "20"]]
)
def test_hours(typed, tmp_path):
    """On the embedded base, with a memory if a checkpoint is there."""
    soak.main([*typed, "--out", str(tmp_path)])
