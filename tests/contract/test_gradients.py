"""What holds for every memory: outer gradients are those through its definition."""

import pytest
import torch
from torch.utils import _pytree as pytree

from tests.contract import (
    fast_state,
    live,
    make_frames,
    make_slow,
    params,
)
from tests.contract.cases import (
    a_state,
    assert_same_gradients,
    every_memory,
    gradients,
    period,
)


@every_memory
@pytest.mark.parametrize("C", [1, 4, 16])
def test_outer_gradients_are_double_backward_through_the_definition(memory, C):
    T = 2 * period(memory, C) + C // 2 + 1
    slow, frames = make_slow(memory, C=C), make_frames(memory, T=T)
    actual, expected = (gradients(memory, slow, frames, None, f) for f in ("fast", "naive"))
    assert_same_gradients(memory, actual, expected)


@every_memory
@pytest.mark.parametrize("lengths", [None, [8, 3]])
@pytest.mark.parametrize("at", [[6, 3], [6, 2]])  # [6, 2]: one place, but of different chunks
def test_outer_gradients_of_a_carried_state(memory, at, lengths):
    slow, frames = make_slow(memory), make_frames(memory, T=8)
    start = a_state(memory, slow, at)
    actual, expected = (
        gradients(memory, slow, frames, start, f, lengths) for f in ("fast", "naive")
    )
    # of a first chunk the momentum gate; of Atlas what the definition's state has twice
    assert_same_gradients(memory, actual, expected, unreached=0.3)


@every_memory
def test_no_gradient_reaches_a_frame_that_does_not_exist(memory):
    slow, frames = make_slow(memory), make_frames(memory, T=8)
    leaves = {name: x.requires_grad_() for name, x in frames.items()}
    p = params(memory, slow)
    o, end = memory.op.chunk(p, memory.op.init_state(p, 2), **leaves, lengths=torch.tensor([8, 3]))
    loss = o.square().sum() + sum(x.square().sum() for x in live(memory, slow, end).values())
    loss.backward()
    for name, x in leaves.items():
        assert x.grad is None or not x.grad[1, :, 3:].any(), name


@every_memory
def test_outer_gradients_through_many_chunks(memory):
    n = 24 if memory.name.startswith("ttt") else 16  # with Muon a rounding error grows
    slow, frames = make_slow(memory, C=4), make_frames(memory, B=1, T=n * 4 - 3)
    start = a_state(memory, slow, [6])
    found = (gradients(memory, slow, frames, start, f) for f in ("fast", "naive"))
    assert_same_gradients(memory, *found, unreached=0.3)


@every_memory
@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gradcheck(memory, fast):
    """Fast: along random directions; else every entry of the Jacobian."""
    size = dict(H=1, D=3)
    slow = make_slow(memory, C=2, **size)
    start = fast_state(memory, slow, a_state(memory, slow, [3, 2], **size))
    frames = make_frames(memory, B=2, T=3, **size)
    gen = torch.Generator().manual_seed(3)
    given = (slow, {n: x for n, x in start._asdict().items() if n != "pos"}, frames)
    flat, spec = pytree.tree_flatten(given)
    places = [i for i, x in enumerate(flat) if isinstance(x, torch.Tensor)]

    def call(tensors):
        at = dict(zip(places, tensors, strict=True))
        values = [at.get(i, x) for i, x in enumerate(flat)]
        slow, state, frames = pytree.tree_unflatten(values, spec)
        state = memory.op.State(**state, pos=start.pos)
        return memory.op.chunk(params(memory, slow), state, **frames)

    def flat_state(end):
        return torch.cat([x.flatten() for _, x in sorted(live(memory, slow, end).items())])

    inputs = [flat[i].detach().clone().requires_grad_() for i in places]
    with torch.no_grad():
        width = flat_state(call(inputs)[1]).numel()
    mix = torch.randn(4, width, generator=gen, dtype=torch.float64)

    def function(*tensors):
        o, end = call(tensors)
        return o, mix @ flat_state(end)

    assert torch.autograd.gradcheck(
        function, inputs, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=fast
    )
