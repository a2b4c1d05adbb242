"""TTT-MLP (arXiv:2407.04620): a memory that is a two-layer MLP.

    f(x) = gelu_tanh(x W1 + b1) W2 + b2

With the key k and the target r = v - k of a frame, the inner loss is `1/2 ||LN(f(k)) - r||^2`, its
gradients g2 at `f(k)` and g1 at `k W1 + b1` are taken at the chunk-start weights, and frame t of a
chunk reads

    W_t = W - tau_t * sum_{s<=t} eta_s g_s,        o_t = q_t + LN(f_{W_t}(q_t))

where `tau_t = max(0, 1/(t+1) + delta_t)`. The weights of the last frame are carried to the next
chunk, moved towards their start: `W <- W_{C-1} - decay (W_{C-1} - W0)`, all four alike; with
`write_every` N this is done at the end of every N-th chunk only, and the others leave W as it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moshi_ttt.ops.grid import Grid, position_scale, rows_of
from moshi_ttt.ops.norm import gelu, normalise, raised
from moshi_ttt.ops.scan import scan
from moshi_ttt.ops.stream import Fast, Slow, advance

WEIGHTS = ("W1", "b1", "W2", "b2")
"""The fast weights, as `State` and their start in `Params` name them."""
MOMENTUM = ()
"""What of a `State` is momentum."""


class Params(NamedTuple):
    """What a call is given of the memory: what outer training learns of it, and a setting.

    Attributes:
        W1: `[H, D, F]`, start of the first layer (in, out).
        b1: `[H, F]`, start of its bias.
        W2: `[H, F, D]`, start of the second layer.
        b2: `[H, D]`, start of its bias.
        gamma: `[H, D]`, scale of the layer norm.
        beta: `[H, D]`, offset of the layer norm.
        delta: `[C]`, learned part of the position scale; its length is the chunk size.
        decay: `[H]` in [0, 1), pull towards the start at each write; None is plain TTT.
        write_every: chunks from write to write, N, counted from a row's reset.
    """

    W1: Tensor
    b1: Tensor
    W2: Tensor
    b2: Tensor
    gamma: Tensor
    beta: Tensor
    delta: Tensor
    decay: Tensor | None
    write_every: int = 1


class State(NamedTuple):
    """Fast weights and the unfinished chunk; float32 or float64.

    Attributes:
        W1: `[B, H, D, F]`, chunk-start weights.
        b1: `[B, H, F]`.
        W2: `[B, H, F, D]`.
        b2: `[B, H, D]`.
        k: `[B, H, C, D]`, keys of the unfinished chunk; rows from `pos % C` on hold nothing.
        g1: `[B, H, C, F]`, rows `eta * g1`.
        x2: `[B, H, C, F]`, rows `gelu(k W1 + b1)`.
        g2: `[B, H, C, D]`, rows `eta * g2`.
        pos: `[B]` int64, frames since the row's last reset.
    """

    W1: Tensor
    b1: Tensor
    W2: Tensor
    b2: Tensor
    k: Tensor
    g1: Tensor
    x2: Tensor
    g2: Tensor
    pos: Tensor


def init_state(params: Params, batch_size: int) -> State:
    """The memory before its first frame: `W0`, nothing written. Differentiable in `W0`.

    Args:
        params: as `Params`; below float32 they are raised to it.
        batch_size: B, batch rows.

    Returns:
        A state in float32, float64 if the parameters are.
    """
    start = [raised(x).repeat(batch_size, *[1] * x.dim()) for x in params[:4]]
    H, D, F = params.W1.shape
    C = params.delta.shape[0]
    k, g1, x2, g2 = (start[0].new_zeros(batch_size, H, C, width) for width in (D, F, F, D))
    pos = torch.zeros(batch_size, dtype=torch.int64, device=k.device)
    return State._make([*start, k, g1, x2, g2, pos])


def chunk(
    params: Params,
    state: State,
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T D"],
    eta: Float[Tensor, "B H T"],
    lengths: Int[Tensor, " B"] | None = None,
) -> tuple[Float[Tensor, "B H T D"], State]:
    """Pass T frames, chunk by chunk (the dual form); differentiable in everything.

        X2q = gelu(q W1 + b1 - (E * (q k^T + 1)) g1),   E_ts = tau_t eta_s for s <= t, else 0
        o = q + LN(X2q W2 + b2 - (E * (X2q X2^T + 1)) g2),   X2 = gelu(k W1 + b1)

    Args:
        params: as `Params`.
        state: where each row stands; never written. Rows may be at different positions.
        q: queries, L2-normalised.
        k: keys, L2-normalised.
        v: values.
        eta: inner learning rates, all factors in it.
        lengths: frames that exist in each row (the first ones); None means all T.

    Returns:
        The outputs, zero at frames that do not exist, and the state after the last frame. Both
        have the state's dtype, float32 or float64, whatever that of the inputs.

    Raises:
        ValueError: a length outside 0..T.
    """
    B, H, T, _ = q.shape
    dtype = state.W1.dtype
    grid = Grid.of(state.pos, H, params.delta.shape[0], T, lengths, params.write_every)
    if grid.n == 0:
        return q.new_zeros(q.shape, dtype=dtype), State(*(x.clone() for x in state))
    q, k, v = grid.lay(q.to(dtype)), grid.lay(k.to(dtype), state.k), grid.lay(v.to(dtype))
    eta = grid.lay(eta.to(dtype).unsqueeze(-1))
    rows = partial(rows_of, B=B, dtype=dtype)
    o, new, g, x2 = scan(
        grid,
        (q, k, v, eta),
        (
            position_scale(params.delta.to(dtype)),
            rows(params.gamma).unsqueeze(1),
            rows(params.beta).unsqueeze(1),
            None if params.decay is None else rows(params.decay).view(-1, 1, 1),
        ),
        start=_layers(rows(x) for x in params[:4]),
        weights=_layers(x.flatten(0, 1) for x in state[:4]),
        held_g=[grid.keep_held(x.flatten(0, 1)) for x in (state.g1, state.g2)],
        held_x=[grid.keep_held(state.x2.flatten(0, 1))],
    )
    new += [grid.tail(k), g[0], *x2, g[1]]
    fields = [x.view_as(y) for x, y in zip(new, state[:-1], strict=True)]
    return grid.pick(o), State._make([*fields, grid.pos])


def _layers(weights: Iterable[Tensor]) -> list[Tensor]:
    """Weights as they are, biases `[N, F]` as `[N, 1, F]`."""
    return [x.unsqueeze(1) if x.dim() == 2 else x for x in weights]


@torch.no_grad()
def step(
    params: Params,
    state: State,
    q: Float[Tensor, "B H 1 D"],
    k: Float[Tensor, "B H 1 D"],
    v: Float[Tensor, "B H 1 D"],
    eta: Float[Tensor, "B H 1"],
    exec_mask: Bool[Tensor, " B"] | None = None,
) -> Float[Tensor, "B H 1 D"]:
    """Pass one frame; the state is written in place. No gradients.

    The low-rank form: the weights are only read, and the frame appends a row to the buffers,

        x2q = gelu(q W1 + b1 - tau_t (q . k_buf + 1) g1_buf)
        o = q + LN(x2q W2 + b2 - tau_t (x2q . x2_buf + 1) g2_buf)

    until frame C-1 writes all C rows at once, or drops them where it is not the turn of its chunk
    (`write_every`). On CUDA nothing depends on a position on the host, so the call can be captured
    in a graph; there the write is a masked one at every frame.

    Args:
        params: as `Params`.
        state: as `State`, contiguous; keeps its storage.
        q: queries, L2-normalised.
        k: keys, L2-normalised.
        v: values.
        eta: inner learning rates, all factors in it.
        exec_mask: rows that have a frame; the others keep their state exactly, and their output
            means nothing. None is all.

    Returns:
        The output, in the state's dtype.
    """
    W1, W2, k_buf, g1, x2, g2 = (x.view(-1, *x.shape[2:]) for x in state if x.dim() == 4)
    b1, b2 = (x.view(-1, 1, x.shape[2]) for x in (state.b1, state.b2))
    fast = Fast([W1, W2], [b1, b2], [k_buf, x2], [g1, g2], state.pos)
    slow = Slow(params.gamma, params.beta, params.delta, params.decay, params[:4])
    return advance(slow, fast, q, k, v, eta, exec_mask, params.write_every)


def inner_loss(
    params: Params, state: State, k: Float[Tensor, "B H T D"], v: Float[Tensor, "B H T D"]
) -> Float[Tensor, "B H T"]:
    """`1/2 ||LN(f(k)) - (v - k)||^2` of frames, at the chunk-start weights of `state`."""
    W1 = state.W1
    hidden = gelu(torch.einsum("bhtd,bhdf->bhtf", k.to(W1.dtype), W1) + state.b1.unsqueeze(2))
    z = torch.einsum("bhtf,bhfd->bhtd", hidden, state.W2) + state.b2.unsqueeze(2)
    gamma, beta = (x.to(W1.dtype).unsqueeze(1) for x in (params.gamma, params.beta))
    error = gamma * normalise(z).xh + beta - (v - k).to(W1.dtype)
    return 0.5 * error.square().sum(-1)
