"""Moshi with a memory that learns while it listens."""

import os

import torch

if not torch.cuda.is_available():
    # moshi reads it when imported; compiling its norms for a CPU takes a minute and gains nothing
    os.environ.setdefault("NO_TORCH_COMPILE", "1")

from moshi_ttt.checkpoint import load, save_checkpoint
from moshi_ttt.config import TTTConfig
from moshi_ttt.hybrid import splice, unsplice
from moshi_ttt.states import (
    attach_ttt_states,
    detach_ttt_states,
    preserved_ttt_states,
    reset_ttt_states,
    restore_ttt_states,
    save_ttt_states,
)

__all__ = [
    "TTTConfig",
    "attach_ttt_states",
    "detach_ttt_states",
    "load",
    "preserved_ttt_states",
    "reset_ttt_states",
    "restore_ttt_states",
    "save_checkpoint",
    "save_ttt_states",
    "splice",
    "unsplice",
]
