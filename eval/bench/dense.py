"""What a streamed frame is measured against: the dense form, as published and with our kernels.

Both keep the chunk-start weights and the gradient accumulated since, write that gradient and make
the frame's own weights at every frame. They compute the function of `moshi_ttt.memory`; the
benchmark checks it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from eval.bench.baselines import gelu_slope
from moshi_ttt.memory.ttt import TTT
from moshi_ttt.ops.grid import position_scale
from moshi_ttt.ops.norm import EPS, gelu, gelu_pull, inner_gradient, normalise


class PublishedState:
    """What the published decoder caches.

    Attributes:
        W: chunk-start `W1, b1, ...`: `[B, H, in, out]`, `[B, H, 1, out]`.
        grad: the same shapes, `sum_s eta_s g_s` of the chunk so far.
        conv: for q and for k, `[B, width, conv_width]`, the last projected frames.
        frames: position in the stream, on the host.
    """

    def __init__(self, memory: TTT, batch_size: int) -> None:
        s = memory.init_state(batch_size)
        self.W = [x if x.dim() == 4 else x.unsqueeze(2) for x in s.fast[: len(memory.op.WEIGHTS)]]
        self.grad = [torch.zeros_like(x) for x in self.W]
        shape = batch_size, memory.width, memory.config.options["conv_width"]
        self.conv = [s.conv.new_zeros(shape) for _ in range(2)]
        self.frames = 0


class Published:
    """A whole layer, decoded as the paper's own PyTorch code decodes (arXiv:2407.04620).

    Plain operations for what the equations say, one after the other: q, k and v projected each,
    convolution windows rolled, layer norm, its gradient and GELU's written out. A frame makes its
    dense gradients by einsum, adds the accumulated ones, reads with `W_t = W - tau_t * gradient`,
    and copies the gradients (at a chunk's end, the weights) into the cache. Leaner than that code
    in one thing: it has no dimension for several frames. Decay towards W0 and the norms of q, k
    and of the output are this project's.

    Args:
        memory: the layer whose function it computes, with its slow weights.
    """

    def __init__(self, memory: TTT) -> None:
        self.memory = memory
        with torch.no_grad():
            assert memory.qkv_proj is not None
            self.projections = memory.qkv_proj.weight.chunk(3)
            self.taps, self.bias = memory.conv_weight.chunk(2), memory.conv_bias.chunk(2)
            self.tau = 1 / torch.arange(1, memory.config.chunk_size + 1)

    @torch.no_grad()
    def step(self, x: Tensor, state: PublishedState) -> Tensor:
        """Pass one frame `[B, 1, width]`, all rows."""
        m, B = self.memory, x.shape[0]
        H, D, W = m.num_heads, m.head_dim, state.W
        last = (state.frames + 1) % m.config.chunk_size == 0
        q, k, v = (F.linear(x, weight) for weight in self.projections)
        q, k = self._convolve(0, q, state), self._convolve(1, k, state)
        q, k, v = (y.reshape(B, 1, H, D).transpose(1, 2) for y in (q, k, v))
        q, k = F.normalize(q, dim=-1, eps=EPS), F.normalize(k, dim=-1, eps=EPS)
        gate = torch.einsum("btc,hc->bht", x, m.lr_weight) + m.lr_bias.view(1, H, 1)
        eta = (m.config.options["base_lr"] * m.lr_scale * torch.sigmoid(gate) / D).unsqueeze(-1)
        at = state.frames % m.config.chunk_size
        tau = torch.clamp_min((self.tau + m.delta)[at : at + 1], 0.0).view(1, 1, 1, 1)
        gamma, beta = m.gamma.view(H, 1, D), m.beta.view(H, 1, D)

        X, Z = [k], [k @ W[0] + W[1]]
        for l in range(2, len(W), 2):
            X.append(gelu(Z[-1]))
            Z.append(X[-1] @ W[l] + W[l + 1])
        G = [_loss_gradient(Z[-1], v - k, gamma, beta)]
        for l in reversed(range(2, len(W), 2)):
            G.insert(0, G[0] @ W[l].transpose(-2, -1) * gelu_slope(Z[l // 2 - 1]))
        grad, now = [], []
        for l, g in enumerate(G):
            outer = torch.einsum("bhti,bhtj->bhij", X[l], g)
            grad += [eta * outer + state.grad[2 * l], eta * g + state.grad[2 * l + 1]]
        for w, g in zip(W, grad, strict=True):
            now.append(w - g * tau)
        z = q @ now[0] + now[1]
        for l in range(2, len(W), 2):
            z = gelu(z) @ now[l] + now[l + 1]
        o = q + gamma * _standard(z)[0] + beta
        self._store(state, now, grad, last)
        o = o / torch.sqrt(o.pow(2).mean(-1, keepdim=True) + EPS) * m.out_scale.view(H, 1, D)
        assert m.o_proj is not None
        return F.linear(o.transpose(1, 2).reshape(B, 1, H * D), m.o_proj.weight)

    def _convolve(self, i: int, y: Tensor, state: PublishedState) -> Tensor:
        """Short convolution of q (0) or k (1)."""
        window = torch.roll(state.conv[i], shifts=-1, dims=-1)
        window[:, :, -1] = y[:, 0]
        state.conv[i].copy_(window)
        return (torch.sum(window * self.taps[i], dim=-1) + self.bias[i]).unsqueeze(1)

    def _store(
        self, state: PublishedState, now: list[Tensor], grad: list[Tensor], last: bool
    ) -> None:
        """The cache after the frame."""
        state.frames += 1
        if not last:
            for old, new in zip(state.grad, grad, strict=True):
                old.copy_(new)
            return
        params = self.memory.params()
        for i, (old, new) in enumerate(zip(state.W, now, strict=True)):
            if params.decay is not None:
                new = new - params.decay.view(-1, 1, 1) * (new - params[i].view_as(new[0]))
            old.copy_(new)
            state.grad[i].zero_()


def _standard(z: Tensor) -> tuple[Tensor, Tensor]:
    """`(z - mu) / sigma`, and sigma."""
    mu, var = z.mean(dim=-1, keepdim=True), z.var(dim=-1, keepdim=True, unbiased=False)
    std = torch.sqrt(var + EPS)
    return (z - mu) / std, std


def _loss_gradient(z: Tensor, target: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Gradient of `1/2 ||gamma * xh + beta - target||^2` at `z`."""
    xh, std = _standard(z)
    y = gamma * xh + beta
    u = (y - target) * gamma
    inner = (u * xh).mean(dim=-1, keepdim=True)
    return (u - u.mean(dim=-1, keepdim=True) - xh * inner) / std


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
    """The dense form made with our kernels, with an op's interface: inside our own layer.

    Every frame adds its dense gradient to the accumulated one, in place, and makes its own weights
    `W_t = W - tau_t * grad` to read with. Faster than the published code; what is left between it
    and the low-rank form is the form.
    """

    def __init__(self, op: ModuleType) -> None:
        self.op = op

    def init_state(self, params: Any, batch_size: int) -> DenseState:
        """The memory before its first frame."""
        s = self.op.init_state(params, batch_size)
        W = [x if x.dim() == 4 else x.unsqueeze(2) for x in s[: len(self.op.WEIGHTS)]]
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
        assert params.write_every == 1
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
