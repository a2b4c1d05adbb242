"""The engine is moshi's own loop."""

import types

import numpy as np
import pytest
import torch
from moshi.run_inference import InferenceState

from moshi_ttt.codec import encode_recording
from moshi_ttt.engine import Engine, Sampling, memory_norms
from moshi_ttt.frame_times import FrameTimes
from moshi_ttt.frames import FRAME
from moshi_ttt.reporter import statistics
from moshi_ttt.ring import widen_kv_rings
from tests.small import small_mimi, small_tokenizer
from tests.stream.streams import engine_for, hybrid, noise, run


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
