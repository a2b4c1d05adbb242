"""What `eval.bench.gpu_check` runs: the 7B's shape or a small one, random weights, a memory."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch
from moshi.models import loaders
from moshi.models.lm import LMModel
from torch import nn

from moshi_ttt.config import TTTConfig
from moshi_ttt.hybrid import splice
from moshi_ttt.states import ttt_blocks


@dataclass(frozen=True)
class Shape:
    """What is run.

    Attributes:
        name: for people.
        lm: keyword arguments of LMModel.
        dtype: compute dtype; the memories' fast and slow weights are float32, projections follow.
        ttt: the memory.
        rank: of LoRA.
        stream_frames: frames that are timed.
        compare_frames: frames over which graphed and eager are compared; several chunks.
        seconds: length of a training segment.
        max_batch: rows of a training batch at most.
        steps: training steps that are timed.
    """

    name: str
    lm: dict[str, Any]
    dtype: torch.dtype
    ttt: TTTConfig
    rank: int = 128
    stream_frames: int = 300
    compare_frames: int = 70
    seconds: float = 100.0
    max_batch: int = 16
    steps: int = 5

    @property
    def frames(self) -> int:
        """Frames of a training segment."""
        return round(self.seconds * loaders.FRAME_RATE)


MOSHI_7B = Shape(
    "Moshi 7B", dict(loaders._lm_kwargs), torch.bfloat16, TTTConfig(memory="ttt_mlp", chunk_size=16)
)
_SMALL_LM = {
    "dim": 32,
    "text_card": 64,
    "card": 64,
    "num_heads": 4,
    "num_layers": 4,
    "context": 20,
    "depformer_dim": 16,
    "depformer_dim_feedforward": 32,
    "depformer_num_heads": 2,
    "depformer_num_layers": 1,
}
SMALL = Shape(
    "small",
    {**loaders._lm_kwargs, **_SMALL_LM},
    torch.float32,
    TTTConfig(memory="ttt_mlp", chunk_size=4),
    rank=4,
    stream_frames=20,
    compare_frames=26,
    seconds=2.0,
    max_batch=3,
    steps=3,
)


def build(shape: Shape, device: torch.device) -> LMModel:
    """Moshi with random weights, made on the device: normal(0.02) in Linears and embeddings."""
    with torch.device(device):
        lm = LMModel(device=device, dtype=shape.dtype, **shape.lm)
    for module in lm.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
    return lm.requires_grad_(False).eval()


def add_memory(lm: LMModel, shape: Shape) -> int:
    """Splice a fresh memory in; returns its number of parameters."""
    with torch.device(lm.device):
        done = splice(lm, shape.ttt)
    for block in ttt_blocks(lm).values():
        block.memory.cast_projections(shape.dtype)
    return done.parameters


@torch.no_grad()
def open_memories(lm: LMModel) -> None:
    """Open the gates, move W0 from its start and write ten times as hard: what is written matters.

    Logits then differ by some tenths of the largest one from those of a memory that never writes.
    """
    for block in ttt_blocks(lm).values():
        for name, parameter in block.named_parameters():
            leaf = name.rpartition(".")[2]
            if leaf == "gate":
                parameter.normal_(std=0.3)
            elif leaf in {"W1", "b1", "W2", "b2", "Wo"}:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        block.memory.lr_scale = 10.0


def synchronise(device: torch.device) -> None:
    """Wait for the GPU, if it is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clean(device: torch.device) -> None:
    """Give back a GPU's memory that nobody holds, and start counting it anew."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peaks(device: torch.device) -> dict[str, int | None]:
    """Most bytes allocated and reserved (CUDA graphs' pools included) since `clean`."""
    if device.type != "cuda":
        return {"allocated": None, "reserved": None}
    return {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
    }
