"""One frame of a stream, in the low-rank form: weights are read, rows are appended to buffers.

It serves the memories that `scan` serves, with the same letters. A frame computes its own row G at
the chunk-start weights, puts it and its X at place `t = pos % C` of the buffers, and reads

    Zq = Xq W + b - tau_t (Xq . X_buf + 1) G_buf        over the rows 0..t

Frame C-1 writes all rows into the weights at once, or drops them where it is not the turn of its
chunk (`write_every`). Nothing here reads a position on the host when the state is on CUDA. On the
CPU each row takes slices of its own buffers, neighbours that stand together in one: what a row gets
is then the same to the bit wherever the others stand, and whether they have a frame.
"""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from moshi_ttt.ops.grid import heads_of, position_scale
from moshi_ttt.ops.norm import gelu, gelu_pull, normalise, pull

_ONE = torch.ones((), device="cpu")
"""On the CPU an op takes it faster than a Python number."""


class Fast(NamedTuple):
    """Views of a state that are written in place; N = B * H.

    Attributes:
        W: per layer `[N, in, out]`.
        b: per layer `[N, 1, out]`.
        X: per layer `[N, C, in]`, buffer.
        G: per layer `[N, C, out]`, buffer.
        pos: `[B]` int64.
    """

    W: list[Tensor]
    b: list[Tensor]
    X: list[Tensor]
    G: list[Tensor]
    pos: Tensor


class Slow(NamedTuple):
    """Learned tensors as a frame uses them.

    Attributes:
        gamma: `[H, D]`.
        beta: `[H, D]`.
        delta: `[C]`.
        decay: `[H]` or None.
        start: W0 and b0 of each layer, flat: `[H, in, out]`, `[H, out]`, ...
    """

    gamma: Tensor
    beta: Tensor
    delta: Tensor
    decay: Tensor | None
    start: tuple[Tensor, ...]


def advance(
    slow: Slow,
    fast: Fast,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    exec_mask: Tensor | None,
    write_every: int,
) -> Tensor:
    """Pass one frame and write the state in place.

    Args:
        slow: learned tensors, any floating dtype.
        fast: the state.
        q: queries `[B, H, 1, D]`.
        k: keys, likewise.
        v: values, likewise.
        eta: inner learning rates `[B, H, 1]`.
        exec_mask: `[B]` bool, rows that have a frame, or None for all.
        write_every: chunks from write to write.

    Returns:
        Outputs `[B, H, 1, D]`, in the state's dtype.
    """
    dtype, (B, H, _, D) = fast.W[0].dtype, q.shape
    q, k, v = (cast(x, dtype).reshape(B * H, 1, D) for x in (q, k, v))
    gamma, beta = (_rows(cast(x, dtype), B).unsqueeze(1) for x in slow[:2])
    delta, exec_mask = cast(slow.delta, dtype), unless_all(exec_mask)
    period = write_every * delta.shape[0]
    scale = gamma * cast(eta, dtype).reshape(B * H, 1, 1)
    frame = _Frame(torch.cat([k, q], 1), scale * gamma, (k - v).add_(beta).mul_(scale))
    kind = _Sliced if fast.pos.is_cpu else _Masked
    z = _pass(slow, fast, frame, kind(fast.pos, delta, exec_mask, H, period))
    fast.pos.add_(1 if exec_mask is None else exec_mask)
    return torch.addcmul(q + beta, gamma, normalise(z).xh).view(B, H, 1, D)


class _Frame(NamedTuple):
    """One frame of N = B * H heads.

    Attributes:
        x: `[N, 2, D]`, key and query: the first weights are passed over once for both.
        scale: `[N, 1, D]`, `eta gamma^2`.
        shift: `[N, 1, D]`, `eta gamma (beta + k - v)`. The gradient of `eta` times the inner loss
            at `LN(z)` is `scale LN(z) + shift`.
    """

    x: Tensor
    scale: Tensor
    shift: Tensor


