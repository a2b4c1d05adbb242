"""How many bytes a run needs, known before anything is downloaded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from moshi.models import loaders
from moshi.models.lm import LMModel
from torch import nn

from finetune.activations import Activations, Pass, activations
from finetune.args import TrainArgs
from finetune.data.corpus import segment_frames
from finetune.optim import parameter_groups
from finetune.world import Rows
from moshi_ttt.block import HybridSeqModelingBlock
from moshi_ttt.errors import UserError
from moshi_ttt.hybrid import carry_kv, splice
from moshi_ttt.lanes import named_tensors
from moshi_ttt.lora import add_lora
from moshi_ttt.memory import Memory

_SMALL = 10**9
"""Parameters up to which a model may be trained on a CPU."""


@dataclass(frozen=True)
class Need:
    """Bytes on the device of one rank, computed and not measured.

    A framework's own memory (a CUDA context, what its allocator cannot use) is not in it.

    Attributes:
        parameters: all parameters, of which `trainable` are trained.
        trainable: parameters with a gradient and two moments.
        weights: all weights at rest; of several ranks this one's part, what is trained in float32.
        gathered: weights of other ranks that are here for a while, and gradients not yet summed.
        gradients: of what is trained; float32 where there are several ranks.
        masters: float32 copies of what is trained in less.
        moments: AdamW's two, in float32.
        lanes: what is carried from segment to segment, before a step and after it.
        segments: segments of a step through which gradients flow, whose activations stand together.
        activations: of one segment of one micro-batch.
        held: states between the segments of a step that recomputing starts from.
        update: needed by the optimizer, when activations are gone.
    """

    parameters: int
    trainable: int
    weights: int
    gathered: int
    gradients: int
    masters: int
    moments: int
    lanes: int
    segments: int
    activations: Activations
    held: int
    update: int

    @property
    def resident(self) -> int:
        """Bytes that are there all the time, gradients among them."""
        return self.weights + self.gradients + self.masters + self.moments + self.lanes

    @property
    def total(self) -> int:
        """Most bytes at one time; gradients as of the second micro-batch, when all are there."""
        forward = self.segments * self.activations.kept + self.activations.working
        return self.resident + max(self.gathered + self.held + forward, self.update)


def estimate(
    lm_config: dict[str, Any] | None, args: TrainArgs, width: int, rows: Rows | None = None
) -> Need:
    """Bytes that a run needs on each of its ranks.

    The model is built where nothing is stored, so its parameters are counted and not guessed; of
    the rest see `finetune.activations`.

    Args:
        lm_config: keyword arguments of LMModel; None means Moshi 7B.
        args: the run.
        width: bytes of a number in the compute dtype: 2 or 4.
        rows: how its lanes lie; None is as `args` says, on one rank.

    Raises:
        UserError: the config is none of an LMModel, or the memory does not go into it.
    """
    rows = rows or Rows(args.batch_size, args.num_microbatches, 1)
    return need_of(*planned(lm_config, args, width), args, rows)


def need_of(lm: LMModel, kv: int, args: TrainArgs, rows: Rows) -> Need:
    """`estimate` of a model that is `planned`, for any number of rows, frames and ranks.

    Args:
        lm: from `planned`.
        kv: likewise.
        args: the run; what is put into the model is what it was planned with.
        rows: how its lanes lie.
    """
    trained = [p for group in parameter_groups(lm, args) for p in group.params]
    run = Pass(
        rows.batch_size,
        segment_frames(args.duration_sec),
        lm.dtype,
        args.lora.rank if args.lora.enable else 0,
        args.full_finetuning,
        args.full_finetuning or (args.lora.enable and args.lora.ft_embed),
        args.gradient_checkpointing,
        args.carry_kv,
    )
    blocks = [m for m in lm.modules() if isinstance(m, HybridSeqModelingBlock)]
    lane = kv + sum(
        _bytes(x for _, x in named_tensors(b.lane_value())) for b in blocks if b.carries
    )
    held = (args.tbptt_segments - 1) * rows.batch_size * lane if args.gradient_checkpointing else 0
    trainable = sum(p.numel() for p in trained)
    alone = rows.ranks == 1

    def part(numbers: int) -> int:
        return -(-numbers // rows.ranks)

    weights = _bytes(lm.parameters())
    narrow = sum(p.numel() for p in trained if p.dtype.itemsize < 4)
    if not alone:
        weights += sum(p.numel() * (4 - p.dtype.itemsize) for p in trained)
    gradients = _bytes(trained) if alone else 4 * trainable
    return Need(
        parameters=sum(p.numel() for p in lm.parameters()),
        trainable=trainable,
        weights=part(weights),
        gathered=0
        if alone
        else _gathered(lm, blocks[: 1 if args.gradient_checkpointing else None]),
        gradients=part(gradients),
        masters=4 * narrow if alone else 0,
        moments=part(8 * trainable),
        lanes=2 * rows.here * lane,
        segments=args.tbptt_segments,
        activations=activations(lm, run),
        held=held,
        update=part(4 * trainable) + (4 * narrow if alone else 0),
    )


def planned(lm_config: dict[str, Any] | None, args: TrainArgs, width: int) -> tuple[LMModel, int]:
    """The run's model where nothing is stored, and bytes of keys and values that a lane carries.

    Raises:
        UserError: see `estimate`.
    """
    config = dict(loaders._lm_kwargs if lm_config is None else lm_config)
    dtype, kv = torch.bfloat16 if width == 2 else torch.float32, 0
    with torch.device("meta"):
        try:
            lm = loaders.get_moshi_lm(None, config, "meta", dtype)
        except (TypeError, ValueError, KeyError, AssertionError, RuntimeError) as error:
            raise UserError(
                "the base's config.json does not describe a Moshi "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            ) from error
        if args.lora.enable:
            add_lora(lm, args.lora.rank, args.lora.scaling)
        if args.ttt is not None:
            try:
                splice(lm, args.ttt)
            except ValueError as error:
                raise UserError(f"ttt: {error}") from error
            for block in [m for m in lm.modules() if isinstance(m, HybridSeqModelingBlock)]:
                block.memory.cast_projections(dtype)
        if args.carry_kv:
            try:
                kv = carry_kv(lm)
            except ValueError as error:
                raise UserError(f"carry_kv: {error}") from error
    return lm, kv


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(x.nbytes for x in tensors)


def _gathered(lm: LMModel, blocks: list[HybridSeqModelingBlock]) -> int:
    """What FSDP has of the other ranks: all that is in no layer, and two layers (one comes).

    Of one layer and of what is in none, gradients wait in the compute dtype and in float32. Of
    `blocks` the projections, stored in float32, are kept in the compute dtype for the backward.
    """
    stacks = [lm.transformer.layers, *([] if lm.depformer is None else [lm.depformer.layers])]
    layers: list[nn.Module] = [layer for stack in stacks for layer in stack]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    outside = [p for p in lm.parameters() if id(p) not in inside]

    def waiting(parameters: Iterable[nn.Parameter]) -> int:
        return sum(p.nbytes + 4 * p.numel() for p in parameters if p.requires_grad)

    largest = max(_bytes(layer.parameters()) for layer in layers)
    slope = max(waiting(layer.parameters()) for layer in layers)
    cast = sum(_bytes(_projections(b.memory)) for b in blocks)
    return _bytes(outside) + waiting(outside) + 2 * largest + slope + cast


def _projections(memory: Memory) -> list[torch.Tensor]:
    """Those that a memory has of its own."""
    owned = (memory.qkv_proj, memory.o_proj)
    return [proj.weight for proj in owned if proj is not None]


def check_fits(
    lm_config: dict[str, Any] | None,
    args: TrainArgs,
    device: torch.device,
    rows: Rows | None = None,
) -> Need:
    """Refuse a run that cannot fit, before any download.

    Args:
        lm_config: as in `estimate`.
        args: the run.
        device: that trains.
        rows: how the lanes lie; None is as `args` says, on the ranks there are.

    Raises:
        UserError: one line with the bytes needed and the bytes there are; or see `estimate`.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rows = rows or Rows(args.batch_size, args.num_microbatches, ranks)
    cuda = device.type == "cuda"
    width = 2 if cuda and args.param_dtype == "bfloat16" else 4
    need = estimate(lm_config, args, width, rows)
    if cuda:
        here, there, what = need.total, torch.cuda.get_device_properties(device).total_memory, "GPU"
    else:  # its ranks share the machine
        here, what = need.total * rows.ranks, "machine"
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not cuda and need.parameters > _SMALL:
        on_gpu = estimate(lm_config, args, 2 if args.param_dtype == "bfloat16" else 4, rows)
        raise UserError(
            f"a model of {need.parameters / 1e9:.1f} G parameters needs a CUDA GPU with about "
            f"{on_gpu.total:,} bytes ({on_gpu.total / 2**30:.0f} GiB) of memory; there is no GPU"
        )
    if here > there:
        each = f" on each of {rows.ranks} GPUs" if cuda and rows.ranks > 1 else ""
        raise UserError(
            f"this run needs about {here:,} bytes ({here / 2**30:.1f} GiB){each}, the {what} has "
            f"{there:,} ({there / 2**30:.1f} GiB): lower batch_size, duration_sec or lora.rank"
        )
    return need
