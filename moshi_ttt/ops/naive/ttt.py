"""TTT-Linear and TTT-MLP by definition; see the package for what a definition is.

The memory of one head is a function `f` whose weights `W` are trained while frames pass,
arXiv:2407.04620 (section 2.1: a hidden state that is a model; 2.3: keys, values and queries as
views; 2.4: gradients in mini-batches, here chunks of C frames; 2.7: learned W0 and eta). For frame
t of a chunk, counted from 0, with W the weights at the start of that chunk:

    l(W; k, v) = 1/2 || LN(f_W(k)) - (v - k) ||^2           inner loss, LN with gamma, beta
    g_s        = dl/dW at (W; k_s, v_s)                      gradient at the chunk-start weights
    tau_t      = max(0, 1/(t+1) + delta_t)                   learned scale of a position
    W_t        = W - tau_t * sum_{s<=t} eta_s g_s            what frame t reads: its own write too
    o_t        = q_t + LN(f_{W_t}(q_t))
    W         <- W_{C-1} - decay * (W_{C-1} - W0)            after frame C-1 of every N-th chunk

and after no other frame. N (`write_every`) is 1 in the paper; the other chunks leave W as it was,
and what their frames would have written is dropped.

The decay is not the paper's: without it the norm of the last layer grows for ever (LN makes the
loss blind to it), and after hours nothing new is learned. `decay = None` is the paper's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Weights = dict[str, Tensor]
"""Name -> tensor: `[H, ...]` for a start or one row, `[B, H, ...]` in a `State`."""

LN_EPS = 1e-6


class State(NamedTuple):
    """Where every batch row stands.

    Attributes:
        W: weights at the start of each row's unfinished chunk, each `[B, H, ...]`.
        pairs: for each row the `(k [H, D], v [H, D], eta [H])` of the unfinished chunk's frames.
        pos: for each row the frames seen since its start; `pos % C` of them are in `pairs`.
    """

    W: Weights
    pairs: list[list[tuple[Tensor, Tensor, Tensor]]]
    pos: list[int]


def init_state(W0: Weights, batch_size: int) -> State:
    """Every row at the learned start `W0`, nothing seen."""
    W = {name: w0.expand(batch_size, *w0.shape) for name, w0 in W0.items()}
    return State(W, [[] for _ in range(batch_size)], [0] * batch_size)


def linear(x: Float[Tensor, "H D"], W: Weights) -> Float[Tensor, "H D"]:
    """TTT-Linear's function of one frame: `f(x) = x W1 + b1`."""
    return torch.einsum("hd,hde->he", x, W["W1"]) + W["b1"]


def mlp(x: Float[Tensor, "H D"], W: Weights) -> Float[Tensor, "H D"]:
    """TTT-MLP's function of one frame: `f(x) = gelu_tanh(x W1 + b1) W2 + b2`."""
    hidden = F.gelu(torch.einsum("hd,hdf->hf", x, W["W1"]) + W["b1"], approximate="tanh")
    return torch.einsum("hf,hfd->hd", hidden, W["W2"]) + W["b2"]


def layer_norm(
    z: Float[Tensor, "*rows D"], gamma: Float[Tensor, "*rows D"], beta: Float[Tensor, "*rows D"]
) -> Float[Tensor, "*rows D"]:
    """`gamma * (z - mean) / sqrt(var + 1e-6) + beta`, population variance over the last axis."""
    centred = z - z.mean(-1, keepdim=True)
    return gamma * centred / (centred.square().mean(-1, keepdim=True) + LN_EPS).sqrt() + beta


def inner_loss(
    f: Callable[[Tensor, Weights], Tensor],
    W: Weights,
    gamma: Float[Tensor, "H D"],
    beta: Float[Tensor, "H D"],
    k: Float[Tensor, "H D"],
    v: Float[Tensor, "H D"],
) -> Float[Tensor, " H"]:
    """What the memory is trained on while it runs: `1/2 || LN(f_W(k)) - (v - k) ||^2`."""
    return 0.5 * (layer_norm(f(k, W), gamma, beta) - (v - k)).square().sum(-1)


def inner_gradient(
    f: Callable[[Tensor, Weights], Tensor],
    W: Weights,
    gamma: Float[Tensor, "H D"],
    beta: Float[Tensor, "H D"],
    k: Float[Tensor, "H D"],
    v: Float[Tensor, "H D"],
) -> Weights:
    """`dl/dW` at `W`, itself differentiable where an outer gradient is asked for."""
    inputs = (*W.values(), gamma, beta, k, v)
    outer = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    leaf = {n: w for n, w in W.items() if not (outer and w.requires_grad)}
    at = W | {n: w.detach().requires_grad_() for n, w in leaf.items()}
    with torch.enable_grad():
        loss = inner_loss(f, at, gamma, beta, k, v).sum()  # heads share no weight
        grads = torch.autograd.grad(loss, list(at.values()), create_graph=outer)
    return dict(zip(at, grads, strict=True))


def tau(delta: Float[Tensor, " C"], t: int) -> Float[Tensor, ""]:
    """Scale of the write that frame t of a chunk reads: `max(0, 1/(t+1) + delta_t)`."""
    return torch.clamp(1 / (t + 1) + delta[t], min=0)


