"""Frames on each row's own chunk grid: where every batch row's frames, writes and leftovers lie.

Chunks are counted from a row's last reset. A call that starts at frame `pos` of a row therefore
starts inside a chunk, whose earlier rows are the state's buffers, and may end inside another,
whose rows become the buffers. Laid out, a tensor is `[n, N, C, K]`: n chunks, N = B * H, and
slot t of a chunk is row t; a slot that holds no frame is zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Grid:
    """Layout of `T` frames given at positions `pos` on chunks of `C` slots.

    When all rows stand at the same place of a chunk and bring as many frames, laying out is a
    reshape (`start` is that place); else it is a gather by `source`.

    Attributes:
        B: batch rows.
        H: heads.
        C: slots of a chunk.
        n: chunks touched by any row.
        start: `pos % C` when shared by all rows, else None.
        frames: frames of a row when shared, else the most any row has.
        T: frames in the caller's tensors.
        pos: `[B]` int64, frames since reset when the call ends.
        held: None, or `[N, C, 1]` bool: slots of the first chunk that the buffers hold.
        source: None, or `[B, n * C]`: the frame in a slot, negative or past the row's end if none.
        fresh: None, or `[B, n * C]` bool: slots that hold a frame of this call.
        done: None, or `[n, N, 1, 1]` bool: where a row finishes the chunk and writes; None where
            all rows write the same chunks.
        writes: the chunks that at least one row writes.
        last: None, or `[n, N, 1, 1]` bool: the chunk that a row leaves unfinished.
    """

    B: int
    H: int
    C: int
    n: int
    start: int | None
    frames: int
    T: int
    pos: Tensor
    held: Tensor | None
    writes: frozenset[int]
    done: Tensor | None = None
    source: Tensor | None = None
    fresh: Tensor | None = None
    last: Tensor | None = None

    @classmethod
    def of(
        cls,
        pos: Tensor,
        H: int,
        C: int,
        T: int,
        lengths: Tensor | None,
        write_every: int = 1,
    ) -> Grid:
        """The grid of a call with `T` frames, of which row b has the first `lengths[b]`.

        Of a row's chunks, counted from its reset, every `write_every`-th is written. Reads `pos`
        on the host.

        Raises:
            ValueError: a length below 0 or above `T`.
        """
        B, device = pos.shape[0], pos.device
        length = torch.full_like(pos, T) if lengths is None else lengths.to(pos)
        after = pos + length
        at, m = (pos % (C * write_every)).tolist(), length.tolist()
        p = [a % C for a in at]
        if lengths is not None and m and not 0 <= min(m) <= max(m) <= T:
            raise ValueError(f"lengths must lie in 0..{T}, got {m}")
        ends = [a + b for a, b in zip(p, m, strict=True)]
        n = max((-(-e // C) for e in ends), default=0)
        if max(m, default=0) == 0:
            n = 0
        slot = torch.arange(C, device=device)
        held = heads_of(pos % C, H) > slot.view(-1, 1) if any(p) else None
        shared = {"B": B, "H": H, "C": C, "n": n, "T": T, "pos": after, "held": held}
        shared["writes"] = frozenset(
            i
            for a, e in set(zip(at, ends, strict=True))
            for i in range(write_every - 1 - a // C, e // C, write_every)
        )
        if len(set(zip(at, m, strict=True))) == 1:
            return cls(start=p[0], frames=m[0], **shared)
        chunk = torch.arange(n, device=device).view(-1, 1, 1, 1)
        end = heads_of(pos % C + length, H) - C * chunk
        done = end >= C
        if write_every > 1:
            done = done & ((heads_of(pos // C, H) + chunk + 1) % write_every == 0)
        shared["done"] = done
        if len(set(zip(p, m, strict=True))) == 1:  # one place, but in different chunks
            return cls(start=p[0], frames=m[0], **shared)
        source = torch.arange(n * C, device=device) - (pos % C).view(-1, 1)
        return cls(
            start=None,
            frames=max(m, default=0),
            source=source,
            fresh=(source >= 0) & (source < length.view(-1, 1)),
            last=(end > 0) & (end < C),
            **shared,
        )

    @property
    def leftover(self) -> int:
        """Rows of the last chunk left unfinished, when all rows stand together."""
        assert self.start is not None
        return (self.start + self.frames) % self.C

    def lay(self, x: Tensor, head: Tensor | None = None) -> Tensor:
        """`[B, H, T, K]` -> `[n, N, C, K]`, with `head` `[B, H, C, K]` in the held slots."""
        B, H, C, K = self.B, self.H, self.C, x.shape[-1]
        if self.start is not None:
            left = self.start
            x = x[:, :, : self.frames]
            if left and head is not None:
                x, left = torch.cat([head[:, :, :left], x], 2), 0
            x = pad(x, (0, 0, left, self.n * C - left - x.shape[2]))
        else:
            assert self.source is not None
            assert self.fresh is not None
            index = self.source.clamp(0, self.T - 1)[:, None, :, None].expand(B, H, -1, K)
            x = torch.where(self.fresh[:, None, :, None], x.gather(2, index), 0)
            if head is not None and self.held is not None:
                first = x[:, :, :C] + self.keep_held(head.flatten(0, 1)).view(B, H, C, K)
                x = torch.cat([first, x[:, :, C:]], 2)
        return x.reshape(B * H, self.n, C, K).transpose(0, 1).contiguous()

    def pick(self, x: Tensor) -> Tensor:
        """`[n, N, C, K]` -> `[B, H, T, K]`: this call's frames; frames a row lacks are zero."""
        B, H, C, K = self.B, self.H, self.C, x.shape[-1]
        x = x.transpose(0, 1).reshape(B, H, self.n * C, K)
        if self.start is not None:
            x = x[:, :, self.start : self.start + self.frames]
            return pad(x, (0, 0, 0, self.T - self.frames)) if self.frames < self.T else x
        assert self.source is not None
        assert self.fresh is not None
        t = torch.arange(self.T, device=x.device)
        slot = t - self.source[:, :1]
        index = slot.clamp(max=self.n * C - 1)
        there = (slot < self.n * C) & self.fresh.gather(1, index)
        picked = x.gather(2, index[:, None, :, None].expand(B, H, -1, K))
        return torch.where(there[:, None, :, None], picked, 0)

    def keep_held(self, buffer: Tensor) -> Tensor:
        """`[N, C, K]` with stale rows made zero."""
        return torch.zeros_like(buffer) if self.held is None else buffer.where(self.held, 0)

    def tail(self, x: Tensor) -> Tensor:
        """`[n, N, C, K]` -> `[B, H, C, K]`: each row's unfinished chunk, zero if it has none."""
        B, H, C, K = self.B, self.H, self.C, x.shape[-1]
        if self.start is not None:
            # a view would keep all chunks alive for as long as a state lives
            out = x[-1].clone() if self.leftover else torch.zeros_like(x[0])
        else:
            assert self.last is not None
            out = torch.where(self.last, x, 0).sum(0)
        return out.reshape(B, H, C, K)

    def write_mask(self, i: int) -> Tensor | None:
        """Who writes chunk i, one of `writes`: `[N, 1, 1]` bool, None for everyone."""
        return None if self.done is None else self.done[i]

    def keeps(self, i: int) -> bool:
        """Whether any row may leave chunk i unfinished."""
        return self.start is None or (i == self.n - 1 and self.leftover > 0)

    def valid(self, i: int) -> Tensor | None:
        """`[N, C, 1]` bool: slots of chunk i that hold a frame, old or new; None for all."""
        if self.start is not None:
            if i < self.n - 1 or not self.leftover:
                return None
            slot = torch.arange(self.C, device=self.pos.device).view(1, -1, 1)
            return (slot < self.leftover).expand(self.B * self.H, -1, -1)
        assert self.fresh is not None
        here = self.fresh[:, i * self.C : (i + 1) * self.C]
        here = here.repeat_interleave(self.H, 0).unsqueeze(-1)
        return here | self.held if i == 0 and self.held is not None else here


def heads_of(x: Tensor, H: int) -> Tensor:
    """One value per batch row, `[B]`, as `[N, 1, 1]`; reads nothing on the host."""
    return x.repeat_interleave(H, output_size=H * x.shape[0]).view(-1, 1, 1)


def rows_of(x: Tensor, B: int, dtype: torch.dtype) -> Tensor:
    """Slow weights `[H, ...]` for every batch row, `[N, ...]`."""
    return x.to(dtype).expand(B, *x.shape).flatten(0, 1)


def position_scale(delta: Tensor) -> Tensor:
    """`tau_t = max(0, 1 / (t + 1) + delta_t)` for t = 0..C-1, `[C]`."""
    t = torch.arange(1, delta.shape[0] + 1, device=delta.device, dtype=delta.dtype)
    return (1 / t + delta).clamp(min=0)
