"""Atlas by definition; see the package for what a definition is.

The memory of one head is trained, at every frame, on the last c frames (the Omega rule), with
momentum and, if asked for, Muon, arXiv:2505.23735; c = 1 without Muon is the memory of Titans,
arXiv:2501.00663. With M* the weights at the start of a chunk of C frames, and c = `window`:

    phi(x) = [coef_1 x, coef_2 x*x], or [coef_1 x, coef_2 proj vec(x x^T)], or x
    M(x)   = x + W1 gelu_tanh(W2 phi(x))      deep;    linear: M(x) = W1 phi(x)
    l_i(M) = || M(k_i) - v_i ||^2             inner loss
    S_t = theta_t S_{t-1} + sum_{i = t-c+1..t} gamma_i dl_i/dM (M*)
    M_t = alpha_t M_{t-1} - eta_t NS5(S_t)    without Muon: - eta_t S_t
    o_t = M_t(q_t)                            what frame t reads has its own write in it

and M* <- M_{C-1} after frame C-1 of a chunk. The window reaches back over a chunk's start, with the
gradients of the old frames taken at the new M*, but not over the start of the row. NS5 of an exact
zero is zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Weights = dict[str, Tensor]
"""Name -> tensor: `[H, ...]` for a start or one row, `[B, H, ...]` in a `State`."""

Pair = tuple[Tensor, Tensor, Tensor]
"""`k [H, D]`, `v [H, D]`, `gamma [H]` of one frame of one row."""

NS_COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
NS_EPS = 1e-7


class State(NamedTuple):
    """Where every batch row stands.

    Attributes:
        W: weights after each row's last frame, each `[B, H, ...]`.
        start: weights at the start of each row's unfinished chunk, each `[B, H, ...]`.
        S: momentum after each row's last frame, each `[B, H, ...]`.
        pairs: for each row the `(k, v, gamma)` of its last frames, at most `window - 1`.
        pos: for each row the frames seen since its start.
    """

    W: Weights
    start: Weights
    S: Weights
    pairs: list[list[Pair]]
    pos: list[int]


def init_state(W0: Weights, batch_size: int) -> State:
    """Every row at the learned start `W0`, nothing seen."""
    W = {name: w0.expand(batch_size, *w0.shape) for name, w0 in W0.items()}
    S = {name: torch.zeros_like(w) for name, w in W.items()}
    return State(W, W, S, [[] for _ in range(batch_size)], [0] * batch_size)


def vec(x: Float[Tensor, "H D"]) -> Float[Tensor, "H V"]:
    """Upper triangle of `x x^T`, row by row; the products off its diagonal times sqrt(2)."""
    D = x.shape[-1]
    products = [
        x[:, i] * x[:, j] * (1 if i == j else math.sqrt(2)) for i in range(D) for j in range(i, D)
    ]
    return torch.stack(products, dim=-1)


def phi(
    x: Float[Tensor, "H D"],
    coef: Float[Tensor, "H 2"] | None,
    proj: Float[Tensor, "H R V"] | None,
) -> Float[Tensor, "H P"]:
    """Polynomial features of degree 2; without `coef`, x itself."""
    if coef is None:
        return x
    square = x * x if proj is None else torch.einsum("hrv,hv->hr", proj, vec(x))
    return torch.cat([coef[:, :1] * x, coef[:, 1:] * square], dim=-1)


def read(
    W: Weights,
    x: Float[Tensor, "H D"],
    coef: Float[Tensor, "H 2"] | None,
    proj: Float[Tensor, "H R V"] | None,
) -> Float[Tensor, "H D"]:
    """The memory's function of one frame, `x + W1 gelu_tanh(W2 phi(x))`; no W2: `W1 phi(x)`."""
    features = phi(x, coef, proj)
    if "W2" not in W:
        return torch.einsum("hdp,hp->hd", W["W1"], features)
    hidden = F.gelu(torch.einsum("hfp,hp->hf", W["W2"], features), approximate="tanh")
    return x + torch.einsum("hdf,hf->hd", W["W1"], hidden)


def inner_loss(
    W: Weights,
    coef: Float[Tensor, "H 2"] | None,
    proj: Float[Tensor, "H R V"] | None,
    k: Float[Tensor, "H D"],
    v: Float[Tensor, "H D"],
) -> Float[Tensor, " H"]:
    """What one frame adds to the training of the memory: `|| M(k) - v ||^2`."""
    return (read(W, k, coef, proj) - v).square().sum(-1)


def omega_loss(
    W: Weights,
    coef: Float[Tensor, "H 2"] | None,
    proj: Float[Tensor, "H R V"] | None,
    pairs: Sequence[Pair],
) -> Float[Tensor, " H"]:
    """What the memory is trained on: `sum_i gamma_i || M(k_i) - v_i ||^2` over the window."""
    losses = [gamma * inner_loss(W, coef, proj, k, v) for k, v, gamma in pairs]
    return torch.stack(losses).sum(0)


def band(pairs: Sequence[Pair], n: int) -> list[Pair]:
    """The last n frames; fewer where the row has not had as many."""
    return list(pairs[max(0, len(pairs) - n) :])


