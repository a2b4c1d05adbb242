"""Finetune a Moshi with LoRA and a memory."""

import moshi_ttt as moshi_ttt  # first of all: it tells moshi what not to do on a CPU
