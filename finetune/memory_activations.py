"""Bytes that a memory keeps for its backward, and that its backward needs besides: the formulas.

Numbers are those of one row, in float32, as the ops lay them out; `tests/finetune/test_measured.py`
holds them against measured bytes. A scan keeps the states at the starts of groups of about sqrt(n)
chunks and makes the rest of one group again at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moshi_ttt.block import HybridSeqModelingBlock
from moshi_ttt.lanes import named_tensors

if TYPE_CHECKING:
    from finetune.activations import Pass


@dataclass(frozen=True)
class _Scan:
    """One row's numbers in a family's scan.

    Attributes:
        marks: at the start of a group.
        ends: of the state after the last frame, and what the scan starts from besides a mark.
        slot: of the laid out frames and their gates, in a slot of a chunk.
        chunk: made again for a chunk of the group whose backward runs.
        once: needed besides for one chunk at a time.
    """

    marks: int
    ends: int
    slot: int
    chunk: int
    once: int


def _ttt(block: HybridSeqModelingBlock, C: int) -> _Scan:
    memory, options = block.memory, block.config.options
    H, D, I = memory.num_heads, memory.head_dim, memory.inner
    F = options.get("hidden_mult", 0) * D
    deep = block.config.memory == "ttt_mlp"
    W = H * (2 * D * F + F + D) if deep else H * (D * D + D)
    buffers = H * (2 * F + D) if deep else I
    return _Scan(W, W + C * buffers, 3 * I + H, 2 * W + C * (12 * I + 10 * H * F), 6 * W)


def _lact(block: HybridSeqModelingBlock, C: int) -> _Scan:
    memory, options = block.memory, block.config.options
    H, D, I, r = memory.num_heads, memory.head_dim, memory.inner, options["stacked"]
    F, momentum, muon = options["hidden_mult"] * D, options["momentum"], options["muon"]
    W = 3 * r * H * F * D
    state = W * (2 if momentum else 1)
    trace = 6 * W + 10 * 3 * r * H * min(F, D) ** 2 if muon else 0
    rows = C * H * r * (3 * D + 13 * F)  # of keys, values and queries
    return _Scan(state, state + C * H * (2 * D + 3), 3 * I + 3 * H, 3 * W + trace + rows, 8 * W)


def _atlas(block: HybridSeqModelingBlock, C: int) -> _Scan:
    memory, options = block.memory, block.config.options
    H, D, I, c = memory.num_heads, memory.head_dim, memory.inner, options["window"]
    L, F, rank = C + c - 1, options["hidden_mult"] * D, options["outer_rank"] or D
    P = {"none": D, "elementwise": 2 * D, "outer": D + rank}[options["polynomial"]]
    W = H * (F * (D + P) if options["deep"] else D * P)
    doubling = 4 * math.ceil(math.log2(max(C, 2))) * (C + 1)  # of a slot: `_decays`, twice
    slot = 3 * I + H * (doubling + 8 * L)
    rows = L * H * (2 * P + 4 * D + (7 * F if options["deep"] else 0))
    ends = W
    if options["polynomial"] == "outer":
        ends += H * rank * D * (D + 1) // 2
        rows += (C + L) * H * 3 * D * (D + 1) // 2
    if options["muon"]:
        widths = (F + D) * (D + P) if options["deep"] else D * P
        once = C * (13 * W + H * widths) + rows
        return _Scan(2 * W, ends, slot, 2 * W + L * H * P, once)
    return _Scan(2 * W, ends, slot, 4 * W + rows, 2 * W)


_SCANS = {"ttt_linear": _ttt, "ttt_mlp": _ttt, "lact": _lact, "atlas": _atlas}


def _chunks(block: HybridSeqModelingBlock, run: Pass) -> tuple[int, int]:
    """Chunks of a segment at most, and how many of them make a group of the scan."""
    n = -(-run.frames // block.config.chunk_size) + 1
    return n, math.isqrt(n - 1) + 1


def memory_kept(block: HybridSeqModelingBlock, run: Pass) -> int:
    """Bytes kept by a memory without checkpointing, the states at the groups' starts among them.

    A norm of its own (`placement: after_attention`) is left to the caller.
    """
    memory, w, N = block.memory, run.width, run.rows * run.frames
    d, I, H, C = memory.width, memory.inner, memory.num_heads, block.config.chunk_size
    scan = _SCANS[block.config.memory](block, C)
    n, size = _chunks(block, run)
    states = -(-n // size) * scan.marks + scan.ends
    states += 2 * (block.config.options["conv_width"] - 1) * I
    own = 4 * (I + memory.rates * H) + w * d + (4 * d if w < 4 else 0)
    own += (4 if memory.silu else 0) * I
    own += 0 if run.adapts and block.norm is None else w * d
    return run.rows * 4 * (states + n * C * scan.slot) + N * own


def memory_extra(block: HybridSeqModelingBlock, run: Pass) -> int:
    """What a memory's backward needs: a group of chunks made again, or q and k made again."""
    I = block.memory.inner
    scan = _SCANS[block.config.memory](block, block.config.chunk_size)
    _, size = _chunks(block, run)
    group = size * scan.chunk + scan.once
    return run.rows * 4 * max(group + run.frames * 8 * I, run.frames * 28 * I)


def lane_bytes(block: HybridSeqModelingBlock) -> int:
    """Bytes of one lane's state of a memory: fast weights, unfinished chunk, convolution."""
    return sum(x.nbytes for _, x in named_tensors(block.lane_value()))
