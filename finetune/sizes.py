"""Named sizes of Moshi, for training from random weights on codes (`moshi_paths.size`)."""

from __future__ import annotations

from typing import Any

from moshi_ttt.tiny.model import base_config


def _moshi(
    dim: int, layers: int, heads: int, hidden_scale: float, depth_dim: int, depth_heads: int
) -> dict[str, Any]:
    """Moshi 7B's keywords of LMModel with other widths, and a depformer of two layers.

    Streams, delays, cards and window are the 7B's: codes of the published Mimi fit, and so does
    its tokenizer.
    """
    full = base_config(text_card=32_000, card=2048, dim=dim, layers=layers, context=3000)
    return full | {
        "num_heads": heads,
        "hidden_scale": hidden_scale,
        "depformer_dim": depth_dim,
        "depformer_dim_feedforward": int(4.125 * depth_dim),
        "depformer_num_heads": depth_heads,
        "depformer_num_layers": 2,
    }


SIZES: dict[str, dict[str, Any]] = {
    "tiny": base_config(text_card=400, card=64),
    "125m": _moshi(512, 14, 8, 4.125, 256, 4),
    "350m": _moshi(1024, 15, 16, 4.125, 384, 6),
    "760m": _moshi(1536, 24, 24, 2.75, 512, 8),
}
"""Name -> keyword arguments of LMModel. The name says the parameters of the whole LM, embeddings
and depformer among them, without a memory; `tiny` is the embedded base's shape."""
