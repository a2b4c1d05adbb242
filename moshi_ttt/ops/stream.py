"""One frame of a stream, in the low-rank form: weights are read, rows are appended to buffers.

It serves the memories that `scan` serves, with the same letters. A frame computes its own row G at
the chunk-start weights, puts it and its X at place `t = pos % C` of the buffers, and reads

    Zq = Xq W + b - tau_t (Xq . X_buf + 1) G_buf        over the rows 0..t

Frame C-1 writes all rows into the weights at once, or drops them where it is not the turn of its
chunk (`write_every`). Nothing here reads a position on the host when the state is on CUDA; on the
CPU rows that stand together take slices instead of masks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moshi_ttt.ops.grid import position_scale
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
    eta = cast(eta, dtype).reshape(B * H, 1, 1)
    gamma, beta = (_rows(cast(x, dtype), B).unsqueeze(1) for x in slow[:2])
    delta = cast(slow.delta, dtype)
    exec_mask = unless_all(exec_mask)
    period = write_every * delta.shape[0]
    at = _together(fast.pos, period) if exec_mask is None else None
    if at is None:
        place = _Masked(fast.pos, delta, exec_mask, H, period)
    else:
        place = _Sliced(at, delta, period)

    X, Z = [k], [torch.baddbmm(fast.b[0], k, fast.W[0])]
    for W, b in zip(fast.W[1:], fast.b[1:], strict=True):
        X.append(gelu(Z[-1]))
        Z.append(torch.baddbmm(b, X[-1], W))
    n = normalise(Z[-1])
    G = [pull(torch.addcmul((k - v).add_(beta), gamma, n.xh).mul_(gamma), n).mul_(eta)]
    for W, z in zip(fast.W[:0:-1], Z[-2::-1], strict=True):
        G.insert(0, gelu_pull(torch.bmm(G[0], W.mT), z))
    for buffer, row in zip((*fast.X, *fast.G), (*X, *G), strict=True):
        place.put(buffer, row)
    x = zq = q
    for l, (W, b) in enumerate(zip(fast.W, fast.b, strict=True)):
        if l:
            x = gelu(zq)
        zq = place.read(torch.baddbmm(b, x, W), x, fast.X[l], fast.G[l])
    if place.at_boundary():
        if place.writes():
            _write(slow, fast, place, B)
        for buffer in (*fast.X, *fast.G):
            place.clear(buffer)
    fast.pos.add_(1 if exec_mask is None else exec_mask)
    return torch.addcmul(q + beta, gamma, normalise(zq).xh).view(B, H, 1, D)


def unless_all(exec_mask: Tensor | None) -> Tensor | None:
    """`exec_mask`, or None where it may be asked (on the CPU) and is all true."""
    if exec_mask is None or (exec_mask.is_cpu and all(exec_mask.tolist())):
        return None
    return exec_mask


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, cheaper where nothing is to do."""
    return x if x.dtype == dtype else x.to(dtype)


def _rows(x: Tensor, B: int) -> Tensor:
    """`[H, ...]` -> `[B * H, ...]`."""
    return x if B == 1 else x.expand(B, *x.shape).flatten(0, 1)


def _together(pos: Tensor, period: int) -> int | None:
    """The place in the period that all rows share, where it may be asked (on the CPU)."""
    if not pos.is_cpu or not len(pos):
        return None
    first, *others = pos.tolist()
    at = first % period
    return at if all(p % period == at for p in others) else None


class _Sliced:
    """All rows at one place of the `period` frames from write to write."""

    def __init__(self, at: int, delta: Tensor, period: int) -> None:
        values = delta.tolist()
        self.C, self.last = len(values), at == period - 1
        self.t = t = at % self.C
        self.tau = max(0.0, 1 / (t + 1) + values[t])

    def put(self, buffer: Tensor, row: Tensor) -> None:
        buffer.narrow(1, self.t, 1).copy_(row)

    def read(self, z: Tensor, x: Tensor, X: Tensor, G: Tensor) -> Tensor:
        a = torch.bmm(x, X.narrow(1, 0, self.t + 1).mT).add_(_ONE)
        return z.baddbmm_(a, G.narrow(1, 0, self.t + 1), alpha=-self.tau)

    def at_boundary(self) -> bool:
        return self.t == self.C - 1

    def writes(self) -> bool:
        return self.last

    def write(self, W: Tensor, b: Tensor, X: Tensor, G: Tensor) -> None:
        W.baddbmm_(X.mT, G, alpha=-self.tau)
        b.sub_(G.sum(1, keepdim=True), alpha=self.tau)

    def pull(self, decay: Tensor) -> Tensor:
        return decay

    def clear(self, buffer: Tensor) -> None:
        buffer.zero_()


class _Masked:
    """Rows anywhere, some without a frame."""

    def __init__(
        self, pos: Tensor, delta: Tensor, exec_mask: Tensor | None, H: int, period: int
    ) -> None:
        C = delta.shape[0]

        def rows(x: Tensor) -> Tensor:  # [B] -> [N, 1, 1]
            return x.repeat_interleave(H, output_size=H * x.shape[0]).view(-1, 1, 1)

        t = rows(pos % C)
        slot = torch.arange(C, device=pos.device).view(-1, 1)
        self.here, self.full = slot == t, t == C - 1
        if exec_mask is not None:
            mask = rows(exec_mask)
            self.here, self.full = self.here & mask, self.full & mask
        self.done = self.full
        if period > C:
            self.done = self.full & (rows(pos % period) == period - 1)
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

    def pull(self, decay: Tensor) -> Tensor:
        return decay * self.done

    def clear(self, buffer: Tensor) -> None:
        buffer.masked_fill_(self.full, 0)


def _may(mask: Tensor) -> bool:
    """Whether any row is in `mask`, where it may be asked (on the CPU), else True."""
    return mask.device.type != "cpu" or bool(mask.any())


def _write(slow: Slow, fast: Fast, place: _Sliced | _Masked, B: int) -> None:
    """The rows of a full chunk into the weights, and the decay towards W0."""
    decay = None
    if slow.decay is not None:
        decay = place.pull(_rows(slow.decay.to(fast.W[0].dtype), B).view(-1, 1, 1))
    for l, (W, b, X, G) in enumerate(zip(*fast[:4], strict=True)):
        place.write(W, b, X, G)
        if decay is not None:
            for x, start in ((W, slow.start[2 * l]), (b, slow.start[2 * l + 1].unsqueeze(1))):
                x.lerp_(_rows(start.to(x.dtype), B), decay)
