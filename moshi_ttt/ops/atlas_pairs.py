"""Atlas's window: the pairs (k, v, gamma) of the last frames, carried from call to call.

A pair is a row `[k, v, gamma]`, of width `K = 2 D + 1`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from moshi_ttt.ops.grid import Grid


def present(fields: Sequence[Tensor], pos: Tensor) -> Tensor:
    """The carried pairs `[B, H, c - 1, K]`, zero where they lie before the row's first frame.

    Args:
        fields: k, v and gamma of a state.
        pos: `[B]`, frames since the row's reset.
    """
    k, v, gamma = fields
    pairs = torch.cat([k, v, gamma.unsqueeze(-1)], -1)
    before = pairs.shape[2]
    there = torch.arange(before, device=pairs.device) >= before - pos.view(-1, 1)
    return pairs.where(there[:, None, :, None], 0)


def on_slots(grid: Grid, pos: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Carried and new pairs, `[N, c - 1 + n C, K]`: pair i is the frame of slot i - (c - 1).

    Args:
        grid: where the frames of the call lie.
        pos: `[B]`, where the call starts.
        old: from `present`.
        new: `[B, H, T, K]`.
    """
    old = old.flatten(0, 1)
    before, K = old.shape[1:]
    flat = pad(grid.lay(new).transpose(0, 1).reshape(len(old), -1, K), (0, 0, before, 0))
    if before == 0:
        return flat
    if grid.start is not None:
        return flat + pad(old, (0, 0, grid.start, flat.shape[1] - before - grid.start))
    at = torch.arange(flat.shape[1], device=flat.device) - (pos % grid.C).view(-1, 1)
    at = at.repeat_interleave(grid.H, 0).unsqueeze(-1)
    index = at.clamp(0, before - 1).expand(-1, -1, K)
    return flat + old.gather(1, index).where((at >= 0) & (at < before), 0)


def last(grid: Grid, pos: Tensor, pairs: Tensor, before: int) -> Tensor:
    """The last `before` of each row's pairs from `on_slots`, `[B, H, before, K]`."""
    K = pairs.shape[2]
    if grid.start is not None:
        end = grid.start + grid.frames
        out = pairs[:, end : end + before]
    else:
        end = grid.pos - pos + pos % grid.C
        index = end.view(-1, 1) + torch.arange(before, device=end.device)
        index = index.repeat_interleave(grid.H, 0).unsqueeze(-1).expand(-1, -1, K)
        out = pairs.gather(1, index)
    return out.reshape(grid.B, grid.H, before, K)


def split(pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k, v and gamma of rows; gamma keeps its last axis, of one."""
    D = pairs.shape[-1] // 2
    k, v, gamma = pairs.split([D, D, 1], -1)
    return k, v, gamma


def slide(fields: Sequence[Tensor], pairs: Tensor, exec_mask: Tensor | None) -> None:
    """The carried pairs, in place, become the last of `pairs`, in rows that have a frame."""
    k, v, gamma = split(pairs[:, :, 1:])
    for field, new in zip(fields, (k, v, gamma.squeeze(-1)), strict=True):
        if exec_mask is not None:
            new = new.where(exec_mask.view(-1, *[1] * (new.dim() - 1)), field)
        field.copy_(new)
