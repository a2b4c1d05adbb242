"""Memories: slow weights around one op each. Adding one is a file and a row of this table."""

from __future__ import annotations

from moshi_ttt.config import TTTConfig
from moshi_ttt.memory.atlas import Atlas
from moshi_ttt.memory.base import Memory, MemoryState, Shared
from moshi_ttt.memory.lact import LaCT
from moshi_ttt.memory.ttt_linear import TTTLinear
from moshi_ttt.memory.ttt_mlp import TTTMLP

__all__ = [
    "MEMORIES",
    "TTTMLP",
    "Atlas",
    "LaCT",
    "Memory",
    "MemoryState",
    "Shared",
    "TTTLinear",
    "build_memory",
]

MEMORIES: dict[str, type[Memory]] = {
    "ttt_linear": TTTLinear,
    "ttt_mlp": TTTMLP,
    "lact": LaCT,
    "atlas": Atlas,
}
"""Memory family, as `TTTConfig.memory` names it -> its module."""


def build_memory(width: int, num_heads: int, config: TTTConfig) -> Memory:
    """The memory that `config` asks for, with fresh slow weights.

    Args:
        width: channels of a frame.
        num_heads: heads of the memory; `config.num_heads`, when given, goes before it.
        config: family, chunk size, learning rate, decay, convolution.

    Raises:
        ValueError: `width` is not a multiple of the heads.
    """
    return MEMORIES[config.memory](width, config.num_heads or num_heads, config)
