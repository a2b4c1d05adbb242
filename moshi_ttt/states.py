"""Save, restore and reset what the memories of a model have learned, on any spliced model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from moshi_ttt.block import HybridSeqModelingBlock
from moshi_ttt.lanes import attach_lanes, detach_lanes, named_tensors, put_lanes, take_lanes

TTTStates = dict[str, Any]
"""Block name -> that block's saved state (see `HybridSeqModelingBlock.save_ttt_states`)."""


def ttt_blocks(model: nn.Module) -> dict[str, HybridSeqModelingBlock]:
    """The memory blocks under a model, by their names relative to it.

    Raises:
        ValueError: there is none.
    """
    blocks = {n: m for n, m in model.named_modules() if isinstance(m, HybridSeqModelingBlock)}
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no memory: splice one in first")
    return blocks


def save_ttt_states(model: nn.Module) -> TTTStates:
    """Copy the fast weights and all that goes with them, of streams and of training lanes.

    The copies share no storage with the model: what it does next leaves them as they are.
    """
    return {name: block.save_ttt_states() for name, block in ttt_blocks(model).items()}


def restore_ttt_states(model: nn.Module, saved: TTTStates) -> None:
    """Put saved states back, exactly, in the middle of a chunk too.

    A stream's tensors are written in place, so captured CUDA graphs go on seeing them; lanes get
    new values, so a backward still to come sees the old ones.

    Raises:
        ValueError: the states are of another model or configuration; nothing was touched.
    """
    blocks = ttt_blocks(model)
    missing, extra = sorted(set(blocks) - set(saved)), sorted(set(saved) - set(blocks))
    if missing or extra:
        raise ValueError(f"saved states lack the blocks {missing} and have unknown ones {extra}")
    for name, block in blocks.items():
        block.check_ttt_states(saved[name], name)
    for name, block in blocks.items():
        block.restore_ttt_states(saved[name])


@contextmanager
def preserved_ttt_states(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, the memories (and all lanes) are afterwards as they were before."""
    saved, lanes = save_ttt_states(model), take_lanes(model)
    try:
        yield
    finally:
        restore_ttt_states(model, saved)
        put_lanes(model, lanes)


def reset_ttt_states(model: nn.Module, mask: Tensor | None = None) -> None:
    """Put rows (`mask` [B], default all) back to W0."""
    for block in ttt_blocks(model).values():
        block.reset_ttt_states(mask)


def copy_ttt_rows(model: nn.Module, sources: Sequence[int], targets: Sequence[int]) -> None:
    """Give rows of a stream the memories of other rows of it; attention is untouched.

    Args:
        model: streaming.
        sources: rows to copy from.
        targets: rows to copy to, one for each source.

    Raises:
        ValueError: the model is not streaming.
    """
    for name, block in ttt_blocks(model).items():
        streaming = block._streaming_state
        if streaming is None:
            raise ValueError(f"{name} is not streaming: it has no rows to copy")
        for _, tensor in named_tensors(streaming.memory):
            tensor[list(targets)] = tensor[list(sources)]


def attach_ttt_states(model: nn.Module, batch_size: int, slots: int = 1) -> None:
    """Carry the state from one training call to the next, one lane a row, starting at W0.

    Args:
        model: spliced; keys and values are carried too after `moshi_ttt.hybrid.carry_kv`.
        batch_size: rows of a call.
        slots: micro-batches of a step, each with lanes of its own (`moshi_ttt.lanes.use_slot`).

    Raises:
        ValueError: the configuration says `persistent_states: false`.
    """
    if not all(block.carries for block in ttt_blocks(model).values()):
        raise ValueError("persistent_states is false: every call has a fresh state, none to carry")
    attach_lanes(model, batch_size, slots)


def detach_ttt_states(model: nn.Module) -> None:
    """Let every training call start from W0."""
    ttt_blocks(model)
    detach_lanes(model)
