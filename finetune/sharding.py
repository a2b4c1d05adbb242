"""A model spread over the GPUs of a run with FSDP2, and whole again where it has to be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fully_shard import cls_to_fsdp_cls
from torch.distributed.tensor import DTensor, Shard

from finetune.loss import TeacherForced
from finetune.world import World
from moshi_ttt.block import HybridSeqModelingBlock


def shard(model: TeacherForced, world: World, compute: torch.dtype) -> DeviceMesh:
    """Spread a model over all ranks, layer by layer (FSDP2), its frozen weights too.

    What is trained is stored in float32 or wider (each rank holds its part of the masters) and
    gathered in the compute dtype; gradients are summed in float32. Each memory with its gate is a
    group of its own that stays in float32, and no input is cast: fast weights enter a layer as
    arguments, and would lose their small updates.

    Args:
        model: on this rank's device; every rank has the same.
        world: more than one rank.
        compute: dtype of a forward, e.g. bfloat16.

    Returns:
        The mesh, one dimension over all ranks.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    narrow = compute in (torch.bfloat16, torch.float16)
    as_is = MixedPrecisionPolicy(cast_forward_inputs=False)
    policy = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False)
    policy = policy if narrow else as_is
    for block in [m for m in model.modules() if isinstance(m, HybridSeqModelingBlock)]:
        block.memory.cast_projections(torch.float32 if narrow else compute)
        _shard(block, mesh, as_is)
    lm = model.lm
    depformer = [] if lm.depformer is None else lm.depformer.layers
    for layer in chain(lm.transformer.layers, depformer):
        _shard(layer, mesh, policy)
    _shard(model, mesh, policy)
    return mesh


def _shard(module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """`fully_shard`, which for moshi's modules needs to find its class made already.

    It gives a module a class of (FSDPModule, its own) bases. moshi's are abstract base classes, and
    CPython lets an object change its class only where the layouts have one origin, which is the
    first base's: here it has to be the module's own.
    """
    own = type(module)
    cls_to_fsdp_cls.setdefault(own, type(f"FSDP{own.__name__}", (own, FSDPModule), {}))
    fully_shard(module, mesh=mesh, mp_policy=policy)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Inside, every rank has all weights in the compute dtype and may use the model by itself.

    Nothing that needs `state_dict()` or gradients. A model that is not sharded is left alone.
    """
    groups = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for module in groups:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in groups:
            module.reshard()
            # the root's weights are needed again at once, when the backward begins
            module.set_reshard_after_forward(module is not model, recurse=False)


def spread(rows: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """Rows of this rank, as its part of all ranks' rows in order; `rows` itself on one rank."""
    return rows if mesh is None else DTensor.from_local(rows, mesh, [Shard(0)])


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank; every rank has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
