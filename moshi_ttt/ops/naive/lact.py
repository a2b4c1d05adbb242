"""LaCT by definition; see the package for what a definition is.

The memory of one head is a SwiGLU, or r of them stacked, that is trained once a chunk of C frames,
arXiv:2505.23884 (large chunks; a SwiGLU as the fast weights; Muon; row norms kept). With W the
weights at the start of a chunk:

    f(x) = Wo (silu(Wg x) * (Wu x))           M = f_r o ... o f_1; residual: each x + f_j(x)
    o_t  = M_W(q_t)                           all frames of a chunk read the chunk-start weights
    l(W; k, v) = -<M_W(k), v>                 inner loss

and after frame C-1, and after no other frame, for each of Wg, Wu, Wo:

    G  = -sum_s lr_s dl/dW (W; k_s, v_s)      a learning rate for each of the three, lg, lu, lo
    D <- G + m D                              m, w: means over the chunk of the frames' gates
    U  = W + eta * w * NS5(D)                 NS5: five Newton-Schulz steps, as in Muon
    W <- U / (||row of U|| + 1e-5) * ||row of W0||

A matrix whose D is exactly 0 is not written at all. The write gate w and the learned eta are not
the paper's: NS5 forgets the size of D, so without them silence would write at full strength.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Weights = dict[str, Tensor]
"""Name -> tensor: `[H, r, ...]` for a start or one row, `[B, H, r, ...]` in a `State`."""

Frame = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""`k [H, D]`, `v [H, D]`, `lr [H, 3]`, `m [H]`, `w [H]` of one frame of one row."""

RATES = ("Wg", "Wu", "Wo")
"""Whose learning rate each entry of `lr` is."""

NS_COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
NS_EPS = 1e-7
ROW_EPS = 1e-5


class State(NamedTuple):
    """Where every batch row stands.

    Attributes:
        W: weights at the start of each row's unfinished chunk, each `[B, H, r, ...]`.
        D: what each row last put into Newton-Schulz, each `[B, H, r, ...]`; zero before.
        frames: for each row the `(k, v, lr, m, w)` of the unfinished chunk's frames.
        pos: for each row the frames seen since its start; `pos % C` of them are in `frames`.
    """

    W: Weights
    D: Weights
    frames: list[list[Frame]]
    pos: list[int]


def init_state(W0: Weights, batch_size: int) -> State:
    """Every row at the learned start `W0`, nothing seen."""
    W = {name: w0.expand(batch_size, *w0.shape) for name, w0 in W0.items()}
    D = {name: torch.zeros_like(w) for name, w in W.items()}
    return State(W, D, [[] for _ in range(batch_size)], [0] * batch_size)


def swiglu(
    x: Float[Tensor, "H D"],
    Wg: Float[Tensor, "H F D"],
    Wu: Float[Tensor, "H F D"],
    Wo: Float[Tensor, "H D F"],
) -> Float[Tensor, "H D"]:
    """`f(x) = Wo (silu(Wg x) * (Wu x))`."""
    a, b = torch.einsum("hfd,hd->hf", Wg, x), torch.einsum("hfd,hd->hf", Wu, x)
    return torch.einsum("hdf,hf->hd", Wo, F.silu(a) * b)


def read(W: Weights, x: Float[Tensor, "H D"], residual: bool) -> Float[Tensor, "H D"]:
    """The memory's function of one frame: `M = f_r o ... o f_1`; residual: each `x + f_j(x)`."""
    for j in range(W["Wo"].shape[1]):
        y = swiglu(x, W["Wg"][:, j], W["Wu"][:, j], W["Wo"][:, j])
        x = x + y if residual else y
    return x


def inner_loss(
    W: Weights, k: Float[Tensor, "H D"], v: Float[Tensor, "H D"], residual: bool
) -> Float[Tensor, " H"]:
    """What the memory is trained on while it runs: `-<M(k), v>`."""
    return -(read(W, k, residual) * v).sum(-1)


def inner_gradient(
    W: Weights, k: Float[Tensor, "H D"], v: Float[Tensor, "H D"], residual: bool
) -> Weights:
    """`dl/dW` at `W`, itself differentiable where an outer gradient is asked for."""
    outer = torch.is_grad_enabled() and any(x.requires_grad for x in (*W.values(), k, v))
    leaf = {n: w for n, w in W.items() if not (outer and w.requires_grad)}
    at = W | {n: w.detach().requires_grad_() for n, w in leaf.items()}
    with torch.enable_grad():
        loss = inner_loss(at, k, v, residual).sum()  # heads share no weight
        grads = torch.autograd.grad(loss, list(at.values()), create_graph=outer)
    return dict(zip(at, grads, strict=True))


def pull(W: Weights, frames: Sequence[Frame], residual: bool) -> Weights:
    """`G = -sum_s lr_s dl/dW (W; k_s, v_s)` of a chunk's frames."""
    G = {name: torch.zeros_like(w) for name, w in W.items()}
    for k, v, lr, _, _ in frames:
        gradient = inner_gradient(W, k, v, residual)
        for i, name in enumerate(RATES):
            G[name] = G[name] - _per_head(lr[:, i]) * gradient[name]
    return G