def _pass(slow: Slow, fast: Fast, frame: _Frame, place: _Sliced | _Masked) -> Tensor:
    """Write the frame, and return what the last weights give for the queries, `[N, 1, D]`."""
    z = torch.baddbmm(fast.b[0], frame.x, fast.W[0])
    X, Z = [frame.x.narrow(1, 0, 1)], [z.narrow(1, 0, 1)]
    for W, b in zip(fast.W[1:], fast.b[1:], strict=True):
        X.append(gelu(Z[-1]))
        Z.append(torch.baddbmm(b, X[-1], W))
    n = normalise(Z[-1])
    G = [pull(torch.addcmul(frame.shift, frame.scale, n.xh), n)]
    for W, of_key in zip(fast.W[:0:-1], Z[-2::-1], strict=True):
        # on a CPU W goes twice as fast on the left, once a batch's weights leave the cache
        G.insert(0, gelu_pull(torch.bmm(W, G[0].mT).mT, of_key))
    for buffer, row in zip((*fast.X, *fast.G), (*X, *G), strict=True):
        place.put(buffer, row)
    x, z = frame.x.narrow(1, 1, 1), z.narrow(1, 1, 1)
    for l, (W, b) in enumerate(zip(fast.W, fast.b, strict=True)):
        if l:
            x = gelu(z)
            z = torch.baddbmm(b, x, W)
        z = place.read(z, x, fast.X[l], fast.G[l])
    if place.at_boundary():
        if place.writes():
            _write(slow, fast, place)
        for buffer in (*fast.X, *fast.G):
            place.clear(buffer)
    return z


