"""Finetune a Moshi with LoRA and a memory."""

# moshi_ttt comes first of all: it tells moshi what not to do on a CPU
from moshi_ttt import (
    preserved_ttt_states,
    reset_ttt_states,
    restore_ttt_states,
    save_ttt_states,
)

__all__ = ["preserved_ttt_states", "reset_ttt_states", "restore_ttt_states", "save_ttt_states"]