def add_momentum(G: Weights, D: Weights, m: Float[Tensor, " H"]) -> Weights:
    """`G + m D`."""
    return {name: g + _per_head(m) * D[name] for name, g in G.items()}


def newton_schulz(D: Float[Tensor, "*heads rows cols"]) -> Float[Tensor, "*heads rows cols"]:
    """`X0 = D / (||D||_F + 1e-7)`, then five times `X <- a X + (b A + c A^2) X`, `A = X X^T`.

    A tall matrix is transposed for the steps. An exact zero stays one and passes no gradient.
    """
    X = D / (torch.linalg.vector_norm(D, dim=(-2, -1), keepdim=True) + NS_EPS)
    tall = D.shape[-2] > D.shape[-1]
    X = X.mT if tall else X
    for a, b, c in NS_COEFFICIENTS:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    X = X.mT if tall else X
    return torch.where(_is_zero(D), 0.0, X)  # else the gradient there is that of D / 1e-7


def row_normalise(
    U: Float[Tensor, "*heads rows cols"], start: Float[Tensor, "*heads rows cols"]
) -> Float[Tensor, "*heads rows cols"]:
    """`U / (||row of U|| + 1e-5) * ||row of start||`; the gradient of a zero row's norm is 0."""
    norm, target = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (U, start))
    return U / (norm + ROW_EPS) * target


def write(W: Weights, W0: Weights, D: Weights, size: Float[Tensor, " H"], muon: bool) -> Weights:
    """`W <- row_normalise(W + size * NS5(D))`, size = eta * w; `NS5` is left out without Muon."""
    new = {}
    for name, w in W.items():
        direction = newton_schulz(D[name]) if muon else D[name]
        written = row_normalise(w + _per_head(size) * direction, W0[name])
        new[name] = torch.where(_is_zero(D[name]), w, written)
    return new


def lact(
    W0: Weights,
    eta: Float[Tensor, " H"],
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T D"],
    lr: Float[Tensor, "B H T 3"],
    m: Float[Tensor, "B H T"],
    w: Float[Tensor, "B H T"],
    *,
    chunk_size: int,
    momentum: bool = True,
    muon: bool = True,
    residual: bool = False,
    state: State | None = None,
    lengths: Sequence[int] | None = None,
) -> tuple[Float[Tensor, "B H T D"], State]:
    """LaCT by definition (equations at the top of the module).

    Args:
        W0: learned start, `{"Wg": [H, r, F, D], "Wu": [H, r, F, D], "Wo": [H, r, D, F]}`.
        eta: size of a write, per head.
        q: queries, scaled, silu'ed and L2-normalised by the caller.
        k: keys, likewise.
        v: values, silu'ed by the caller.
        lr: inner learning rates of each frame for Wg, Wu, Wo, positive; the r SwiGLUs share them.
        m: momentum gate of each frame, 0..1; read only with `momentum`.
        w: write gate of each frame, 0..1.
        chunk_size: C, in frames.
        momentum: whether D is carried; without it `D = G`.
        muon: whether `NS5` is taken; without it `U = W + eta * w * D`.
        residual: whether each SwiGLU adds its input.
        state: where each row stands; None starts every row at W0.
        lengths: frames of each row that exist (the first ones); None for all T. The outputs of
            the others are 0, and they move nothing.

    Returns:
        The outputs and the state after them. Both carry gradients to everything above.

    Source: arXiv:2505.23884.
    """
    B, _, T, _ = q.shape
    state = init_state(W0, B) if state is None else state
    lengths = [T] * B if lengths is None else lengths
    outputs, ends = [], []
    for b in range(B):
        W = {name: x[b] for name, x in state.W.items()}
        D = {name: x[b] for name, x in state.D.items()}
        frames, pos = list(state.frames[b]), state.pos[b]

        out = [torch.zeros_like(q[b, :, s]) for s in range(T)]
        for s in range(lengths[b]):
            out[s] = read(W, q[b, :, s], residual)
            frames.append((k[b, :, s], v[b, :, s], lr[b, :, s], m[b, :, s], w[b, :, s]))
            pos += 1
            if pos % chunk_size == 0:
                G = pull(W, frames, residual)
                D = add_momentum(G, D, _mean([f[3] for f in frames])) if momentum else G
                W = write(W, W0, D, eta * _mean([f[4] for f in frames]), muon)
                frames = []
        outputs.append(torch.stack(out, dim=1) if T else q[b])
        ends.append((W, D, frames, pos))

    W = {name: torch.stack([end[0][name] for end in ends]) for name in W0}
    D = {name: torch.stack([end[1][name] for end in ends]) for name in W0}
    return torch.stack(outputs), State(W, D, [end[2] for end in ends], [end[3] for end in ends])


def _mean(gates: list[Tensor]) -> Tensor:
    return torch.stack(gates).mean(0)


def _is_zero(x: Tensor) -> Tensor:
    """Matrices that are exactly 0, `[..., 1, 1]`."""
    return (x == 0).all(-1, keepdim=True).all(-2, keepdim=True)


def _per_head(x: Tensor) -> Tensor:
    return x.view(-1, 1, 1, 1)
