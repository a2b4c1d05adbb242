"""What is trained, in which group, and with which learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from moshi.models.lm import LMModel
from torch import Tensor, nn

from finetune.args import TrainArgs
from finetune.sharding import gathered, local
from moshi_ttt.lora import lora_layers
from moshi_ttt.states import ttt_blocks


@dataclass
class Group:
    """Parameters that share a learning rate and a weight decay."""

    name: str
    lr: float
    weight_decay: float
    params: list[Tensor] = field(default_factory=list)


def parameter_groups(lm: LMModel, args: TrainArgs) -> list[Group]:
    """Freeze the model, then free and group what the configuration trains.

    Parameters are found by visiting modules, never by matching names. No weight decay on norms,
    gates, biases, embeddings and W0 (whatever is not the weight of a Linear).

    Raises:
        RuntimeError: a parameter counted twice or missed: a bug, not a user's mistake.
    """
    lm.requires_grad_(False)
    optim = args.optim
    ttt_lr = optim.ttt_lr or optim.lr
    groups = {
        "base": Group("base", optim.lr, optim.weight_decay),
        "base_no_decay": Group("base_no_decay", optim.lr, 0.0),
        "lora": Group("lora", optim.lr, optim.weight_decay),
        "memory": Group("memory", ttt_lr, optim.weight_decay),
        "memory_no_decay": Group("memory_no_decay", ttt_lr, 0.0),
        "gate": Group("gate", optim.gate_lr or ttt_lr, 0.0),
    }
    blocks = list(ttt_blocks(lm).values()) if args.ttt is not None else []
    in_blocks = {id(m) for block in blocks for m in block.modules()}
    for block in blocks:
        groups["gate"].params.append(block.gate)
        _add(block.modules(), groups["memory"], groups["memory_no_decay"], skip={id(block.gate)})
    if args.full_finetuning:
        base = [m for m in lm.modules() if id(m) not in in_blocks]
        _add(base, groups["base"], groups["base_no_decay"])
    for layer in lora_layers(lm).values():
        groups["lora"].params += [layer.lora_A.weight, layer.lora_B.weight]
    if args.lora.enable and args.lora.ft_embed:
        embeddings = [m for m in lm.modules() if isinstance(m, nn.Embedding)]
        _add(embeddings, groups["base"], groups["base_no_decay"])
    used = [group for group in groups.values() if group.params]
    params = [p for group in used for p in group.params]
    for p in params:
        p.requires_grad_(True)
    free = sum(p.requires_grad for p in lm.parameters())
    if len({id(p) for p in params}) != len(params) or free != len(params):
        raise RuntimeError(f"{len(params)} parameters were grouped, {free} are trainable")
    return used


def _add(
    modules: Iterable[nn.Module], decayed: Group, plain: Group, skip: set[int] | None = None
) -> None:
    for module in modules:
        for name, p in module.named_parameters(recurse=False):
            if skip and id(p) in skip:
                continue
            linear = isinstance(module, nn.Linear) and name == "weight"
            (decayed if linear else plain).params.append(p)


class MasterAdamW:
    """AdamW on float32 masters of parameters that the model keeps in less.

    The model computes with, and is saved in, its own dtype; an update too small for bfloat16 is
    not lost. A parameter that is float32 or wider is its own master.

    Args:
        groups: from `parameter_groups`.
        betas: of AdamW.
    """

    def __init__(self, groups: list[Group], betas: tuple[float, float]) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []
        described = []
        for group in groups:
            masters = []
            for p in group.params:
                narrow = p.dtype in (torch.bfloat16, torch.float16)
                master = nn.Parameter(p.detach().float()) if narrow else p
                masters.append(master)
                self.pairs.append((p, master))
            described.append(
                {"params": masters, "lr": group.lr, "weight_decay": group.weight_decay}
            )
        self.adamw = torch.optim.AdamW(described, betas=betas)

    def step(self, max_norm: float) -> float:
        """Clip, update, write back and clear the gradients.

        Returns:
            The gradient norm before clipping; with a non-finite one nothing is updated.
        """
        for p, master in self.pairs:
            if master is not p:
                master.grad = None if p.grad is None else p.grad.float()
        grads = [master.grad for _, master in self.pairs if master.grad is not None]
        total = gathered(torch.nn.utils.get_total_norm(grads))
        norm = float(total)
        if math.isfinite(norm):
            if max_norm:
                # as torch clips, but by a number: it clips DTensors by one rounded to float32
                scale = float((max_norm / (total + 1e-6)).clamp(max=1.0))
                for grad in grads:
                    grad.mul_(scale)
            self.adamw.step()
            with torch.no_grad():
                for p, master in self.pairs:
                    if master is not p:
                        p.copy_(master)
        self.clear()
        return norm

    def clear(self) -> None:
        """Drop all gradients."""
        for p, master in self.pairs:
            p.grad = master.grad = None

    def is_finite(self) -> bool:
        """Whether every parameter that is trained is still a number, on this rank."""
        return all(bool(torch.isfinite(local(p)).all()) for p, _ in self.pairs)


def schedule(args: TrainArgs) -> Callable[[int], float]:
    """Learning rate at a step as a share of the group's: warm-up, then a cosine.

    `cosine` warms up linearly over `pct_start` of the steps, to the peak, and falls to 1 % of it
    at the last step; `onecycle` has the values of torch's OneCycleLR, as moshi-finetune uses it:
    both phases cosines, from 1/25 of the peak, down to 1/250 000 at the last step. (That one also
    cycles AdamW's first beta, whatever `betas` says; here `betas` holds.)
    """
    steps = args.max_steps
    warmup = max(1, round(args.optim.pct_start * steps))
    top = args.optim.pct_start * steps - 1  # of onecycle; a fraction of a step, as in torch

    def anneal(start: float, end: float, share: float) -> float:
        return end + (start - end) / 2 * (1 + math.cos(math.pi * min(1.0, share)))

    def cosine(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return anneal(1.0, 0.01, (step + 1 - warmup) / max(1, steps - warmup))

    def onecycle(step: int) -> float:
        if step <= top:
            return anneal(1 / 25, 1.0, step / top if top > 0 else 1.0)
        return anneal(1.0, 1 / 25 / 1e4, (step - top) / (steps - 1 - top))

    return onecycle if args.optim.schedule == "onecycle" else cosine


def inner_lr_scale(args: TrainArgs) -> Callable[[int], float]:
    """Share of `base_lr` at a step: from a tenth to all of it, from `memory_start_step` on."""
    outer = max(1, round(args.optim.pct_start * args.max_steps))
    warmup, start = args.memory_warmup_steps or outer, args.memory_start_step
    return lambda step: min(1.0, 0.1 + 0.9 * max(0, step - start) / warmup)


def set_inner_loop(lm: LMModel, scale: float, active: bool = True) -> None:
    """Set the share of `base_lr` that the memories write with, and whether they take part."""
    for block in ttt_blocks(lm).values():
        block.memory.lr_scale, block.active = scale, active
