"""LaCT (arXiv:2505.23884): a memory that is a SwiGLU, written once per large chunk by Muon.

    f(x) = Wo (silu(Wg x) * (Wu x)),      M = f_r o ... o f_1, usually r = 1

A residual memory has x + f_j(x) in place of each f_j. The inner loss of a frame is `-<M(k), v>`;
each matrix has a learning rate of its own in every frame. All frames of a chunk read the weights of
its start, and its last frame writes: with G the sum of the chunk's negative gradients, each frame's
times its rate, and m, w the means over the chunk of the momentum and the write gate,

    D <- G + m D                              momentum; without it D = G
    U  = W + eta w NS5(D)                     Muon; without it eta w D
    W <- U / (||row of U|| + 1e-5) * ||row of the start of the matrix||

The write gate and eta stand after Newton-Schulz, which forgets the size of D. A matrix whose D is
exactly 0 is not written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from moshi_ttt.ops.grid import Grid
from moshi_ttt.ops.lact_chunks import Slow, pack, recall, unpack, write
from moshi_ttt.ops.lact_scan import scan
from moshi_ttt.ops.norm import raised
from moshi_ttt.ops.stream import cast, unless_all

WEIGHTS = ("Wg", "Wu", "Wo")
"""The fast weights, as `State` and their start in `Params` name them."""
MOMENTUM = ("Dg", "Du", "Do")
"""What of a `State` is momentum."""


class Params(NamedTuple):
    """What a call is given of the memory: what outer training learns of it, and settings.

    Attributes:
        Wg: `[H, r, F, D]`, start of the gate's matrices (out, in), r stacked SwiGLUs.
        Wu: `[H, r, F, D]`, start of the other inner matrices.
        Wo: `[H, r, D, F]`, start of the outer ones.
        eta: `[H]`, size of a write.
        chunk_size: C, frames from write to write.
        momentum: whether D is carried.
        muon: whether D passes Newton-Schulz.
        residual: whether a SwiGLU adds its input.
    """

    Wg: Tensor
    Wu: Tensor
    Wo: Tensor
    eta: Tensor
    chunk_size: int
    momentum: bool = True
    muon: bool = True
    residual: bool = False


class State(NamedTuple):
    """Fast weights, momentum and the unfinished chunk; float32 or float64.

    Attributes:
        Wg: `[B, H, r, F, D]`, chunk-start weights.
        Wu: `[B, H, r, F, D]`.
        Wo: `[B, H, r, D, F]`.
        Dg: momentum, as `Wg`; `[B, H, 0, F, D]` without momentum.
        Du: as `Wu`.
        Do: as `Wo`.
        k: `[B, H, C, D]`, keys of the unfinished chunk; rows from `pos % C` on hold nothing.
        v: `[B, H, C, D]`, its values.
        lr: `[B, H, C, 3]`, its learning rates.
        m: `[B, H]`, sum of its momentum gates.
        w: `[B, H]`, sum of its write gates.
        pos: `[B]` int64, frames since the row's last reset.
    """

    Wg: Tensor
    Wu: Tensor
    Wo: Tensor
    Dg: Tensor
    Du: Tensor
    Do: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    m: Tensor
    w: Tensor
    pos: Tensor


def init_state(params: Params, batch_size: int) -> State:
    """The memory before its first frame: `W0`, nothing written. Differentiable in `W0`.

    Args:
        params: as `Params`; below float32 they are raised to it.
        batch_size: B, batch rows.

    Returns:
        A state in float32, float64 if the parameters are.
    """
    W = [raised(x).repeat(batch_size, *[1] * x.dim()) for x in params[:3]]
    B, H, r, _, D = W[0].shape
    momentum = [x.new_zeros(B, H, r if params.momentum else 0, *x.shape[-2:]) for x in W]
    k, v, lr = (W[0].new_zeros(B, H, params.chunk_size, width) for width in (D, D, 3))
    m, w = (W[0].new_zeros(B, H) for _ in range(2))
    pos = torch.zeros(B, dtype=torch.int64, device=k.device)
    return State._make([*W, *momentum, k, v, lr, m, w, pos])


def chunk(
    params: Params,
    state: State,
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T D"],
    lr: Float[Tensor, "B H T 3"],
    m: Float[Tensor, "B H T"],
    w: Float[Tensor, "B H T"],
    lengths: Int[Tensor, " B"] | None = None,
) -> tuple[Float[Tensor, "B H T D"], State]:
    """Pass T frames, chunk by chunk; differentiable once in everything.

    Args:
        params: as `Params`.
        state: where each row stands; never written. Rows may be at different positions.
        q: queries, as the memory reads them (scaled, silu, L2-normalised).
        k: keys, likewise.
        v: values, silu'ed.
        lr: learning rates of Wg, Wu and Wo.
        m: momentum gates, in 0..1.
        w: write gates, in 0..1.
        lengths: frames that exist in each row (the first ones); None means all T.

    Returns:
        The outputs, zero at frames that do not exist, and the state after the last frame. Both
        have the state's dtype, float32 or float64, whatever that of the inputs.

    Raises:
        ValueError: a length outside 0..T.
    """
    B, H, T, _ = q.shape
    C, dtype = params.chunk_size, state.Wg.dtype
    grid = Grid.of(state.pos, H, C, T, lengths)
    if grid.n == 0:
        return q.new_zeros(q.shape, dtype=dtype), State(*(x.clone() for x in state))
    # a row's sums so far stand in the first slot of its chunk, which it holds if it has any
    sums = pad(torch.stack([state.m, state.w], -1).unsqueeze(2), (0, 0, 0, C - 1))
    gates = torch.cat([lr, m.unsqueeze(-1), w.unsqueeze(-1)], -1).to(dtype)
    gates = grid.lay(gates, torch.cat([state.lr, sums], -1))
    q, k, v = grid.lay(q.to(dtype)), grid.lay(k.to(dtype), state.k), grid.lay(v.to(dtype), state.v)
    means = (gates[..., 3:].sum(2) / C).unbind(-1)
    rates = torch.stack([means[0], means[1] * params.eta.to(dtype).repeat(B)], 1)
    o, W, D = scan(
        grid,
        _slow(params, B, dtype),
        q,
        k,
        v,
        gates[..., :3],
        rates.view(grid.n, 2, B * H, 1, 1, 1),
        pack(*state[:3]),
        pack(*state[3:6]),
    )
    tail = grid.tail(gates)
    left = [x.contiguous() for x in (tail[..., :3], *tail[..., 3:].sum(2).unbind(-1))]
    fields = [
        x.clone(memory_format=torch.contiguous_format) for x in (*unpack(W, B, H), *unpack(D, B, H))
    ]
    fields += [grid.tail(k), grid.tail(v), *left, grid.pos]
    return grid.pick(o), State._make(fields)


@torch.no_grad()
def step(
    params: Params,
    state: State,
    q: Float[Tensor, "B H 1 D"],
    k: Float[Tensor, "B H 1 D"],
    v: Float[Tensor, "B H 1 D"],
    lr: Float[Tensor, "B H 1 3"],
    m: Float[Tensor, "B H 1"],
    w: Float[Tensor, "B H 1"],
    exec_mask: Bool[Tensor, " B"] | None = None,
) -> Float[Tensor, "B H 1 D"]:
    """Pass one frame; the state is written in place. No gradients.

    The frame is appended to the buffers and reads the chunk-start weights; the last frame of a
    chunk then writes them. On the CPU the write is computed only when some row is at the end of
    its chunk. Elsewhere nothing depends on a position on the host, so the call can be captured in
    a graph; there the whole write, Newton-Schulz included, is computed and masked in every frame.

    Args:
        params: as `Params`.
        state: as `State`, contiguous; keeps its storage.
        q: queries, as in `chunk`.
        k: keys.
        v: values.
        lr: learning rates.
        m: momentum gates.
        w: write gates.
        exec_mask: rows that have a frame; the others keep their state exactly, and their output
            means nothing. None is all.

    Returns:
        The output, in the state's dtype.
    """
    dtype, (B, H) = state.Wg.dtype, q.shape[:2]
    exec_mask = unless_all(exec_mask)
    at = state.pos % params.chunk_size
    for buffer, row in zip((state.k, state.v, state.lr), (k, v, lr), strict=True):
        row, slot = cast(row, dtype), at.view(B, 1, 1, 1).expand(B, H, 1, buffer.shape[-1])
        if exec_mask is not None:
            row = torch.where(exec_mask.view(B, 1, 1, 1), row, buffer.gather(2, slot))
        buffer.scatter_(2, slot, row)
    for total, gate in ((state.m, m), (state.w, w)):
        gate = cast(gate, dtype).squeeze(-1)
        total.add_(gate if exec_mask is None else torch.where(exec_mask.view(B, 1), gate, 0))
    o = _recall(params, state, cast(q, dtype))
    full = at == params.chunk_size - 1
    if exec_mask is not None:
        full = full & exec_mask
    if not full.is_cpu or full.any():
        _write(params, state, full)
    state.pos.add_(1 if exec_mask is None else exec_mask)
    return o


def inner_loss(
    params: Params, state: State, k: Float[Tensor, "B H T D"], v: Float[Tensor, "B H T D"]
) -> Float[Tensor, "B H T"]:
    """`-<M(k), v>` of frames, at the chunk-start weights of `state`."""
    dtype = state.Wg.dtype
    return -(_recall(params, state, cast(k, dtype)) * v.to(dtype)).sum(-1)


def _recall(params: Params, state: State, x: Tensor) -> Tensor:
    """`M(x)` of `[B, H, T, D]` at the chunk-start weights."""
    Wg, Wu, Wo = (W.flatten(0, 1) for W in state[:3])
    return recall(x.flatten(0, 1), (Wg, Wu, Wo.mT), params.residual)[0].view_as(x)


def _write(params: Params, state: State, full: Tensor) -> None:
    """The write of the rows in `full`, `[B]`, whose buffers hold a whole chunk."""
    B, H, C, _ = state.k.shape
    dtype = state.Wg.dtype
    W, D, _ = write(
        _slow(params, B, dtype),
        pack(*state[:3]),
        pack(*state[3:6]),
        (state.k.flatten(0, 1), state.v.flatten(0, 1), state.lr.flatten(0, 1)),
        torch.stack([state.m, state.w * params.eta.to(dtype)]).div(C).view(2, B * H, 1, 1, 1),
        full.repeat_interleave(H, output_size=B * H).view(-1, 1, 1, 1),
    )
    for x, new in zip(state[:6], (*unpack(W, B, H), *unpack(D, B, H)), strict=True):
        x.copy_(new)
    for x in (state.k, state.v, state.lr, state.m, state.w):
        x.masked_fill_(full.view(B, *[1] * (x.dim() - 1)), 0)


def _slow(params: Params, B: int, dtype: torch.dtype) -> Slow:
    Wg, Wu, Wo = (x.to(dtype) for x in params[:3])
    gu = torch.linalg.vector_norm(torch.stack([Wg, Wu]), dim=-1, keepdim=True)
    o = torch.linalg.vector_norm(Wo, dim=-1)[None, :, :, None]
    gu, o = (x.repeat(1, B, 1, 1, 1) for x in (gu, o))
    return Slow(gu, o, params.momentum, params.muon, params.residual)
