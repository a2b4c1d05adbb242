"""Atlas (arXiv:2505.23735): a memory trained on a window of frames, with momentum and Muon.

    M(x) = x + W1 gelu_tanh(W2 phi(x))      deep
    M(x) = W1 phi(x)                        linear (`W2` is None)

phi makes polynomial features of degree 2: `[coef_1 x, coef_2 x*x]` (elementwise) or, with `proj`,
`[coef_1 x, coef_2 proj vec(x x^T)]`, vec being the upper triangle with its diagonal, its products
off the diagonal times sqrt(2); without `coef` phi(x) = x. Frame t of a chunk reads M_t, its own
write in it. Gradients are taken at the chunk-start M, for the pairs of the last c frames (the
window), which reach back into earlier chunks:

    S_t = theta_t S_{t-1} + sum_{i=t-c+1..t} gamma_i grad ||M(k_i) - v_i||^2
    M_t = alpha_t M_{t-1} - eta_t NS5(S_t)         with `muon`, else  - eta_t S_t
    o_t = M_t(q_t)

The chunk-start M becomes M after frame C-1 of a chunk; M and S themselves move with every frame.
c = 1 is the delta rule with momentum: Titans (arXiv:2501.00663).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moshi_ttt.ops.atlas_layers import features, learn, orthogonal
from moshi_ttt.ops.atlas_pairs import last, on_slots, present, slide, split
from moshi_ttt.ops.atlas_scan import gates, scan
from moshi_ttt.ops.grid import Grid
from moshi_ttt.ops.norm import gelu, raised
from moshi_ttt.ops.stream import cast, unless_all

WEIGHTS = ("W1", "W2")
"""Fields of a state that are fast weights."""

MOMENTUM = ("S1", "S2")
"""Fields of a state that are momentum."""


class Params(NamedTuple):
    """What outer training learns of the memory, and its settings.

    Attributes:
        W1: `[H, D, F]`, start of the last matrix (out, in); linear: `[H, D, P]`.
        W2: `[H, F, P]`, start of the first matrix; None is the linear memory.
        coef: `[H, 2]`, factors of the two degrees of phi; None: phi(x) = x and P = D.
        proj: `[H, R, D(D+1)/2]`, P = D + R; None: elementwise squares, P = 2 D.
        chunk_size: C, frames.
        window: c >= 1, frames; it may be longer than a chunk.
        muon: whether S goes through Newton-Schulz.
    """

    W1: Tensor
    W2: Tensor | None
    coef: Tensor | None
    proj: Tensor | None
    chunk_size: int
    window: int
    muon: bool = False


class State(NamedTuple):
    """Where each row stands; float32 or float64. In a linear memory W2, W2s and S2 are empty.

    Attributes:
        W1: `[B, H, D, F]`, M after the last frame.
        W2: `[B, H, F, P]`.
        W1s: like W1, M at the start of the unfinished chunk.
        W2s: like W2.
        S1: like W1, momentum.
        S2: like W2.
        k: `[B, H, c - 1, D]`, keys of the last frames, newest last; those before a row's first
            frame hold nothing.
        v: `[B, H, c - 1, D]`, their values.
        gamma: `[B, H, c - 1]`, their gates.
        pos: `[B]` int64, frames since the row's last reset.
    """

    W1: Tensor
    W2: Tensor
    W1s: Tensor
    W2s: Tensor
    S1: Tensor
    S2: Tensor
    k: Tensor
    v: Tensor
    gamma: Tensor
    pos: Tensor


def init_state(params: Params, batch_size: int) -> State:
    """The memory before its first frame: `W0`, nothing written. Differentiable in `W0`.

    Args:
        params: as `Params`; below float32 they are raised to it.
        batch_size: B, batch rows.

    Returns:
        A state in float32, float64 if the parameters are.
    """
    H, D, _ = params.W1.shape
    start = [params.W1, params.W1.new_zeros(H, 0, 0) if params.W2 is None else params.W2]
    W, Ws = ([raised(x).repeat(batch_size, 1, 1, 1) for x in start] for _ in range(2))
    S = [torch.zeros_like(x) for x in W]
    k, v = (W[0].new_zeros(batch_size, H, params.window - 1, D) for _ in range(2))
    pos = torch.zeros(batch_size, dtype=torch.int64, device=k.device)
    return State._make([*W, *Ws, *S, k, v, torch.zeros_like(k[..., 0]), pos])


def chunk(
    params: Params,
    state: State,
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T D"],
    alpha: Float[Tensor, "B H T"],
    eta: Float[Tensor, "B H T"],
    theta: Float[Tensor, "B H T"],
    gamma: Float[Tensor, "B H T"],
    lengths: Int[Tensor, " B"] | None = None,
) -> tuple[Float[Tensor, "B H T D"], State]:
    """Pass T frames, chunk by chunk; differentiable once in everything.

    Without Muon this is a dual form, in which no frame has a weight of its own; with it S_t and
    NS5(S_t) are made for all frames of a chunk together. See `atlas_scan`.

    Args:
        params: as `Params`.
        state: where each row stands; never written. Rows may be at different positions.
        q: queries.
        k: keys.
        v: values.
        alpha: what is kept of M, per frame.
        eta: inner learning rates.
        theta: what is kept of S.
        gamma: weights of the frames in the inner loss.
        lengths: frames that exist in each row (the first ones); None means all T.

    Returns:
        The outputs, zero at frames that do not exist, and the state after the last frame. Both
        have the state's dtype, float32 or float64, whatever that of the inputs.

    Raises:
        ValueError: a length outside 0..T.
    """
    B, H, T, D = q.shape
    C, c, dtype = params.chunk_size, params.window, state.W1.dtype
    grid = Grid.of(state.pos, H, C, T, lengths)
    if grid.n == 0:
        return q.new_zeros(q.shape, dtype=dtype), State(*(x.clone() for x in state))
    q, k, v, alpha, eta, theta, gamma = (x.to(dtype) for x in (q, k, v, alpha, eta, theta, gamma))
    new = torch.cat([k, v, gamma.unsqueeze(-1)], -1)
    pairs = on_slots(grid, state.pos, present(_window(state), state.pos), new)
    k, v, gamma = split(pairs)
    names = _names(params)
    W, Ws, S = ([x.flatten(0, 1) for x in xs] for xs in _matrices(names, state))
    o, moved, Ws = scan(
        grid,
        (grid.lay(q).transpose(0, 1).reshape(B * H, -1, D), k, v),
        _phi(params, B, dtype),
        gates(grid, alpha, eta, theta, gamma.squeeze(-1), c, params.muon),
        [torch.stack(x, 1) for x in zip(W, S, strict=True)],
        Ws,
        muon=params.muon,
    )
    fields = state._asdict() | {"pos": grid.pos}
    for name, Y, start in zip(names, moved, Ws, strict=True):
        fields |= dict(zip(_fields(name), (Y[:, 0], start, Y[:, 1]), strict=True))
    k, v, gamma = split(last(grid, state.pos, pairs, c - 1))
    fields |= {"k": k, "v": v, "gamma": gamma.squeeze(-1)}
    after = (fields[n].reshape_as(x) for n, x in state._asdict().items())
    o = o.view(B * H, grid.n, C, D).transpose(0, 1)
    # each with a memory of its own: a step writes in place
    return grid.pick(o), State(*(x.clone(memory_format=torch.contiguous_format) for x in after))


@torch.no_grad()
def step(
    params: Params,
    state: State,
    q: Float[Tensor, "B H 1 D"],
    k: Float[Tensor, "B H 1 D"],
    v: Float[Tensor, "B H 1 D"],
    alpha: Float[Tensor, "B H 1"],
    eta: Float[Tensor, "B H 1"],
    theta: Float[Tensor, "B H 1"],
    gamma: Float[Tensor, "B H 1"],
    exec_mask: Bool[Tensor, " B"] | None = None,
) -> Float[Tensor, "B H 1 D"]:
    """Pass one frame; the state is written in place. No gradients.

    The dense form: M and S are written at every frame. On CUDA nothing depends on a position on
    the host, so the call can be captured in a graph; there the write of the chunk-start M is a
    masked one at every frame.

    Args:
        params: as `Params`.
        state: as `State`, contiguous; keeps its storage.
        q: query.
        k: key.
        v: value.
        alpha: what is kept of M.
        eta: inner learning rate.
        theta: what is kept of S.
        gamma: weight of the frame in the inner loss.
        exec_mask: rows that have a frame; the others keep their state exactly, and their output
            means nothing. None is all.

    Returns:
        The output, in the state's dtype.
    """
    (B, H, _, D), dtype, c = q.shape, state.W1.dtype, params.window
    exec_mask = unless_all(exec_mask)
    q, k, v = (cast(x, dtype) for x in (q, k, v))
    *factors, gamma = (cast(x, dtype).unsqueeze(-1) for x in (alpha, eta, theta, gamma))
    pairs = torch.cat([k, v, gamma], -1)
    if c > 1:
        pairs = torch.cat([present(_window(state), state.pos), pairs], 2)
    if exec_mask is not None:  # a row without a frame: M = 1 M - 0 S, S = 1 S + no pair
        here = exec_mask.view(B, 1, 1, 1)
        pairs = pairs.where(here, 0)
        factors = [x.where(here, y) for x, y in zip(factors, (1, 0, 1), strict=True)]
    alpha, eta, theta = (x.reshape(B * H, 1, 1) for x in factors)
    k, v, gamma = split(pairs.flatten(0, 1))
    q = q.reshape(B * H, 1, D)
    phi = _phi(params, B, dtype)
    names = _names(params)
    W, Ws, S = ([x.flatten(0, 1) for x in xs] for xs in _matrices(names, state))
    z, x = q, features(q, *phi)
    learned = learn(Ws, features(k, *phi), k, v)
    for j, (X, U) in enumerate(zip(learned.X, learned.U, strict=True)):
        S[j].mul_(theta).baddbmm_((gamma * U).mT, X)
        W[j].mul_(alpha).addcmul_(eta, orthogonal(S[j]) if params.muon else S[j], value=-1)
        z = torch.bmm(gelu(z) if j else x, W[j].mT)
    _end_chunk(params.chunk_size, state, exec_mask, W, Ws)
    slide(_window(state), pairs, exec_mask)
    state.pos.add_(1 if exec_mask is None else exec_mask)
    return (z if params.W2 is None else q + z).view(B, H, 1, D)


def inner_loss(
    params: Params,
    state: State,
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T D"],
) -> Float[Tensor, "B H T"]:
    """`||M(k) - v||^2` of each frame at the state's M, where the next chunk starts from.

    Args:
        params: as `Params`.
        state: never written.
        k: keys.
        v: values.

    Returns:
        The losses, in the state's dtype.
    """
    shape, dtype = k.shape[:3], state.W1.dtype
    k, v = (x.to(dtype).flatten(0, 1) for x in (k, v))
    W = [x.flatten(0, 1) for x in _matrices(_names(params), state)[0]]
    learned = learn(W, features(k, *_phi(params, shape[0], dtype)), k, v)
    return (learned.U[-1] / 2).square().sum(-1).view(shape)


def _names(params: Params) -> tuple[str, ...]:
    """The matrices in the order they are applied."""
    return ("W1",) if params.W2 is None else ("W2", "W1")


def _fields(name: str) -> tuple[str, str, str]:
    """A matrix, the same at the chunk's start, and its momentum, in a `State`."""
    return name, f"{name}s", f"S{name[1:]}"


