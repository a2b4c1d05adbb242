"""What tensors really take: bytes kept for a backward, and the most alive at one time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of the distinct storages behind tensors, by address."""
    found = [x.untyped_storage() for x in tensors]
    return {s.data_ptr(): s.nbytes() for s in found}


class Kept:
    """Storages that the forwards inside `kept` saved for their backward; held until this goes."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        self._own, self._found = storages(own), list[Tensor]()

    def pack(self, tensor: Tensor) -> Tensor:
        """Note a tensor that is saved."""
        if tensor.untyped_storage().data_ptr() not in self._own:
            self._found.append(tensor.detach())
        return tensor

    @property
    def bytes(self) -> int:
        """Bytes of the distinct storages."""
        return sum(storages(self._found).values())


@contextmanager
def kept(own: Iterable[Tensor]) -> Iterator[Kept]:
    """Count what is saved inside, all but the storages of `own` (parameters, inputs)."""
    found = Kept(own)
    with torch.autograd.graph.saved_tensors_hooks(found.pack, lambda x: x):
        yield found


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations made inside, while they are alive.

    What a kernel allocates for itself is not seen, nor what was alive before.

    Attributes:
        now: bytes alive.
        peak: most bytes alive at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(  # noqa: D105
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for x in tensors_in((*args, *(kwargs or {}).values())):
            self._note(x.untyped_storage(), made=False)
        out = func(*args, **(kwargs or {}))
        for x in tensors_in(out if isinstance(out, tuple | list) else (out,)):
            self._note(x.untyped_storage(), made=True)
        return out

    def _note(self, storage: torch.UntypedStorage, *, made: bool) -> None:
        key, size = storage._cdata, storage.nbytes() if made else 0
        if key in self._seen:
            return
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone(_: Any) -> None:
            self.now -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, gone)


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operation's values, those in lists too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from tensors_in(value)
