"""The embedded default: speech, codec, tokenizer and a tiny Moshi, all from seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .model import BASE_WEIGHTS, build_base, checkpoint_info, load_codec
from .plan import CorpusSpec
from .speech import make_corpus


@dataclass(frozen=True)
class TinyPaths:
    """Where the embedded default lies.

    Attributes:
        train: manifest of the training recordings (readings and dialogues).
        eval: manifest of a few held-out ones, for evaluation during training.
        heldout: manifest of the held-out readings.
        librilight: the same readings' root in Libri-Light's layout.
        base: folder of the trained base (config.json, model.safetensors, codec, tokenizer).
    """

    train: Path
    eval: Path
    heldout: Path
    librilight: Path
    base: Path


def ensure(
    root: str | Path = "data/tiny", spec: CorpusSpec | None = None, workers: int = 2
) -> TinyPaths:
    """Make what is missing of the embedded default under `root` and say where it is.

    Args:
        root: `ROOT/speech` and `ROOT/base` are made.
        spec: of the corpus.
        workers: processes that speak.

    Raises:
        ValueError: `ROOT/speech` holds a corpus of another spec or version.
    """
    root = Path(root)
    corpus = make_corpus(root / "speech", spec, workers)
    base = build_base(root / "base", weights=BASE_WEIGHTS)
    found = {k: corpus[k] for k in ("train", "eval", "heldout", "librilight")}
    return TinyPaths(**found, base=base)


__all__ = [
    "CorpusSpec",
    "TinyPaths",
    "build_base",
    "checkpoint_info",
    "ensure",
    "load_codec",
    "make_corpus",
]
