"""Measure a Moshi with a memory: perplexity beyond the window, benchmarks."""

import moshi_ttt as moshi_ttt  # first of all: it tells moshi what not to do on a CPU
