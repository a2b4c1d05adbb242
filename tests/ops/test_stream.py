"""The streamed frame of TTT memories: slices are masks, and a row's numbers are its own."""

import pytest
import torch

from moshi_ttt.ops import stream
from tests.contract import Memory, make_frames, make_slow, params, run_naive
from tests.contract import stream as streamed

every_kind = pytest.mark.parametrize("name", ["ttt_linear", "ttt_mlp"])
B, T = 4, 21


def at_random(seed=0):
    """`[B, T]` bool: a row without pauses, and three that stand elsewhere and pause."""
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[0] = True
    return mask


@every_kind
@pytest.mark.parametrize("write_every", [1, 2])
@pytest.mark.parametrize("kind", [stream._Sliced, stream._Masked])
def test_slices_and_masks_are_the_definition(name, write_every, kind, monkeypatch):
    """Masks are what a GPU takes; here both are held to the definition, rows apart."""
    monkeypatch.setattr(stream, "_Sliced", kind)
    memory = Memory(name, {"write_every": write_every})
    slow, frames, mask = make_slow(memory), make_frames(memory, B=B, T=T), at_random()
    out, state = streamed(memory, slow, frames, exec_mask=mask)
    for row in range(B):
        there = {n: x[row : row + 1, :, mask[row]] for n, x in frames.items()}
        wanted, _ = run_naive(memory, slow, there)
        assert (out[row : row + 1, :, mask[row]] - wanted).abs().max() < 1e-12
    assert state.pos.tolist() == mask.sum(1).tolist()


@every_kind
def test_a_row_is_the_same_to_the_bit_whatever_the_others_do(name):
    memory = Memory(name)
    more = {"H": 2, "D": 16, "dtype": torch.float32}
    slow = make_slow(memory, C=4, **more)
    frames = make_frames(memory, B=B, T=T, **more)
    together, _ = streamed(memory, slow, frames)
    for seed in range(3):
        apart, state = streamed(memory, slow, frames, exec_mask=at_random(seed))
        assert len(set(state.pos.tolist())) > 1
        assert torch.equal(apart[0], together[0])


@every_kind
def test_a_step_in_which_nobody_has_a_frame_changes_nothing(name):
    memory = Memory(name)
    slow, frames = make_slow(memory), make_frames(memory, T=1)
    state = memory.op.init_state(params(memory, slow), 2)
    before = [x.clone() for x in state]
    nobody = torch.zeros(2, 1, dtype=torch.bool)
    out, after = streamed(memory, slow, frames, state, nobody)
    assert bool(out.isfinite().all())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
