"""The table of memories under contract, and what it takes to hold a fast form to its definition.

A new memory adds one row to `MEMORIES_UNDER_TEST`. Nothing here reads how a fast form works: the
state it must carry is made from the definition's own state by autograd (`fast_state`).
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from moshi_ttt.ops import naive

SLOW = ("gamma", "beta", "delta", "decay")


@dataclass(frozen=True)
class Memory:
    """One row of the table.

    Attributes:
        name: of the op module and of the definition.
        f: the memory's function of one frame (x [H, D], weights).
        shapes: width D -> shape of each weight, without the heads.
        rows: one frame of the unfinished chunk -> its row in each buffer of the fast state.
        write_every: chunks from write to write.
    """

    name: str
    f: Callable[[Tensor, dict[str, Tensor]], Tensor]
    shapes: Callable[[int], dict[str, tuple[int, ...]]]
    rows: Callable[..., dict[str, Tensor]]
    write_every: int = 1

    @property
    def op(self) -> SimpleNamespace:
        op = vars(importlib.import_module(f"moshi_ttt.ops.{self.name}"))
        forms = {n: partial(op[n], write_every=self.write_every) for n in ("chunk", "step")}
        return SimpleNamespace(**op | forms)

    @property
    def naive(self) -> Callable[..., tuple[Tensor, naive.State]]:
        return partial(getattr(naive, self.name), write_every=self.write_every)

    def __repr__(self) -> str:
        return self.name if self.write_every == 1 else f"{self.name}-{self.write_every}"


def _linear_rows(W, gamma, beta, k, v, eta):
    z1 = naive.linear(k, W)
    r = v - k
    (g1,) = _gradient(lambda d1: _half_square(z1 + d1, gamma, beta, r), z1)
    return {"k": k, "g1": eta[:, None] * g1}


def _mlp_rows(W, gamma, beta, k, v, eta):
    z1 = torch.einsum("hd,hdf->hf", k, W["W1"]) + W["b1"]
    r = v - k

    def loss(d1, d2):
        hidden = F.gelu(z1 + d1, approximate="tanh")
        z2 = torch.einsum("hf,hfd->hd", hidden, W["W2"]) + W["b2"]
        return _half_square(z2 + d2, gamma, beta, r)

    g1, g2 = _gradient(loss, z1, k)
    x2 = F.gelu(z1, approximate="tanh")
    return {"k": k, "g1": eta[:, None] * g1, "x2": x2, "g2": eta[:, None] * g2}


def _half_square(z, gamma, beta, r):
    return 0.5 * (naive.layer_norm(z, gamma, beta) - r).square().sum()


def _gradient(loss, *like):
    """The gradient of `loss` to a shift of its layers' pre-activations, at no shift."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        shifts = [torch.zeros_like(x, requires_grad=True) for x in like]
        return torch.autograd.grad(loss(*shifts), shifts, create_graph=create_graph)


MEMORIES_UNDER_TEST = [
    Memory("ttt_linear", naive.linear, lambda D: {"W1": (D, D), "b1": (D,)}, _linear_rows),
    Memory(
        "ttt_mlp",
        naive.mlp,
        lambda D: {"W1": (D, 4 * D), "b1": (4 * D,), "W2": (4 * D, D), "b2": (D,)},
        _mlp_rows,
    ),
]


def make_slow(
    memory: Memory, seed=0, *, H=2, D=6, C=4, decay=0.3, scale=1.0, dtype=torch.float64
) -> dict[str, Tensor | None]:
    """Random slow weights, none at its start value: some tau are clamped, no gate is closed."""
    gen = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    slow = {}
    for name, shape in memory.shapes(D).items():
        slow[name] = rand(H, *shape) * (shape[0] ** -0.5 if len(shape) == 2 else 0.3)
    slow["gamma"] = scale * (1 + 0.2 * rand(H, D))
    slow["beta"] = 0.2 * rand(H, D)
    slow["delta"] = 0.2 * rand(C)
    if C > 2:
        slow["delta"][1] = -0.7  # 1/2 - 0.7 < 0: clamped
    slow["decay"] = None if decay is None else decay * torch.linspace(0.5, 1.0, H, dtype=dtype)
    return slow


def make_frames(seed=1, *, B=2, H=2, T=9, D=6, dtype=torch.float64) -> dict[str, Tensor]:
    """Random frames: q and k of length 1 as the caller hands them over, eta in (0, 1/D)."""
    gen = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    q, k = (F.normalize(rand(B, H, T, D), dim=-1) for _ in range(2))
    return {"q": q, "k": k, "v": rand(B, H, T, D), "eta": rand(B, H, T).sigmoid() / D}


def take(frames, at) -> dict[str, Tensor]:
    """A slice of frames along time."""
    return {name: x[:, :, at] for name, x in frames.items()}


def params(memory: Memory, slow):
    """The fast form's view of the slow weights."""
    return memory.op.Params(**slow)


def run_naive(memory: Memory, slow, frames, state=None, lengths=None):
    """The definition on the same arguments."""
    W0 = {name: slow[name] for name in memory.shapes(1)}
    rest = {name: slow[name] for name in SLOW}
    return memory.naive(W0, **rest, **frames, state=state, lengths=lengths)


def buffers(memory: Memory) -> list[str]:
    """Names of a fast state's buffers, `[B, H, C, *]` each."""
    return [n for n in memory.op.State._fields if n != "pos" and n not in memory.shapes(1)]


def fast_state(memory: Memory, slow, state: naive.State, stale=0.0):
    """The fast state that means what the definition's `state` means; `stale` fills unused rows."""
    C = len(slow["delta"])
    rows = {name: [] for name in buffers(memory)}
    for b, pairs in enumerate(state.pairs):
        W = {name: w[b] for name, w in state.W.items()}
        made = [memory.rows(W, slow["gamma"], slow["beta"], *pair) for pair in pairs]
        H, D = slow["gamma"].shape
        nothing = slow["gamma"].new_zeros(H, D)
        widths = memory.rows(W, slow["gamma"], slow["beta"], nothing, nothing, nothing[:, 0])
        for name in rows:
            live = [row[name] for row in made]
            unused = torch.full_like(widths[name], stale).detach()
            rows[name].append(torch.stack(live + [unused] * (C - len(live)), dim=1))
    tensors = {name: torch.stack(x) for name, x in rows.items()}
    return memory.op.State(**state.W, **tensors, pos=torch.tensor(state.pos))


def live(memory: Memory, state, C: int) -> dict[str, Tensor]:
    """What a fast state means: its weights, and its buffers with the unused rows at 0."""
    out = {name: getattr(state, name) for name in memory.shapes(1)}
    used = torch.arange(C) < (state.pos % C)[:, None]
    for name in buffers(memory):
        x = getattr(state, name)
        out[name] = torch.where(used[:, None, :, None], x, torch.zeros_like(x))
    return out


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


def assert_same_state(memory: Memory, slow, actual, expected: naive.State, tolerance=1e-13):
    """The fast state `actual` means what the definition's `expected` means."""
    assert actual.pos.dtype == torch.int64
    assert actual.pos.tolist() == expected.pos
    C = len(slow["delta"])
    wanted = live(memory, fast_state(memory, slow, expected), C)
    for name, x in live(memory, actual, C).items():
        assert_near(x, wanted[name].detach(), tolerance, f"state {name}")


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
