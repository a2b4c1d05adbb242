"""How many bytes a run needs, known before anything is downloaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from moshi.models import loaders
from torch import nn

from finetune.args import TrainArgs
from finetune.data.corpus import segment_frames
from moshi_ttt.errors import UserError
from moshi_ttt.hybrid import splice

_SMALL = 10**9
"""Parameters up to which a model may be trained on a CPU."""


@dataclass(frozen=True)
class Need:
    """Bytes on the device that trains, computed and not measured.

    Attributes:
        parameters: all parameters, of which `trainable` are trained.
        trainable: parameters with a gradient, a float32 master and two moments.
        weights: bytes of all weights in the compute dtype.
        training: bytes of gradients, masters and moments.
        activations: bytes kept for the backward of one micro-batch, a rough upper figure.
    """

    parameters: int
    trainable: int
    weights: int
    training: int
    activations: int

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return self.weights + self.training + self.activations


def estimate(lm_config: dict[str, Any] | None, args: TrainArgs, width: int) -> Need:
    """Bytes that a run needs.

    Weights in the compute dtype; for each trained parameter a gradient in it, a float32 master
    where that is narrower, and two float32 moments; activations per frame of 12 widths and, per
    layer, 1 (checkpointed) or 34 widths, with the fp32 logits.

    Args:
        lm_config: keyword arguments of LMModel; None means Moshi 7B.
        args: the run.
        width: bytes of a number in the compute dtype.

    Raises:
        UserError: the config is none of an LMModel, or the memory does not go into it.
    """
    config = dict(loaders._lm_kwargs if lm_config is None else lm_config)
    with torch.device("meta"):
        try:
            lm = loaders.get_moshi_lm(None, config, "meta", torch.bfloat16)
        except (TypeError, ValueError, KeyError, AssertionError, RuntimeError) as error:
            raise UserError(
                "the base's config.json does not describe a Moshi "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            ) from error
        base = sum(p.numel() for p in lm.parameters())
        linears = [m for m in lm.modules() if isinstance(m, nn.Linear)]
        trainable = base if args.full_finetuning else 0
        extra = 0
        if args.lora.enable:
            extra += sum(args.lora.rank * (m.in_features + m.out_features) for m in linears)
            if args.lora.ft_embed:
                embeddings = [m for m in lm.modules() if isinstance(m, nn.Embedding)]
                trainable += sum(p.numel() for m in embeddings for p in m.parameters())
        if args.ttt is not None:
            try:
                extra += splice(lm, args.ttt).parameters
            except ValueError as error:
                raise UserError(f"ttt: {error}") from error
    trainable += extra
    frames = args.batch_size * segment_frames(args.duration_sec)
    per_layer = 1 if args.gradient_checkpointing else 34
    temporal = lm.dim * (12 + 34 + per_layer * len(lm.transformer.layers))
    depth = 0
    if lm.depformer is not None:
        dep_dim = config["depformer_dim"]
        depth = lm.dep_q * dep_dim * (12 + 34 + per_layer * len(lm.depformer.layers))
    logits = 4 * 3 * (lm.dep_q * lm.card + lm.text_card)
    activations = frames * (width * (temporal + depth) + logits)
    master = 4 if width < 4 else 0
    training = trainable * (width + master + 8)
    return Need(base + extra, trainable, width * (base + extra), training, activations)


def check_fits(lm_config: dict[str, Any] | None, args: TrainArgs, device: torch.device) -> Need:
    """Refuse a run that cannot fit, before any download.

    Raises:
        UserError: one line with the bytes needed and the bytes there are; or see `estimate`.
    """
    cuda = device.type == "cuda"
    width = 2 if cuda and args.param_dtype == "bfloat16" else 4
    need = estimate(lm_config, args, width)
    if cuda:
        there, what = torch.cuda.get_device_properties(device).total_memory, "the GPU"
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        what = "this machine"
    if not cuda and need.parameters > _SMALL:
        on_gpu = estimate(lm_config, args, 2 if args.param_dtype == "bfloat16" else 4)
        raise UserError(
            f"a model of {need.parameters / 1e9:.1f} G parameters needs a CUDA GPU with about "
            f"{on_gpu.total:,} bytes ({on_gpu.total / 2**30:.0f} GiB) of memory; there is no GPU"
        )
    if need.total > there:
        raise UserError(
            f"this run needs about {need.total:,} bytes ({need.total / 2**30:.1f} GiB), {what} has "
            f"{there:,} ({there / 2**30:.1f} GiB): lower batch_size, duration_sec or lora.rank"
        )
    return need
