"""The table of memories under contract, and what it takes to hold a fast form to its definition.

A new memory adds a file with its `Rules` and a line to `MEMORIES_UNDER_TEST`. Nothing here reads
how a fast form works: the state that it must carry is made from the definition's own.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.contract import atlas, lact, ttt

RULES = {"ttt_linear": ttt, "ttt_mlp": ttt, "lact": lact, "atlas": atlas}
"""Family -> module with what only it knows:

slow(name, rand, H, D, C, settings)       random `Params` by name, none at its start value
frames(rand, B, H, T, D)                  random frames as a memory hands them over, by name
definition(name, slow, frames, state, lengths)
                                          the definition: outputs and its own state
fast(name, slow, state, stale)            the fast state that means the same, by name; `stale` fills
                                          the rows of a buffer that hold nothing
used(slow, state)                         buffer -> mask, broadcastable to it, of what is in use
BREAKS                                    ways to break the definition, each with a monkeypatch
"""


@dataclass(frozen=True)
class Memory:
    """One row of the table.

    Attributes:
        name: of the op module; the family.
        settings: of `Params` and of the rules.
        tolerance: of forms of one function, outputs and state, in float64.
        slope: of their gradients, relative.
        idle: arguments that no output depends on in this row.
        blind: breaks that change nothing in this row.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-13
    slope: float = 1e-12
    idle: tuple[str, ...] = ()
    blind: tuple[str, ...] = ()

    @property
    def op(self) -> Any:
        return importlib.import_module(f"moshi_ttt.ops.{self.name}")

    @property
    def rules(self) -> Any:
        return RULES[self.name]

    @property
    def breaks(self) -> list[Callable[[Any], None]]:
        return [b for b in self.rules.BREAKS if b.__name__ not in self.blind]

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.settings.items())])


MUON = {"tolerance": 1e-11, "slope": 1e-10}
MEMORIES_UNDER_TEST = [
    *(Memory(name, {"write_every": N}) for N in (1, 2, 3) for name in ("ttt_linear", "ttt_mlp")),
    Memory("lact", **MUON),
    Memory("lact", {"stacked": 2, "residual": True}, **MUON),
    Memory("lact", {"stacked": 2, "muon": False}),
    Memory("lact", {"momentum": False, "muon": False}, idle=("m",)),
    Memory("atlas", {"window": 5}),
    Memory(
        "atlas",
        {"window": 1, "polynomial": "none", "deep": False},
        blind=("a_window_too_short",),
    ),
    Memory("atlas", {"window": 8, "polynomial": "outer"}),
    Memory("atlas", {"window": 3, "muon": True}, **MUON, blind=("half_of_the_loss",)),
]
"""Every family, in the settings that take another way through its code."""


def make_slow(memory: Memory, seed=0, *, H=2, D=6, C=4, dtype=torch.float64, **more):
    """Random slow weights and the settings, as `Params` names them; none at its start value."""
    gen = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    return memory.rules.slow(memory.name, rand, H, D, C, {**memory.settings, **more})


def make_frames(memory: Memory, seed=1, *, B=2, H=2, T=9, D=6, dtype=torch.float64):
    """Random frames, by name, as a memory hands them over: q and k of length 1, gates in range."""
    gen = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    return memory.rules.frames(rand, B, H, T, D)


def take(frames, at) -> dict[str, Tensor]:
    """A slice of frames along time."""
    return {name: x[:, :, at] for name, x in frames.items()}


def params(memory: Memory, slow):
    """The fast form's view of the slow weights."""
    return memory.op.Params(**slow)


def run_naive(memory: Memory, slow, frames, state=None, lengths=None):
    """The definition on the same arguments."""
    return memory.rules.definition(memory.name, slow, frames, state, lengths)


def fast_state(memory: Memory, slow, state, stale=0.0):
    """The fast state that means what the definition's `state` means; `stale` fills unused rows."""
    tensors = memory.rules.fast(memory.name, slow, state, stale)
    return memory.op.State(**tensors, pos=torch.tensor(state.pos))


def live(memory: Memory, slow, state) -> dict[str, Tensor]:
    """What a fast state means: its tensors, with the unused rows of buffers at 0."""
    used = memory.rules.used(slow, state)
    out = {n: x for n, x in state._asdict().items() if n != "pos"}
    return out | {n: torch.where(mask, out[n], 0) for n, mask in used.items()}


def with_leaves(tree, prefix):
    """The tree with every tensor a leaf that wants gradients, and those leaves by name."""
    flat, spec = pytree.tree_flatten(tree)
    leaves = {}
    for i, x in enumerate(flat):
        if isinstance(x, Tensor) and x.is_floating_point():
            flat[i] = leaves[f"{prefix} {i}"] = x.detach().clone().requires_grad_()
    return pytree.tree_unflatten(flat, spec), leaves


def clone(state):
    """A copy of a state, of any memory."""
    return type(state)(*(x.detach().clone() for x in state))


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str = "outputs") -> None:
    """The largest difference is at most `tolerance`, absolute up to 1 and relative above."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} is not {expected.dtype}"
    if not expected.numel():
        return
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error <= tolerance, f"{what}: differ by {error:.2e}, more than {tolerance:.0e}"


def assert_same_state(memory: Memory, slow, actual, expected) -> None:
    """The fast state `actual` means what the definition's `expected` means."""
    assert actual.pos.dtype == torch.int64
    assert actual.pos.tolist() == expected.pos
    wanted = live(memory, slow, fast_state(memory, slow, expected))
    for name, x in live(memory, slow, actual).items():
        assert_near(x, wanted[name].detach(), memory.tolerance, f"state {name}")


def stream(memory: Memory, slow, frames, state=None, exec_mask=None):
    """Frame after frame through `step`: the outputs and the state, which is written in place."""
    p = params(memory, slow)
    state = memory.op.init_state(p, frames["q"].shape[0]) if state is None else state
    outs = [torch.zeros_like(frames["q"][:, :, :0])]
    with torch.no_grad():
        for t in range(frames["q"].shape[2]):
            mask = None if exec_mask is None else exec_mask[:, t]
            outs.append(memory.op.step(p, state, **take(frames, slice(t, t + 1)), exec_mask=mask))
    return torch.cat(outs, dim=2), state
