"""Minutes of free running (`python -m eval.generate`)."""