def inner_gradient(
    W: Weights,
    coef: Float[Tensor, "H 2"] | None,
    proj: Float[Tensor, "H R V"] | None,
    pairs: Sequence[Pair],
) -> Weights:
    """The Omega loss's `d/dW` at `W`, itself differentiable where an outer gradient is wanted."""
    inputs = [*W.values(), *(x for pair in pairs for x in pair)]
    inputs += [x for x in (coef, proj) if x is not None]
    outer = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    leaf = {n: w for n, w in W.items() if not (outer and w.requires_grad)}
    at = W | {n: w.detach().requires_grad_() for n, w in leaf.items()}
    with torch.enable_grad():
        loss = omega_loss(at, coef, proj, pairs).sum()  # heads share no weight
        grads = torch.autograd.grad(loss, list(at.values()), create_graph=outer)
    return dict(zip(at, grads, strict=True))


def momentum(S: Weights, gradient: Weights, theta: Float[Tensor, " H"]) -> Weights:
    """`theta S + gradient`."""
    return {n: _per_head(theta) * s + gradient[n] for n, s in S.items()}


def newton_schulz(S: Float[Tensor, "H rows cols"]) -> Float[Tensor, "H rows cols"]:
    """`X0 = S / (||S||_F + 1e-7)`, then five times `X <- a X + (b A + c A^2) X`, `A = X X^T`.

    A tall matrix is transposed for the steps. An exact zero stays one and passes no gradient.
    """
    X = S / (torch.linalg.vector_norm(S, dim=(-2, -1), keepdim=True) + NS_EPS)
    tall = S.shape[-2] > S.shape[-1]
    X = X.mT if tall else X
    for a, b, c in NS_COEFFICIENTS:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    X = X.mT if tall else X
    zero = (S == 0).all(-1, keepdim=True).all(-2, keepdim=True)
    return torch.where(zero, 0.0, X)  # else the gradient there is that of S / 1e-7


def write(
    W: Weights, S: Weights, alpha: Float[Tensor, " H"], eta: Float[Tensor, " H"], muon: bool
) -> Weights:
    """`alpha W - eta NS5(S)`; `NS5` is left out without Muon."""
    directions = {n: newton_schulz(s) if muon else s for n, s in S.items()}
    return {n: _per_head(alpha) * w - _per_head(eta) * directions[n] for n, w in W.items()}


def atlas(
    W0: Weights,
    coef: Float[Tensor, "H 2"] | None,
    proj: Float[Tensor, "H R V"] | None,
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T D"],
    alpha: Float[Tensor, "B H T"],
    eta: Float[Tensor, "B H T"],
    theta: Float[Tensor, "B H T"],
    gamma: Float[Tensor, "B H T"],
    *,
    chunk_size: int,
    window: int,
    muon: bool = False,
    state: State | None = None,
    lengths: Sequence[int] | None = None,
) -> tuple[Float[Tensor, "B H T D"], State]:
    """Atlas by definition (equations at the top of the module).

    Args:
        W0: learned start; deep `{"W1": [H, D, F], "W2": [H, F, P]}`, linear `{"W1": [H, D, P]}`.
        coef: square roots of the polynomial's coefficients, of degrees 1 and 2; None: P = D.
        proj: projection of the `V = D (D + 1) / 2` products, P = D + R; None: squares, P = 2 D.
        q: queries, L2-normalised by the caller.
        k: keys, L2-normalised by the caller.
        v: values.
        alpha: share of the weights kept at each frame.
        eta: size of a frame's write.
        theta: share of the momentum kept at each frame.
        gamma: weight of a frame in the Omega loss.
        chunk_size: C, in frames.
        window: c, frames the Omega loss looks at, the present one included.
        muon: whether `NS5` is taken of the momentum.
        state: where each row stands; None starts every row at W0.
        lengths: frames of each row that exist (the first ones); None for all T. The outputs of
            the others are 0, and they move nothing.

    Returns:
        The outputs and the state after them. Both carry gradients to everything above.

    Source: arXiv:2505.23735.
    """
    B, _, T, _ = q.shape
    state = init_state(W0, B) if state is None else state
    lengths = [T] * B if lengths is None else lengths
    outputs, ends = [], []
    for b in range(B):
        W, start, S = ({n: x[b] for n, x in part.items()} for part in state[:3])
        pairs, pos = list(state.pairs[b]), state.pos[b]

        out = [torch.zeros_like(q[b, :, s]) for s in range(T)]
        for s in range(lengths[b]):
            pairs = band([*pairs, (k[b, :, s], v[b, :, s], gamma[b, :, s])], window)
            S = momentum(S, inner_gradient(start, coef, proj, pairs), theta[b, :, s])
            W = write(W, S, alpha[b, :, s], eta[b, :, s], muon)
            out[s] = read(W, q[b, :, s], coef, proj)
            pos += 1
            if pos % chunk_size == 0:
                start = W
        outputs.append(torch.stack(out, dim=1) if T else q[b])
        ends.append((W, start, S, band(pairs, window - 1), pos))

    W, start, S = ({n: torch.stack([end[i][n] for end in ends]) for n in W0} for i in range(3))
    return torch.stack(outputs), State(W, start, S, [e[3] for e in ends], [e[4] for e in ends])


def _per_head(x: Tensor) -> Tensor:
    return x.view(-1, 1, 1)
