"""What the memories of one conversation have learned, on disk: for tomorrow's conversation."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.engine import Engine
from moshi_ttt.errors import UserError
from moshi_ttt.hybrid import HybridLMModel
from moshi_ttt.lanes import named_tensors
from moshi_ttt.state_file import about_model, check_model, kind_of, read, write
from moshi_ttt.states import ttt_blocks

MEMORY = "memory"
_POSITION = "/fast.pos"


@dataclass(frozen=True)
class SavedMemory:
    """What the memories of one conversation have learned, apart from any engine.

    Attributes:
        tensors: `<block>/<name of its state>` -> a tensor of one row, on the CPU.
        about: which model it belongs to.
    """

    tensors: Mapping[str, Tensor]
    about: Mapping[str, Any]

    @property
    def frames(self) -> int:
        """Frames it has lived through, over all conversations; 80 ms each."""
        lived = [int(t) for name, t in self.tensors.items() if name.endswith(_POSITION)]
        return max(lived, default=0)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write a file that appears whole or not at all.

        Raises:
            UserError: it holds numbers that are not finite, which nobody should start with.
        """
        for name, tensor in self.tensors.items():
            if not bool(tensor.isfinite().all()):
                raise UserError(f"{path} was not saved: {name} is not finite, the memory is broken")
        write(path, MEMORY, self.about, self.tensors)


def take_memory(engine: Engine, row: int = 0) -> SavedMemory:
    """Copy what the memories of a row have learned.

    Args:
        engine: between two frames.
        row: of the engine.

    Raises:
        UserError: the model has no memory, or one that keeps nothing.
    """
    require_memory(engine)
    tensors = {name: t.detach().to("cpu", copy=True) for name, t in _memory(engine, row).items()}
    return SavedMemory(tensors, about_model(engine) | {"rows": 1})


def check_memory(engine: Engine, saved: SavedMemory, name: object = "the memory") -> None:
    """See that a memory can be put into a row of an engine; any thread may ask.

    Args:
        engine: any.
        saved: a memory.
        name: what errors call it, e.g. its file.

    Raises:
        UserError: it is of another model or configuration (`chunk_size`, ...), or this model has
            none.
    """
    require_memory(engine)
    check_model(engine, saved.about, name, codec=False)
    like = _memory(engine, 0)
    if differ := sorted(set(like) ^ set(saved.tensors)):
        raise UserError(f"{name}: {differ[0]} is not in both the memory and the model's state")
    for key, tensor in like.items():
        there = saved.tensors[key]
        if (there.shape, there.dtype) != (tensor.shape, tensor.dtype):
            raise UserError(f"{name}: {key} was saved as {kind_of(there)}, not {kind_of(tensor)}")
        if not bool(there.isfinite().all()):
            raise UserError(f"{name}: {key} is not finite, the memory is broken")


def put_memory(
    engine: Engine, saved: SavedMemory, row: int = 0, name: object = "the memory"
) -> None:
    """Let a row start with a memory kept earlier.

    Args:
        engine: between two frames.
        saved: a memory.
        row: of the engine.
        name: what errors call it, e.g. its file.

    Raises:
        UserError: it does not fit (see `check_memory`); the engine is as it was.
    """
    check_memory(engine, saved, name)
    with torch.no_grad():
        for key, tensor in _memory(engine, row).items():
            tensor.copy_(saved.tensors[key])
    engine.loaded(row)


def read_memory(path: str | os.PathLike[str]) -> SavedMemory:
    """Read a memory; any thread may.

    Raises:
        UserError: no such file, or not a memory of one conversation.
    """
    return _read(path)


def save_memory(engine: Engine, path: str | os.PathLike[str], row: int = 0) -> None:
    """`take_memory` and write it: the file appears whole or not at all.

    Raises:
        UserError: the model has no memory, one that keeps nothing, or one that is not finite.
    """
    take_memory(engine, row).write(path)


def load_memory(engine: Engine, path: str | os.PathLike[str], row: int = 0) -> None:
    """`read_memory` and put it into a row.

    Raises:
        UserError: no such file, not a memory, or it does not fit; the engine is as it was.
    """
    put_memory(engine, read_memory(path), row, path)


def memory_frames(path: str | os.PathLike[str]) -> int:
    """Frames that the memory in a file has lived through, without reading the rest of it.

    Raises:
        UserError: as `read_memory`.
    """
    return _read(path, only=_POSITION).frames


def _read(path: str | os.PathLike[str], only: str = "") -> SavedMemory:
    about, tensors = read(path, MEMORY, only=only)
    if about["rows"] != 1:
        raise UserError(f"{path} holds the memories of {about['rows']} conversations, not of one")
    for name, tensor in tensors.items():
        if name.endswith(_POSITION) and (tensor.shape, tensor.dtype) != ((1,), torch.int64):
            raise UserError(f"{path} is broken: {name} is {kind_of(tensor)}")
    return SavedMemory(tensors, about)


def _memory(engine: Engine, row: int) -> dict[str, Tensor]:
    """Views of a row's memories, by the names they are saved under."""
    found: dict[str, Tensor] = {}
    for block, module in ttt_blocks(engine.lm).items():
        streaming = module._streaming_state
        assert streaming is not None
        for name, tensor in named_tensors(streaming.memory):
            found[f"{block}/{name}"] = tensor[row : row + 1]
    return found


def require_memory(engine: Engine) -> None:
    """See that there is a memory to save or to load into.

    Raises:
        UserError: the model has none, or one that keeps nothing.
    """
    if not isinstance(engine.lm, HybridLMModel):
        raise UserError("the model has no memory: its checkpoint was trained without one")
    if not engine.lm.ttt_config.persistent_states:
        raise UserError("the model's memory keeps nothing (persistent_states: false)")
