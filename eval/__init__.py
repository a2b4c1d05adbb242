"""Measuring what a memory is worth: perplexity far beyond the attention window."""