def unless_all(exec_mask: Tensor | None) -> Tensor | None:
    """`exec_mask`, or None where it may be asked (on the CPU) and is all true."""
    if exec_mask is None or (exec_mask.is_cpu and all(exec_mask.tolist())):
        return None
    return exec_mask


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, cheaper where nothing is to do."""
    return x if x.dtype == dtype else x.to(dtype)


def _rows(x: Tensor, B: int) -> Tensor:
    """`[H, ...]` -> `[B * H, ...]`, or what is broadcast to it."""
    return x if B == 1 or len(x) == 1 else x.expand(B, *x.shape).flatten(0, 1)


class _Group(NamedTuple):
    """Neighbouring rows that have a frame and stand at one place.

    Attributes:
        heads: where they are in N, first and how many; None is all of it.
        t: place in the chunk.
        tau: of that place.
        full: the chunk is full.
        last: and it is its turn to be written.
    """

    heads: tuple[int, int] | None
    t: int
    tau: float
    full: bool
    last: bool

    def of(self, x: Tensor) -> Tensor:
        """Their part of `[N, ...]`, or of what is broadcast to it."""
        return x if self.heads is None or len(x) == 1 else x.narrow(0, *self.heads)


class _Sliced:
    """Rows anywhere, some without a frame, on the CPU."""

    def __init__(
        self, pos: Tensor, delta: Tensor, exec_mask: Tensor | None, H: int, period: int
    ) -> None:
        values, places, row = delta.tolist(), [p % period for p in pos.tolist()], 0
        if exec_mask is not None:
            places = [p if on else -1 for p, on in zip(places, exec_mask.tolist(), strict=True)]
        C, self.groups = len(values), []
        for at, same in groupby(places):
            rows, t = len(list(same)), at % C
            if at >= 0:
                heads = None if rows == len(places) else (row * H, rows * H)
                tau = max(0.0, 1 / (t + 1) + values[t])
                self.groups.append(_Group(heads, t, tau, t == C - 1, at == period - 1))
            row += rows

    def put(self, buffer: Tensor, row: Tensor) -> None:
        for g in self.groups:
            g.of(buffer).narrow(1, g.t, 1).copy_(g.of(row))

    def read(self, z: Tensor, x: Tensor, X: Tensor, G: Tensor) -> Tensor:
        for g in self.groups:
            a = torch.bmm(g.of(x), g.of(X).narrow(1, 0, g.t + 1).mT).add_(_ONE)
            g.of(z).baddbmm_(a, g.of(G).narrow(1, 0, g.t + 1), alpha=-g.tau)
        return z

    def at_boundary(self) -> bool:
        return any(g.full for g in self.groups)

    def writes(self) -> bool:
        return any(g.last for g in self.groups)

    def write(self, W: Tensor, b: Tensor, X: Tensor, G: Tensor) -> None:
        for g in self.groups:
            if g.last:
                g.of(W).baddbmm_(g.of(X).mT, g.of(G), alpha=-g.tau)
                g.of(b).sub_(g.of(G).sum(1, keepdim=True), alpha=g.tau)

    def forget(self, x: Tensor, start: Tensor, decay: Tensor) -> None:
        for g in self.groups:
            if g.last:
                g.of(x).lerp_(g.of(start), g.of(decay))

    def clear(self, buffer: Tensor) -> None:
        for g in self.groups:
            if g.full:
                g.of(buffer).zero_()


class _Masked:
    """Rows anywhere, some without a frame; no position is read on the host."""

    def __init__(
        self, pos: Tensor, delta: Tensor, exec_mask: Tensor | None, H: int, period: int
    ) -> None:
        C = delta.shape[0]
        t = heads_of(pos % C, H)
        slot = torch.arange(C, device=pos.device).view(-1, 1)
        self.here, self.full = slot == t, t == C - 1
        if exec_mask is not None:
            mask = heads_of(exec_mask, H)
            self.here, self.full = self.here & mask, self.full & mask
        self.done = self.full
        if period > C:
            self.done = self.full & (heads_of(pos % period, H) == period - 1)
        tau = position_scale(delta)
        self.tau, self.before = tau[t], slot <= t
        self.rate = tau[-1] * self.done

    def put(self, buffer: Tensor, row: Tensor) -> None:
        torch.where(self.here, row, buffer, out=buffer)

    def read(self, z: Tensor, x: Tensor, X: Tensor, G: Tensor) -> Tensor:
        a = torch.where(self.before.mT, (torch.bmm(x, X.mT) + 1) * self.tau, 0)
        return z.baddbmm_(a, torch.where(self.before, G, 0), alpha=-1)

    def at_boundary(self) -> bool:
        return _may(self.full)

    def writes(self) -> bool:
        return _may(self.done)

    def write(self, W: Tensor, b: Tensor, X: Tensor, G: Tensor) -> None:
        G = torch.where(self.done, G, 0) * self.rate
        W.baddbmm_(torch.where(self.done, X, 0).mT, G, alpha=-1)
        b.sub_(G.sum(1, keepdim=True))

    def forget(self, x: Tensor, start: Tensor, decay: Tensor) -> None:
        x.lerp_(start, decay * self.done)

    def clear(self, buffer: Tensor) -> None:
        buffer.masked_fill_(self.full, 0)


def _may(mask: Tensor) -> bool:
    """Whether any row is in `mask`, where it may be asked (on the CPU), else True."""
    return mask.device.type != "cpu" or bool(mask.any())


def _write(slow: Slow, fast: Fast, place: _Sliced | _Masked) -> None:
    """The rows of a full chunk into the weights, and the decay towards W0."""
    decay, B = None, len(fast.W[0]) // len(slow.start[0])
    if slow.decay is not None:
        decay = _rows(slow.decay.to(fast.W[0].dtype), B).view(-1, 1, 1)
    for l, (W, b, X, G) in enumerate(zip(*fast[:4], strict=True)):
        place.write(W, b, X, G)
        if decay is not None:
            for x, start in ((W, slow.start[2 * l]), (b, slow.start[2 * l + 1].unsqueeze(1))):
                place.forget(x, _rows(start.to(x.dtype), B), decay)
