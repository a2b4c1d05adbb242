"""What is LaCT's own: chunks of zeros, rows of zeros, norms, learning, what a backward keeps."""

import itertools

import pytest
import torch

from finetune.live_bytes import kept
from moshi_ttt.ops import lact
from moshi_ttt.ops.naive import lact as naive
from tests.contract import assert_near, clone, take
from tests.ops.lact_case import (
    OPTIONS,
    assert_same_gradients,
    case,
    define,
    fast_state,
    leaves,
    outputs_and_gradients,
    params,
)


@pytest.mark.parametrize("name", ["plain", "neither", "stacked", "stacked residual"])
@pytest.mark.parametrize("silent", ["v", "lr"])
def test_a_chunk_of_zeros_writes_nothing(name, silent):
    """And its gradients are those of the definition: finite, and none through Newton-Schulz."""
    c = case(B=1, T=9, **OPTIONS[name])
    c.frames[silent][:, 0, :4] = 0  # of one head, before it has any momentum
    p = params(c)
    _, after = lact.chunk(p, lact.init_state(p, 1), **take(c.frames, slice(4)))
    for n in lact.WEIGHTS:
        assert torch.equal(getattr(after, n)[:, 0], c.W0[n][None, 0])
        assert not torch.equal(getattr(after, n)[:, 1], c.W0[n][None, 1])
    found, start = leaves(c, define(c, take(c.frames, slice(0)))[1])
    wanted_o, wanted_state = define(c, state=start)
    o, state = lact.chunk(params(c), fast_state(c, start), **c.frames)
    assert_near(o, wanted_o, 1e-11)
    grads = outputs_and_gradients(o, state, found)
    assert max(g.abs().max() for g in grads.values() if g.numel()) < 1e4
    wanted = outputs_and_gradients(wanted_o, fast_state(c, wanted_state), found)
    assert_same_gradients(grads, wanted, 1e-10)


def test_a_matrix_without_a_rate_is_not_written():
    c = case(T=4)
    c.frames["lr"][..., 1] = 0
    _, state = lact.chunk(params(c), lact.init_state(params(c), 2), **c.frames)
    assert torch.equal(state.Wu[0], c.W0["Wu"])
    assert not torch.equal(state.Wg[0], c.W0["Wg"])


def test_rows_of_zeros_pass_finite_gradients():
    """A hidden unit with no weights at all: its rows of U are 0, as its norms are."""
    c = case(T=9)
    c.W0["Wg"][:, :, 2] = 0
    c.W0["Wu"][:, :, 2] = 0
    found, start = leaves(c, define(c, take(c.frames, slice(0)))[1])
    wanted_o, wanted_state = define(c, state=start)
    o, state = lact.chunk(params(c), fast_state(c, start), **c.frames)
    assert not state.Wg[:, :, :, 2].any()
    grads = outputs_and_gradients(o, state, found)
    assert all(g.isfinite().all() for g in grads.values())
    wanted = outputs_and_gradients(wanted_o, fast_state(c, wanted_state), found)
    assert_same_gradients(grads, wanted, 1e-10)


def test_row_norms_stay_those_of_the_start():
    c = case(T=80, C=4)
    _, state = lact.chunk(params(c), lact.init_state(params(c), 2), **c.frames)
    for n in lact.WEIGHTS:
        now, start = (x.norm(dim=-1) for x in (getattr(state, n), c.W0[n][None]))
        assert_near(now, start.expand_as(now), 1e-4)
        assert not torch.allclose(getattr(state, n)[0], c.W0[n], atol=0.05)


def test_it_learns_what_repeats():
    c = case(T=4)
    p, state = params(c), lact.init_state(params(c), 2)
    losses = []
    for _ in range(10):
        losses.append(lact.inner_loss(p, state, c.frames["k"], c.frames["v"]).sum())
        _, state = lact.chunk(p, state, **c.frames)
    assert losses[-1] < losses[0] - 5
    assert all(b < a for a, b in itertools.pairwise(losses))


def test_inner_loss_is_the_definitions():
    c = case(T=9, r=2, residual=True)
    _, wanted = define(c)
    _, state = lact.chunk(params(c), lact.init_state(params(c), 2), **c.frames)
    loss = lact.inner_loss(params(c), state, c.frames["k"], c.frames["v"])
    W = {n: x[1] for n, x in wanted.W.items()}
    one = naive.inner_loss(W, c.frames["k"][1, :, 3], c.frames["v"][1, :, 3], residual=True)
    assert_near(loss[1, :, 3], one, 1e-11)


def test_no_frames_at_all():
    c = case(B=3, T=5)
    p = params(c)
    _, state = lact.chunk(p, lact.init_state(p, 3), **c.frames)
    for frames, lengths in ((take(c.frames, slice(0)), None), (c.frames, torch.zeros(3).long())):
        o, same = lact.chunk(p, state, **frames, lengths=lengths)
        assert o.shape == frames["q"].shape
        assert not o.any()
        for x, y in zip(same, state, strict=True):
            assert torch.equal(x, y)
            assert not x.numel() or x.data_ptr() != y.data_ptr()
    with pytest.raises(ValueError, match=r"0\.\.5, got \[6, 0, 0\]"):
        lact.chunk(p, state, **c.frames, lengths=torch.tensor([6, 0, 0]))


def test_lower_precision_is_raised():
    c = case(T=6, dtype=torch.bfloat16)
    p = params(c)
    state = lact.init_state(p, 2)
    assert {x.dtype for x in state[:-1]} == {torch.float32}
    exact = lact.Params(*(x.float() for x in p[:4]), *p[4:])
    frames = {n: x.float() for n, x in c.frames.items()}
    a, _ = lact.chunk(p, state, **c.frames)
    b, _ = lact.chunk(exact, state, **frames)
    assert torch.equal(a, b)
    other = clone(state)
    for t in range(6):
        one = lact.step(p, state, **take(c.frames, slice(t, t + 1)))
        assert torch.equal(one, lact.step(exact, other, **take(frames, slice(t, t + 1))))


@pytest.mark.parametrize("momentum", [True, False])
def test_the_backward_keeps_a_state_every_sqrt_n_chunks(momentum):
    c = case(B=1, H=1, T=64, D=16, width=16, C=1, momentum=momentum)
    inputs = [x.requires_grad_() for x in (*c.W0.values(), c.eta, *c.frames.values())]
    p = params(c)
    state = lact.init_state(p, 1)
    with kept([*inputs, *state]) as saved:
        o, _ = lact.chunk(p, state, **c.frames)
    assert o.requires_grad
    one = 8 * 3 * 16 * 16 * (2 if momentum else 1)
    frames = 8 * 64 * (3 * 16 + 5 + 2)
    # the marks, the packed start of the call, and the starts whose norms are taken
    assert saved.bytes <= (7 + 1) * one + frames + 10 * 8 * 16 * 16
    with torch.no_grad(), kept([]) as nothing:
        lact.chunk(p, state, **c.frames)
    assert nothing.bytes == 0


@pytest.mark.parametrize("name", ["plain", "stacked residual", "neither"])
def test_step_reads_nothing_on_the_host(name):
    """As a CUDA graph demands; on the meta device there is nothing to read."""
    c = case(T=1, **OPTIONS[name])
    p = lact.Params(*(x.to("meta") for x in params(c)[:4]), *params(c)[4:])
    state = lact.init_state(p, 2)
    frames = {n: x.to("meta") for n, x in c.frames.items()}
    for mask in (None, torch.ones(2, dtype=torch.bool, device="meta")):
        assert lact.step(p, state, **frames, exec_mask=mask).is_meta