def writes(c: int, N: int) -> bool:
    """Whether chunk c, counted from the row's start, is written: every N-th, chunk N-1 first."""
    return (c + 1) % N == 0


def forget(W: Weights, W0: Weights, decay: Float[Tensor, " H"] | None) -> Weights:
    """`W - decay * (W - W0)`, a decay per head; None leaves W as it is."""
    if decay is None:
        return W
    return {n: w - _per_head(decay, w) * (w - W0[n]) for n, w in W.items()}


def ttt_linear(
    W0: Weights,
    gamma: Float[Tensor, "H D"],
    beta: Float[Tensor, "H D"],
    delta: Float[Tensor, " C"],
    decay: Float[Tensor, " H"] | None,
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T D"],
    eta: Float[Tensor, "B H T"],
    state: State | None = None,
    lengths: Sequence[int] | None = None,
    write_every: int = 1,
) -> tuple[Float[Tensor, "B H T D"], State]:
    """TTT-Linear, `f(x) = x W1 + b1`, by definition (equations at the top of the module).

    Args:
        W0: learned start, `{"W1": [H, D, D], "b1": [H, D]}`.
        gamma: scale of the memory's layer norm.
        beta: shift of the memory's layer norm.
        delta: learned part of the position scale; its length is the chunk size C, in frames.
        decay: share of the way back to W0 taken after each chunk, per head; None for none.
        q: queries, L2-normalised by the caller.
        k: keys, L2-normalised by the caller.
        v: values.
        eta: inner learning rate of each frame, `base_lr / D` included.
        state: where each row stands; None starts every row at W0.
        lengths: frames of each row that exist (the first ones); None for all T. The outputs of
            the others are 0, and they move nothing.
        write_every: chunks from write to write, N.

    Returns:
        The outputs and the state after them. Both carry gradients to everything above.

    Source: arXiv:2407.04620, sections 2.1, 2.3, 2.4 and 2.7.
    """
    return _run(linear, W0, gamma, beta, delta, decay, q, k, v, eta, state, lengths, write_every)


def ttt_mlp(
    W0: Weights,
    gamma: Float[Tensor, "H D"],
    beta: Float[Tensor, "H D"],
    delta: Float[Tensor, " C"],
    decay: Float[Tensor, " H"] | None,
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T D"],
    eta: Float[Tensor, "B H T"],
    state: State | None = None,
    lengths: Sequence[int] | None = None,
    write_every: int = 1,
) -> tuple[Float[Tensor, "B H T D"], State]:
    """TTT-MLP, `f(x) = gelu_tanh(x W1 + b1) W2 + b2`, by definition.

    Arguments and result are those of `ttt_linear`; the start is `{"W1": [H, D, F], "b1": [H, F],
    "W2": [H, F, D], "b2": [H, D]}`.

    Source: arXiv:2407.04620, sections 2.1, 2.3, 2.4 and 2.7.
    """
    return _run(mlp, W0, gamma, beta, delta, decay, q, k, v, eta, state, lengths, write_every)


def _run(
    f: Callable[[Tensor, Weights], Tensor],
    W0: Weights,
    gamma: Tensor,
    beta: Tensor,
    delta: Tensor,
    decay: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    state: State | None,
    lengths: Sequence[int] | None,
    write_every: int,
) -> tuple[Tensor, State]:
    B, _, T, _ = q.shape
    C = len(delta)
    state = init_state(W0, B) if state is None else state
    lengths = [T] * B if lengths is None else lengths
    outputs, ends = [], []
    for b in range(B):
        W = {name: w[b] for name, w in state.W.items()}
        pairs, pos = list(state.pairs[b]), state.pos[b]
        written = {name: torch.zeros_like(w) for name, w in W.items()}  # sum of eta_s g_s
        for k_s, v_s, eta_s in pairs:
            written = _add(written, eta_s, inner_gradient(f, W, gamma, beta, k_s, v_s))

        frames = [torch.zeros_like(q[b, :, s]) for s in range(T)]
        for s in range(lengths[b]):
            c, t = divmod(pos, C)
            pairs.append((k[b, :, s], v[b, :, s], eta[b, :, s]))
            gradient = inner_gradient(f, W, gamma, beta, k[b, :, s], v[b, :, s])
            written = _add(written, eta[b, :, s], gradient)
            W_t = {name: w - tau(delta, t) * written[name] for name, w in W.items()}
            frames[s] = q[b, :, s] + layer_norm(f(q[b, :, s], W_t), gamma, beta)
            pos += 1
            if t == C - 1:
                if writes(c, write_every):
                    W = forget(W_t, W0, decay)
                pairs = []
                written = {name: torch.zeros_like(w) for name, w in W.items()}
        outputs.append(torch.stack(frames, dim=1) if T else q[b])
        ends.append((W, pairs, pos))

    W = {name: torch.stack([end[0][name] for end in ends]) for name in W0}
    return torch.stack(outputs), State(W, [end[1] for end in ends], [end[2] for end in ends])


def _add(total: Weights, eta: Tensor, gradient: Weights) -> Weights:
    return {n: w + _per_head(eta, w) * gradient[n] for n, w in total.items()}


def _per_head(x: Tensor, like: Tensor) -> Tensor:
    return x.reshape(-1, *[1] * (like.dim() - 1))
