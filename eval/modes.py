"""How a model is run for a while, and left as it was; what its memories hold meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moshi_ttt.lanes import detach_lanes, lanes_of, put_lanes
from moshi_ttt.states import ttt_blocks


@contextmanager
def writing_off(lm: nn.Module) -> Iterator[None]:
    """Inside, no memory of `lm` writes: all that is left of them is their slow weights.

    Raises:
        ValueError: the model has no memory.
    """
    memories = [block.memory for block in ttt_blocks(lm).values()]
    before = [memory.lr_scale for memory in memories]
    try:
        for memory in memories:
            memory.lr_scale = 0.0
        yield
    finally:
        for memory, scale in zip(memories, before, strict=True):
            memory.lr_scale = scale


@contextmanager
def eval_mode(lm: nn.Module) -> Iterator[None]:
    """Inside, every module is in eval mode; afterwards each is in its own again."""
    before = {module: module.training for module in lm.modules()}
    lm.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def without_lanes(lm: nn.Module) -> Iterator[None]:
    """Training's lanes are other rows than a stream's: what is reset inside is none of theirs."""
    lanes = lanes_of(lm)
    detach_lanes(lm)
    try:
        yield
    finally:
        put_lanes(lm, lanes)


def fast_norms(lm: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Block name -> norm of its fast weights [B] and of their distance from W0, in a stream."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, block in ttt_blocks(lm).items():
        streaming = block._streaming_state
        assert streaming is not None
        norm = moved = torch.zeros(())
        for now, w0 in block.memory.fast_weights(streaming.memory.fast):
            norm = norm.to(now) + now.flatten(1).square().sum(1)
            moved = moved.to(now) + (now - w0).flatten(1).square().sum(1)
        found[name] = norm.sqrt(), moved.sqrt()
    return found
