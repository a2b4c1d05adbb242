"""Memories of a live stream that are no longer finite: what they say is left out, they start over.

An inner loop that diverges would otherwise spoil its row for good, attention's keys included.
Evaluation is not guarded: there, what is not finite shall be seen.
"""

from __future__ import annotations

import torch
from moshi.models.lm import LMModel
from torch import Tensor

from moshi_ttt.block import HybridSeqModelingBlock
from moshi_ttt.hybrid import HybridLMModel
from moshi_ttt.states import ttt_blocks


class Guard:
    """Watches over the memories of a stream, those that keep a state.

    Made before the stream's first frame, so that its flags are part of a captured CUDA graph; they
    are gone with the stream.

    Args:
        lm: streaming, with memories or without.
        rows: B.
    """

    def __init__(self, lm: LMModel, rows: int) -> None:
        self._none = torch.zeros(rows, dtype=torch.bool, device=lm.device)
        self._blocks: list[HybridSeqModelingBlock] = []
        if isinstance(lm, HybridLMModel) and lm.ttt_config.persistent_states:
            self._blocks += ttt_blocks(lm).values()
        for block in self._blocks:
            assert block._streaming_state is not None
            block._streaming_state.diverged = torch.zeros_like(self._none)

    def diverged(self) -> Tensor:
        """`[B]` bool on the device: rows of which a memory is no longer finite."""
        return torch.stack([self._none, *map(_flags, self._blocks)]).any(0)

    def start_over(self) -> None:
        """Put those memories back to W0, and go on watching."""
        for block in self._blocks:
            flags = _flags(block)
            block.reset_ttt_states(flags.clone())
            flags.zero_()


def _flags(block: HybridSeqModelingBlock) -> Tensor:
    state = block._streaming_state
    assert state is not None
    assert state.diverged is not None
    return state.diverged
