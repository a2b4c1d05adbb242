"""What the memories are measured against: plain autograd, and the dense streaming form.

Both compute the function of `moshi_ttt.ops.ttt_linear` and `ttt_mlp`; the benchmark checks it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moshi_ttt.ops.grid import Grid, position_scale
from moshi_ttt.ops.norm import EPS, gelu, gelu_pull, inner_gradient, normalise


def plain_scan(
    grid: Grid,
    frames: tuple[Tensor, Tensor, Tensor, Tensor],
    slow: tuple[Tensor, Tensor, Tensor, Tensor | None],
    start: list[Tensor],
    weights: list[Tensor],
    held_g: list[Tensor],
    held_x: list[Tensor],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """`moshi_ttt.ops.scan.scan` as one writes it down: chunk after chunk, through autograd.

    For rows that stand together at the start of a chunk.

    Raises:
        ValueError: they do not, or the call ends inside a chunk.
    """
    if grid.start != 0 or grid.leftover:
        raise ValueError("the baseline takes whole chunks")
    q, k, v, eta = frames
    tau, gamma, beta, decay = slow
    lower = tau.unsqueeze(1).expand(-1, grid.C).tril()
    outputs = []
    for i in range(grid.n):
        X, Z = [k[i]], []
        for W, b in zip(weights[::2], weights[1::2], strict=True):
            if Z:
                X.append(gelu(Z[-1]))
            Z.append(torch.baddbmm(b, X[-1], W))
        xh, rstd = _ln(Z[-1])
        u = gamma * (gamma * xh + beta - (v[i] - k[i]))
        g = (u - u.mean(-1, keepdim=True) - xh * (u * xh).mean(-1, keepdim=True)) * rstd
        G = [eta[i] * g]
        for W, z in zip(reversed(weights[2::2]), reversed(Z[:-1]), strict=True):
            G.insert(0, (G[0] @ W.mT) * _gelu_slope(z))
        x, z = q[i], q[i]
        for l, (W, b) in enumerate(zip(weights[::2], weights[1::2], strict=True)):
            if l:
                x = gelu(z)
            z = torch.baddbmm(b, x, W) - (lower * (x @ X[l].mT + 1)) @ G[l]
        outputs.append(q[i] + gamma * _ln(z)[0] + beta)
        new = []
        for l, (W, b) in enumerate(zip(weights[::2], weights[1::2], strict=True)):
            new.append(torch.baddbmm(W, (tau[-1] * X[l]).mT, G[l], alpha=-1))
            new.append(b - tau[-1] * G[l].sum(1, keepdim=True))
        if decay is not None:
            new = [torch.lerp(w, w0, decay) for w, w0 in zip(new, start, strict=True)]
        weights = new
    return torch.stack(outputs), list(weights), held_g, held_x


def _ln(z: Tensor) -> tuple[Tensor, Tensor]:
    """`(z - mu) / sigma` and `1 / sigma`."""
    z = z - z.mean(-1, keepdim=True)
    rstd = (z.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return z * rstd, rstd


def _gelu_slope(x: Tensor) -> Tensor:
    """`gelu'(x)`, of the tanh form."""
    c, a = (2 / torch.pi) ** 0.5, 0.044715
    th = torch.tanh(c * x * (1 + a * x * x))
    return 0.5 * (1 + th) + 0.5 * c * x * (1 - th * th) * (1 + 3 * a * x * x)


class DenseState(NamedTuple):
    """Chunk-start weights and the gradient accumulated since, one pair per weight and bias.

    Attributes:
        W: `[B, H, in, out]`, `[B, H, 1, out]`, ... per layer.
        grad: the same shapes, `sum_s eta_s g_s` of the chunk so far.
        k: an empty tensor of the state's dtype and device.
        pos: `[B]` int64.
    """

    W: list[Tensor]
    grad: list[Tensor]
    k: Tensor
    pos: Tensor


class DenseOp:
    """The streaming form of the paper's own code, with an op's interface.

    Every frame adds its dense gradient to the accumulated one, in place, and makes its own weights
    `W_t = W - tau_t * grad` to read with.
    """

    def __init__(self, op: ModuleType) -> None:
        self.op = op

    def init_state(self, params: Any, batch_size: int) -> DenseState:
        """The memory before its first frame."""
        s = self.op.init_state(params, batch_size)
        W = [x if x.dim() == 4 else x.unsqueeze(2) for x in s[: len(params) - 4]]
        return DenseState(W, [torch.zeros_like(x) for x in W], s.k.new_empty(0), s.pos)

    @torch.no_grad()
    def step(
        self,
        params: Any,
        state: DenseState,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        eta: Tensor,
        exec_mask: Tensor | None = None,
    ) -> Tensor:
        """Pass one frame, all rows."""
        W, grad, C = state.W, state.grad, params.delta.shape[0]
        gamma, beta = params.gamma.unsqueeze(1), params.beta.unsqueeze(1)
        t = state.pos % C
        tau = position_scale(params.delta)[t].view(-1, 1, 1, 1)
        X, Z = [k], []
        for l in range(0, len(W), 2):
            if l:
                X.append(gelu(Z[-1]))
            Z.append(X[-1] @ W[l] + W[l + 1])
        G, _ = inner_gradient(normalise(Z[-1]), gamma * gamma, gamma * (beta - v + k))
        G = G * eta.unsqueeze(-1)
        for l in reversed(range(0, len(W), 2)):
            below = G @ W[l].mT if l else None
            grad[l].addcmul_(X[l // 2].mT, G)
            grad[l + 1].add_(G)
            if below is not None:
                G = gelu_pull(below, Z[l // 2 - 1])
        z = q
        for l in range(0, len(W), 2):
            x = gelu(z) if l else q
            z = x @ (W[l] - tau * grad[l]) + (W[l + 1] - tau * grad[l + 1])
        done = t == C - 1
        if done.is_cuda or done.any():
            done = done.view(-1, 1, 1, 1)
            for i, (w, g) in enumerate(zip(W, grad, strict=True)):
                new = w - tau * g
                if params.decay is not None:
                    w0 = params[i].view_as(w[0])
                    new = new - params.decay.view(-1, 1, 1) * (new - w0)
                w.copy_(torch.where(done, new, w))
                g.masked_fill_(done, 0)
        state.pos.add_(1)
        return q + beta + gamma * normalise(z).xh
