"""What a module carries from one training segment to the next: one value a lane.

A lane is one row of one micro-batch slot; it reads one recording after another. The values are
tuples of tensors, replaced and never written into, so a backward still to come, or a recompute of
it, sees what its forward saw.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

FRESH = "fresh"


def named_tensors(state: tuple[Any, ...], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a (nested) NamedTuple with dotted names."""
    for name, value in zip(state._fields, state, strict=True):  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(value, Tensor):
            yield prefix + name, value
        else:
            yield from named_tensors(value, f"{prefix}{name}.")


def map_tensors(fn: Any, *states: Any) -> Any:
    """Apply `fn` to corresponding tensors of equal NamedTuples and rebuild one."""
    if isinstance(states[0], Tensor):
        return fn(*states)
    parts = [map_tensors(fn, *values) for values in zip(*states, strict=True)]
    return type(states[0])(*parts)


class Lanes:
    """The lanes of one module.

    Args:
        batch_size: rows of a micro-batch, B.
        slots: micro-batches of a step; each has lanes of its own.
        device: of the masks.

    Attributes:
        values: of each slot, a NamedTuple of tensors `[B, ...]` after its last segment; None
            before the first.
        fresh: of each slot `[B]` bool, rows that start anew at their next segment.
        slot: the one whose turn it is.
        linked: keep the graph, so that gradients flow from segment to segment.
    """

    def __init__(self, batch_size: int, slots: int, device: torch.device) -> None:
        self.batch_size = batch_size
        self.values: list[Any] = [None] * slots
        self.fresh = [torch.ones(batch_size, dtype=torch.bool, device=device)] * slots
        self.slot = 0
        self.linked = False

    def enter(self, batch_size: int) -> tuple[Any, Tensor]:
        """The value after the slot's last segment (or None), and the rows to start anew.

        Raises:
            ValueError: the batch has another number of rows.
        """
        if self.batch_size != batch_size:
            raise ValueError(
                f"lanes are attached for {self.batch_size} rows, the batch has {batch_size}: "
                "detach_ttt_states(model), or attach for this size"
            )
        return self.values[self.slot], self.fresh[self.slot]

    def leave(self, value: Any) -> None:
        """Keep the value after a segment, cut from its graph unless the segments are linked."""
        self.values[self.slot] = value if self.linked else _cut(value)
        self.fresh[self.slot] = torch.zeros_like(self.fresh[self.slot])

    def reset(self, mask: Tensor | None = None) -> None:
        """Let the rows of `mask` [B] start anew in this slot; without a mask all rows of all."""
        if mask is None:
            self.fresh = [torch.ones_like(rows) for rows in self.fresh]
        else:
            rows = self.fresh[self.slot]
            self.fresh[self.slot] = rows | mask.to(rows.device)

    def cut(self) -> None:
        """Detach every value from its graph."""
        self.values = [None if value is None else _cut(value) for value in self.values]

    def tensors(self) -> dict[str, Tensor]:
        """Everything, by name; shares no storage with what is here.

        Returns:
            `fresh` [slots, B], and the values' tensors, slot after slot: `[slots * B, ...]`.
        """
        found = {FRESH: torch.stack(self.fresh)}
        like = next((value for value in self.values if value is not None), None)
        if like is not None:  # a slot before its first segment holds nothing: its rows are fresh
            values = [map_tensors(torch.zeros_like, like) if v is None else v for v in self.values]
            found |= dict(named_tensors(map_tensors(lambda *rows: torch.cat(rows), *values)))
        return {name: tensor.detach().clone() for name, tensor in found.items()}

    @classmethod
    def load(cls, tensors: dict[str, Tensor], like: Any, device: torch.device) -> Lanes:
        """Lanes of what `tensors` gave; `like` is any value of the same module."""
        tensors = {n: t.to(device, copy=True) for n, t in tensors.items()}
        slots, batch_size = tensors[FRESH].shape
        lanes = cls(batch_size, slots, device)
        lanes.fresh = list(tensors[FRESH].unbind())
        if len(tensors) > 1:
            names = iter([name for name, _ in named_tensors(like)])
            whole = map_tensors(lambda _: tensors[next(names)], like)
            lanes.values = [
                map_tensors(lambda t, s=slot: t.split(batch_size)[s], whole)
                for slot in range(slots)
            ]
        return lanes


class HasLanes(nn.Module):
    """A module that can carry something from segment to segment; without lanes it starts anew."""

    _lanes: Lanes | None = None

    @property
    def carries(self) -> bool:
        """Whether `attach_lanes` gives this module lanes."""
        return True

    def lane_value(self) -> Any:
        """A value as `Lanes` holds it, of one row and any content: for names and shapes."""
        raise NotImplementedError


def lane_holders(model: nn.Module) -> dict[str, HasLanes]:
    """The modules under a model that carry something, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, HasLanes) and m.carries}


def attach_lanes(model: nn.Module, batch_size: int, slots: int = 1) -> None:
    """Carry values from one training call to the next, one lane a row and slot, all fresh."""
    for module in lane_holders(model).values():
        device = next(module.parameters()).device
        module._lanes = Lanes(batch_size, slots, device)


def detach_lanes(model: nn.Module) -> None:
    """Let every training call start anew."""
    for module in lane_holders(model).values():
        module._lanes = None


def lanes_of(model: nn.Module) -> dict[str, Lanes]:
    """The lanes that are attached, by the names of their modules."""
    return {n: m._lanes for n, m in lane_holders(model).items() if m._lanes is not None}


def use_slot(model: nn.Module, slot: int) -> None:
    """Whose turn it is: the next call goes on with the lanes of this micro-batch slot."""
    for lanes in lanes_of(model).values():
        lanes.slot = slot


def reset_lanes(model: nn.Module, mask: Tensor | None = None) -> None:
    """Let rows (`mask` [B] of the slot in turn; default all rows of all slots) start anew."""
    for lanes in lanes_of(model).values():
        lanes.reset(mask)


def take_lanes(model: nn.Module) -> dict[str, Lanes]:
    """What all lanes hold now, to be put back with `put_lanes`; costs nothing."""
    taken = {}
    for name, lanes in lanes_of(model).items():
        taken[name] = copy(lanes)
        taken[name].values, taken[name].fresh = list(lanes.values), list(lanes.fresh)
    return taken


def put_lanes(model: nn.Module, taken: dict[str, Lanes]) -> None:
    """Put back what `take_lanes` took."""
    for name, module in lane_holders(model).items():
        module._lanes = taken.get(name)


@contextmanager
def linked_segments(model: nn.Module) -> Iterator[None]:
    """Inside, gradients flow from a lane's segment into the one before it; after it no more."""
    for lanes in lanes_of(model).values():
        lanes.linked = True
    try:
        yield
    finally:
        for lanes in lanes_of(model).values():
            lanes.linked = False
            lanes.cut()


def _cut(value: Any) -> Any:
    return map_tensors(lambda t: t.detach(), value)