def _matrices(names: tuple[str, ...], state: State) -> list[list[Tensor]]:
    """M, the chunk-start M, and S."""
    return [[getattr(state, f) for f in fs] for fs in zip(*map(_fields, names), strict=True)]


def _window(state: State) -> tuple[Tensor, Tensor, Tensor]:
    return state.k, state.v, state.gamma


def _phi(params: Params, B: int, dtype: torch.dtype) -> list[Tensor]:
    """`coef` and `proj`, those there are, as `features` takes them."""
    if params.coef is None:
        return []
    coef = cast(params.coef, dtype).expand(B, -1, -1).flatten(0, 1)
    return [coef] if params.proj is None else [coef, cast(params.proj, dtype)]


def _end_chunk(
    C: int, state: State, exec_mask: Tensor | None, W: list[Tensor], Ws: list[Tensor]
) -> None:
    """The chunk-start M of rows at frame C - 1 becomes M."""
    full = state.pos % C == C - 1
    if exec_mask is not None:
        full = full & exec_mask
    if full.is_cpu and not full.any():
        return
    full = full.repeat_interleave(len(W[0]) // len(full), output_size=len(W[0])).view(-1, 1, 1)
    for new, start in zip(W, Ws, strict=True):
        torch.where(full, new, start, out=start)
