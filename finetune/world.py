"""The processes of a run: one, or as many as torchrun started."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from finetune.args import TrainArgs
from moshi_ttt.errors import UserError

TIMEOUT = timedelta(hours=2)
"""Longest wait at a collective: rank 0 may evaluate or save meanwhile. torchrun ends the job at
once when a rank dies, whatever this says."""


@dataclass(frozen=True)
class World:
    """Who this process is among the others.

    Attributes:
        rank: from 0.
        size: processes in all; 1 means that no process group exists.
        device: of this process.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""
        if self.size == 1:
            return x
        total = x.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(x.device)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.sum(torch.tensor(float(flag))) > 0)

    def gather(self, value: Any) -> list[Any]:
        """What every rank has, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier()


ALONE = World()


@contextmanager
def world() -> Iterator[World]:
    """The world that torchrun's environment describes; its process group ends with the body.

    NCCL between GPUs, gloo between CPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    if size == 1:
        yield World(device=torch.device("cuda" if cuda else "cpu"))
        return
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
    yield World(dist.get_rank(), size, device)
    dist.destroy_process_group()  # not after an error: it would wait for the others


class Rows(NamedTuple):
    """How the lanes of a run lie.

    Attributes:
        batch_size: rows of a micro-batch.
        slots: micro-batches of a step, on each rank.
        ranks: as many.
    """

    batch_size: int
    slots: int
    ranks: int

    @property
    def here(self) -> int:
        """Lanes of a rank."""
        return self.batch_size * self.slots

    @property
    def all(self) -> int:
        """Lanes of all ranks: the global batch."""
        return self.here * self.ranks


def rows_of(args: TrainArgs, here: World, lanes: int | None = None) -> Rows:
    """Lay out the lanes as the run says; of a run that goes on, as many as it had.

    Args:
        args: `batch_size` rows in each of `num_microbatches`, on every rank.
        here: the ranks there are.
        lanes: None, or the lanes that a saved run had; they are kept on any number of ranks, with
            other micro-batches where it takes that.

    Raises:
        UserError: so many lanes cannot be spread evenly over the ranks.
    """
    wanted = Rows(args.batch_size, args.num_microbatches, here.size)
    if lanes is None or lanes == wanted.all:
        return wanted
    each, over = divmod(lanes, here.size)
    if over or not each:
        raise UserError(
            f"the run has {lanes} lanes (rows of its global batch), which cannot be spread evenly "
            f"over {here.size} ranks: go on with a number of ranks that divides it"
        )
    rows = math.gcd(each, args.batch_size)
    return Rows(rows, each // rows, here.size)
