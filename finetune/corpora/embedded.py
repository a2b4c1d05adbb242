"""The embedded default: spoken here by espeak-ng, and a small base model to go with it."""

from moshi_ttt import tiny


def prepare() -> None:
    """Make `data/tiny/` unless it is there: speech, held-out speech, base models."""
    tiny.ensure()
