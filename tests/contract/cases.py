"""What the tests of the contract have in common."""

import pytest
import torch

from tests.contract import (
    MEMORIES_UNDER_TEST,
    fast_state,
    live,
    make_frames,
    params,
    run_naive,
    take,
    with_leaves,
)

every_memory = pytest.mark.parametrize("memory", MEMORIES_UNDER_TEST, ids=repr)
every_ttt = pytest.mark.parametrize(
    "memory", [m for m in MEMORIES_UNDER_TEST if m.name.startswith("ttt")], ids=repr
)


def period(memory, C):
    """Frames from write to write."""
    return C * memory.settings.get("write_every", 1)


def gradients(memory, slow, frames, start, form, lengths=None, cut=None):
    """Of a random functional of outputs and final state, to every input by name."""
    (slow, frames, start), leaves = with_leaves((slow, frames, start), "leaf")
    B, T = frames["q"].shape[0], frames["q"].shape[2]
    if form == "naive":
        o, end = run_naive(memory, slow, frames, start, lengths)
        end = fast_state(memory, slow, end)
    else:
        p, outs = params(memory, slow), []
        fast = memory.op.init_state(p, B)
        if start is not None:
            fast = fast_state(memory, slow, start, stale=1e6)
        lengths = None if lengths is None else torch.tensor(lengths)
        for begin, stop in ((0, cut), (cut, T)) if cut else ((0, T),):
            part = take(frames, slice(begin, stop))
            out, fast = memory.op.chunk(p, fast, **part, lengths=lengths)
            outs.append(out)
        o, end = torch.cat(outs, dim=2), fast
    gen = torch.Generator().manual_seed(5)
    loss = o.new_zeros(())
    for _, x in [*sorted(live(memory, slow, end).items()), ("", o)]:
        loss = loss + (x * torch.randn(x.shape, generator=gen, dtype=x.dtype)).sum()
    idle = {id(frames[name]) for name in memory.idle}
    leaves = {name: x for name, x in leaves.items() if id(x) not in idle and x.numel()}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), found, strict=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in pairs}


def assert_same_gradients(memory, actual, expected, unreached=0.0):
    """At most that part of the leaves may be such that nothing depends on them."""
    assert actual.keys() == expected.keys()
    nothing = {name for name, g in expected.items() if not g.any()}
    assert len(nothing) <= unreached * len(expected), f"nothing reaches {nothing}"
    for name, g in expected.items():
        if name in nothing:
            assert not actual[name].any(), name
            continue
        error = (actual[name] - g).abs().max() / g.abs().max()
        assert error <= memory.slope, f"gradient of {name}: relative error {error:.2e}"


def a_state(memory, slow, lengths, **size):
    """The definition's state after some frames, each row at its own position."""
    frames = make_frames(memory, 7, B=len(lengths), T=max(lengths), **size)
    with torch.no_grad():
        return run_naive(memory, slow, frames, lengths=lengths)[1]
