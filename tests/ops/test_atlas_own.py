"""What Atlas has of its own: the past, memory, dtypes, nothing to learn, the host."""

import itertools
from collections import Counter

import pytest
import torch

from moshi_ttt.ops import atlas
from moshi_ttt.ops.naive import atlas as naive
from tests.ops.atlas_case import (
    B,
    H,
    define,
    error,
    every_kind,
    make,
    make_frames,
    stream,
    take,
)
from tests.test_graphable import OnlyOnMeta


@every_kind
def test_the_past_does_not_see_the_future(deep, phi, muon):
    p, frames = make(deep, phi, muon), make_frames(11)
    start = atlas.init_state(p, B)
    for t in (0, 3, 6, 10):
        changed = {n: x.clone() for n, x in frames.items()}
        for x in changed.values():
            x[:, :, t] += 0.1
        a, b = (atlas.chunk(p, start, **f)[0] for f in (frames, changed))
        assert torch.equal(a[:, :, :t], b[:, :, :t])
        assert not torch.equal(a[:, :, t], b[:, :, t])


class Kept:
    """The memory that a call keeps for its backward, and that backward for its own, at its peak."""

    def __init__(self):
        self.count, self.now, self.peak = Counter(), 0, 0

    def pack(self, x):
        kept, storage = self, x.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()

        class Saved:
            def __init__(self):
                self.x = x
                kept.count[key] += 1
                kept.now += size * (kept.count[key] == 1)
                kept.peak = max(kept.peak, kept.now)

            def __del__(self):
                kept.count[key] -= 1
                kept.now -= size * (kept.count[key] == 0)

        return Saved()


@pytest.mark.parametrize("muon", [False, True])
def test_a_long_call_keeps_the_root_of_its_states(muon):
    p, wide = make(muon=muon, C=1, c=1), 32
    W1, W2 = torch.randn(H, wide, wide), 0.1 * torch.randn(H, wide, 2 * wide)
    p = p._replace(W1=W1.requires_grad_(), W2=W2, coef=torch.ones(H, 2))
    state = 2 * B * H * wide * 3 * wide * 4  # M and S

    def states(T):
        kept, frames = Kept(), make_frames(T, dtype=torch.float32)
        frames |= {n: torch.randn(B, H, T, wide) for n in "qkv"}
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda saved: saved.x):
            atlas.chunk(p, atlas.init_state(p, B), **frames)[0].sum().backward()
        return kept.peak / state

    few, many = states(16), states(256)
    assert many < 5 * few
    assert many < 3 * 16


@pytest.mark.parametrize("muon", [False, True])
def test_float32_streamed_is_float32_chunked(muon):
    p, frames = make(muon=muon, dtype=torch.float32), make_frames(41, dtype=torch.float32)
    start = atlas.init_state(p, B)
    chunked, streamed = atlas.chunk(p, start, **frames)[0], stream(p, start, frames)[0]
    exact = define(make(muon=muon), make_frames(41))[0]
    assert (chunked - streamed).abs().max() <= 1e-5
    assert (chunked - exact).abs().max() <= 1e-5


@pytest.mark.parametrize("muon", [False, True])
def test_lower_precision_is_raised_and_float32_is_kept(muon):
    p, frames = make(muon=muon, dtype=torch.bfloat16), make_frames(6, dtype=torch.bfloat16)
    start = atlas.init_state(p, B)
    o, state = atlas.chunk(p, start, **frames)
    streamed = stream(p, start, frames)[0]
    assert {x.dtype for x in (o, streamed, *state[:-1])} == {torch.float32}
    assert (o - streamed).abs().max() <= 1e-5


@every_kind
def test_nothing_to_learn_leaves_the_start_and_its_gradients_finite(deep, phi, muon):
    p, frames = make(deep, phi, muon), make_frames(9)
    frames["gamma"] = torch.zeros_like(frames["gamma"]).requires_grad_()
    frames["alpha"] = torch.ones_like(frames["alpha"])
    start = atlas.init_state(p._replace(W1=p.W1.requires_grad_()), B)
    o, state = atlas.chunk(p, start, **frames)
    assert torch.equal(state.W1, start.W1)
    assert all(x.isfinite().all() for x in torch.autograd.grad(o.sum(), [p.W1, frames["gamma"]]))
    stepped = stream(p, start, frames)[1]
    assert torch.equal(stepped.W1, start.W1)


def test_a_state_has_its_own_memory_and_a_step_writes_in_it():
    for deep in (True, False):
        p, frames = make(deep), make_frames(3)
        for state in (
            atlas.init_state(p, B),
            atlas.chunk(p, atlas.init_state(p, B), **frames)[1],
            atlas.chunk(p, atlas.init_state(p, B), **take(frames, 0, 0))[1],
            atlas.chunk(p, atlas.init_state(p, B), **frames, lengths=torch.tensor([3, 0]))[1],
        ):
            places = [x.untyped_storage().data_ptr() for x in state if x.numel()]
            assert len(set(places)) == len(places)
            assert all(x.is_contiguous() for x in state)
            atlas.step(p, state, **take(frames, 0, 1))
            assert places == [x.untyped_storage().data_ptr() for x in state if x.numel()]


@every_kind
def test_inner_loss_is_that_of_the_definition(deep, phi, muon):
    p, frames = make(deep, phi, muon), make_frames(4)
    state = atlas.chunk(p, atlas.init_state(p, B), **frames)[1]
    loss = atlas.inner_loss(p, state, frames["k"], frames["v"])
    assert loss.shape == (B, H, 4)
    for b, t in itertools.product(range(B), range(4)):
        W = {n: getattr(state, n)[b] for n in ("W1", "W2") if getattr(p, n) is not None}
        k, v = (frames[n][b, :, t] for n in "kv")
        assert error(loss[b, :, t], naive.inner_loss(W, p.coef, p.proj, k, v)) <= 1e-13


@every_kind
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_reads_nothing_on_the_host(deep, phi, muon, masked):
    p = make(deep, phi, muon)
    p = p._replace(**{n: x.to("meta") for n, x in p._asdict().items() if torch.is_tensor(x)})
    frames = {n: x.to("meta") for n, x in make_frames(1).items()}
    with OnlyOnMeta():
        state = atlas.init_state(p, B)
        mask = torch.ones(B, dtype=torch.bool, device="meta") if masked else None
        atlas.step(p, state, **frames, exec_mask=mask)
