"""Rows of one engine: each comes, pauses, goes and is moved without the others noticing a bit."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moshi_ttt.engine import Engine, Sampling, memory_norms
from moshi_ttt.errors import UserError
from moshi_ttt.memory import MEMORIES
from moshi_ttt.saved_memory import (
    check_memory,
    load_memory,
    put_memory,
    read_memory,
    save_memory,
    take_memory,
)
from moshi_ttt.session import load_session, save_session
from moshi_ttt.states import ttt_blocks
from tests.small import small_hybrid, small_mimi, small_tokenizer

CARD = small_tokenizer().vocab_size()
FRAME = 1920
T = 40  # twice the attention window


def hybrid(**config):
    return small_hybrid(lm={"text_card": CARD}, **config)


def engine_for(lm=None, device="cpu", **options):
    lm = (lm or hybrid()).to(device)
    return Engine(lm, small_mimi().to(device), small_tokenizer(), **{"rows": 4} | options)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def noise(frames, rows=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(frames, rows, 1, FRAME, generator=generator)


def said(engine, frame, mask=None):
    """Copies: voice [B, 1920] and tokens [B, 9]."""
    out = engine.step(frame, mask)
    return out.pcm.clone(), out.tokens.clone()


def only(*rows):
    return np.isin(np.arange(4), rows)


class Logits:
    """Of the text, as they come by."""

    def __init__(self, engine):
        self.seen = []
        engine.gen.on_text_logits_hook = lambda logits: self.seen.append(logits.clone())


@pytest.mark.parametrize("family", list(MEMORIES))
@pytest.mark.parametrize("device", DEVICES)
def test_what_other_rows_do_is_not_noticed(tmp_path, device, family):
    """Row 0 and 3 talk; 1 and 2 are started, paused, saved, loaded, broken: to the bit the same."""
    frames, sampling = noise(T), Sampling()
    with engine_for(hybrid(memory=family), device, sampling=sampling, seed=5) as engine:
        quiet = [said(engine, f) for f in frames]
    with engine_for(hybrid(memory=family), device, sampling=sampling, seed=5) as engine:
        loud = []
        for t, frame in enumerate(frames):
            mask = (
                only(0, 3) if t % 7 in (2, 3) else only(0, 2, 3) if t % 5 == 1 else only(*range(4))
            )
            if t in (3, 20):
                engine.start(only(1))
            if t == 9:
                save_memory(engine, tmp_path / "m", 2)
                save_session(engine, tmp_path / "s", 1)
            if t == 13:
                load_memory(engine, tmp_path / "m", 1)
            if t == 25:
                engine.start(only(2, 1))
                load_session(engine, tmp_path / "s", 2)
            if t == 30:
                frame = frame.clone()
                frame[1], frame[2] = torch.nan, torch.inf
            if t == 33:
                for block in ttt_blocks(engine.lm).values():
                    block._streaming_state.memory.fast[0][1] = torch.nan
            loud.append(said(engine, frame, mask))
        assert engine.diverged.tolist() == [0, 1, 0, 0]
    for (pcm, tokens), (pcm2, tokens2) in zip(quiet, loud, strict=True):
        for row in (0, 3):
            assert torch.equal(pcm[row], pcm2[row])
            assert torch.equal(tokens[row], tokens2[row])
    assert any(not torch.equal(a[0][1], b[0][1]) for a, b in zip(quiet, loud, strict=True))


def test_a_paused_row_goes_on_as_if_no_time_had_passed():
    frames = noise(T)
    with engine_for(sampling=Sampling(greedy=True)) as engine:
        whole = [said(engine, f) for f in frames]
    with engine_for(sampling=Sampling(greedy=True)) as engine:
        heard, parts = 0, []
        for t in range(T + 12):
            goes_on = not 10 <= t < 22
            frame = noise(1, seed=t + 1)[0]
            if goes_on:
                frame[1] = frames[heard, 1]
                heard += 1
            pcm, tokens = said(engine, frame, only(0, 1, 2, 3) if goes_on else only(0, 2))
            if goes_on:
                parts.append((pcm[1], tokens[1]))
            else:
                assert not pcm[1].any()
                assert bool((tokens[1] == -2).all())
    for (pcm, tokens), (pcm2, tokens2) in zip(whole, parts, strict=True):
        assert torch.equal(tokens[1], tokens2)
        assert torch.equal(pcm[1], pcm2)


@pytest.mark.parametrize("family", ["ttt_mlp", "lact"])
def test_a_row_moved_to_another_batch_goes_on(tmp_path, family):
    """Into another place of another engine with another number of rows."""
    frames, sampling = noise(T), Sampling(greedy=True)
    with engine_for(hybrid(memory=family), sampling=sampling) as engine:
        for frame in frames[:25]:
            engine.step(frame)
        save_session(engine, tmp_path / "s", 2)
        seen = Logits(engine)
        wanted = [said(engine, f) for f in frames[25:]]
    with engine_for(hybrid(memory=family), sampling=sampling, rows=3, seed=9) as engine:
        for frame in noise(6, rows=3, seed=1):
            engine.step(frame)
        load_session(engine, tmp_path / "s", 1)
        save_session(engine, tmp_path / "again", 1)
        moved = Logits(engine)
        elsewhere = noise(T - 25, rows=3, seed=2)
        elsewhere[:, 1] = frames[25:, 2]
        got = [said(engine, f) for f in elsewhere]
    one, two = load_file(tmp_path / "s"), load_file(tmp_path / "again")
    assert all(torch.equal(one[k], two[k]) for k in one if not k.startswith("rng"))
    for a, b in zip(seen.seen, moved.seen, strict=True):
        assert torch.allclose(a[2], b[1], 1e-4, 1e-5)
        assert not torch.allclose(a[1], b[1], 1e-1, 1e-1)
    for (pcm, tokens), (pcm2, tokens2) in zip(wanted, got, strict=True):
        assert torch.equal(tokens[2], tokens2[1])
        assert torch.allclose(pcm[2], pcm2[1], 1e-3, 1e-5)


def test_a_row_that_is_only_starting_is_saved_as_such(tmp_path):
    frames, sampling = noise(12), Sampling(greedy=True)
    with engine_for(sampling=sampling) as engine:
        engine.start(only(1))
        save_session(engine, tmp_path / "s", 1)
        wanted = [said(engine, f) for f in frames]
    with engine_for(sampling=sampling) as engine:
        for frame in noise(5, seed=1):
            engine.step(frame)
        load_session(engine, tmp_path / "s", 1)
        assert engine.starting.tolist() == [False, True, False, False]
        got = [said(engine, f) for f in frames]
        assert not engine.starting.any()
    assert all(torch.equal(a[1][1], b[1][1]) for a, b in zip(wanted, got, strict=True))


def test_a_memory_goes_from_row_to_row(tmp_path):
    with engine_for() as engine:
        for frame in noise(10):
            engine.step(frame)
        saved = take_memory(engine, 3)
        before = {n: t.clone() for n, t in saved.tensors.items()}
        assert saved.frames == 11  # with the step at position 0
        for frame in noise(3, seed=1):
            engine.step(frame)
        assert all(torch.equal(t, saved.tensors[n]) for n, t in before.items())
        engine.start(only(0))
        engine.diverged[0] = 2
        put_memory(engine, saved, 0)
        assert not engine.diverged.any()  # the one before was another
        again = take_memory(engine, 0)
        assert all(torch.equal(t, again.tensors[n]) for n, t in saved.tensors.items())
        saved.write(tmp_path / "m")
        assert read_memory(tmp_path / "m").frames == 11


def test_a_memory_that_is_not_finite_is_neither_kept_nor_put(tmp_path):
    with engine_for() as engine:
        saved = take_memory(engine, 1)
        saved.tensors[next(iter(saved.tensors))][..., 0] = torch.inf
        with pytest.raises(UserError, match=r"was not saved: .* is not finite"):
            saved.write(tmp_path / "m")
        assert not list(tmp_path.iterdir())
        with pytest.raises(UserError, match="the memory is broken"):
            check_memory(engine, saved)


@pytest.mark.parametrize("family", list(MEMORIES))
@pytest.mark.parametrize("device", DEVICES)
def test_a_memory_that_diverges_starts_over_and_spoils_nothing_else(device, family):
    with engine_for(hybrid(memory=family), device, rows=1) as engine:
        for t, frame in enumerate(noise(T, rows=1)):
            if t == 20:
                block = next(iter(ttt_blocks(engine.lm).values()))
                for tensor in block._streaming_state.memory.fast[:2]:
                    tensor.fill_(torch.inf)
            pcm, _ = said(engine, frame)
            assert bool(pcm.isfinite().all())
        assert engine.diverged.tolist() == [1]
        norms = memory_norms(engine.lm)
        assert all(0 < norm < 1e6 for norm in norms.values())
        for module in engine.lm.modules():
            state = getattr(module, "_streaming_state", None)
            if hasattr(state, "kv_cache"):
                assert bool(state.kv_cache.cache.isfinite().all())


def test_buffers_are_the_same_from_frame_to_frame():
    with engine_for() as engine:
        places = set()
        for frame in noise(6):
            out = engine.step(frame, only(0, 2))
            places.add((out.pcm.data_ptr(), out.tokens.data_ptr(), engine._in.data_ptr()))
        assert len(places) == 1
