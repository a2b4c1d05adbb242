"""A conversation saved and loaded goes on to the bit; a memory alone starts a new one."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moshi_ttt import session
from moshi_ttt.engine import Engine, Sampling, memory_norms
from moshi_ttt.memory import MEMORIES
from moshi_ttt.saved_memory import load_memory, save_memory
from moshi_ttt.session import load_session, save_session
from moshi_ttt.states import save_ttt_states
from tests.session.sessions import CUT, engine_for, first_logits, run, same, snapshot
from tests.small import small_mimi, small_tokenizer
from tests.stream.streams import hybrid, noise

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("device", DEVICES)
def test_a_loaded_session_goes_on_to_the_bit(tmp_path, device, greedy, rows):
    sampling, frames, path = Sampling(greedy=greedy), noise(CUT + 9, rows), tmp_path / "s"

    def start(seed):
        models = hybrid().to(device), small_mimi().to(device)
        return Engine(*models, small_tokenizer(), sampling=sampling, rows=rows, seed=seed)

    with start(3) as engine:
        fresh = snapshot(engine)
        run(engine, frames[:CUT])
        save_session(engine, path)
        moved = snapshot(engine)
        wanted = run(engine, frames[CUT:])
    still = [k for k in fresh[0] if torch.equal(fresh[0][k], moved[0][k]) and fresh[0][k].numel()]
    assert all(k.endswith((".exec_mask", ".first", ".initial")) for k in still)
    with start(4) as engine:
        run(engine, noise(3, rows))
        places = {k: v.data_ptr() for k, v in session._split(session._live(engine))[0].items()}
        load_session(engine, path)
        assert same(snapshot(engine), moved)
        assert engine.frames == CUT
        after = session._split(session._live(engine))[0]
        assert {k: v.data_ptr() for k, v in after.items()} == places  # as a CUDA graph needs it
        again = run(engine, frames[CUT:])
    assert torch.equal(again[0], wanted[0])
    assert torch.equal(again[1], wanted[1])
    assert session.session_sampling(path) == sampling
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_what_is_left_out_of_a_session_would_be_missed(tmp_path):
    """With any part of it as in a fresh stream, another voice speaks."""
    frames, path = noise(CUT + 6), tmp_path / "s"
    with engine_for(seed=3) as engine:
        fresh = session._split(session._live(engine))[0]
        fresh = {k: v.clone() for k, v in fresh.items()} | {"rng.cpu": torch.get_rng_state()}
        run(engine, frames[:CUT])
        save_session(engine, path)
        wanted = run(engine, frames[CUT:])
        with safe_open(path, "pt") as file:
            metadata, saved = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}
        for part in (
            "mimi",
            "gen",
            "lm.transformer.layers.0.self_attn",
            "seq_modeling_block",
            "rng",
        ):
            mixed = {k: fresh[k] if part in k else v for k, v in saved.items()}
            save_file(mixed, path, metadata)
            load_session(engine, path)
            assert not torch.equal(run(engine, frames[CUT:])[0], wanted[0]), part


def test_a_value_of_unknown_kind_is_an_error():
    with engine_for() as engine:
        engine.gen._streaming_state.surprise = {"a": 1}
        with pytest.raises(TypeError, match=r"gen\.surprise is a dict"):
            session._live(engine)


@pytest.mark.parametrize("family", list(MEMORIES))
def test_a_kept_memory_starts_another_conversation(tmp_path, family):
    path, frame = tmp_path / "m", noise(1)[0]
    with engine_for(hybrid(memory=family), seed=3) as engine:
        run(engine, noise(CUT))
        save_memory(engine, path)
        kept = save_ttt_states(engine.lm)
        norms = memory_norms(engine.lm)
    with engine_for(hybrid(memory=family), seed=3) as engine:
        fresh = first_logits(engine, frame)
    with engine_for(hybrid(memory=family), seed=3) as engine:
        before = save_ttt_states(engine.lm)
        load_memory(engine, path)
        now = save_ttt_states(engine.lm)
        assert memory_norms(engine.lm) == norms
        other = first_logits(engine, frame)
    assert (fresh - other).abs().max() > 1e-3
    for block, state in kept.items():
        tensors = state["streaming"]
        assert tensors["fast.pos"].item() % 4  # in the middle of a chunk
        assert all(torch.equal(t, now[block]["streaming"][n]) for n, t in tensors.items())
        for n, t in tensors.items():
            assert not t.numel() or not torch.equal(t, before[block]["streaming"][n]), n
