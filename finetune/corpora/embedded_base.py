"""What the embedded base is trained on: other voices and other content than the default's."""

from __future__ import annotations

from pathlib import Path

from moshi_ttt.tiny import CorpusSpec, build_base, make_corpus

ROOT = Path("data/tiny_base")
SPEC = CorpusSpec(base_hours=9.5)


def prepare() -> None:
    """Make `data/tiny_base/` unless it is there: speech (`base.jsonl`) and an untrained base."""
    make_corpus(ROOT / "speech", SPEC)
    build_base(ROOT / "untrained")
