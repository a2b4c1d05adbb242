"""A tiny base: a folder that `CheckpointInfo.from_hf_repo` loads as it loads the 7B."""

from __future__ import annotations

import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from moshi.models.compression import MimiModel
from moshi.models.loaders import CheckpointInfo, get_mimi, get_moshi_lm
from safetensors.torch import load_file, save

ASSETS = Path(str(files("moshi_ttt.tiny") / "assets"))
BASE_WEIGHTS = ASSETS / "base.safetensors"
"""What `finetune.train configs/tiny_base.yaml` made of an untrained base, in float16."""
CODEC_FILES = ("mimi.safetensors", "mimi_config.json", "tokenizer.model")


def base_config(
    text_card: int, card: int, dim: int = 128, layers: int = 2, context: int = 50
) -> dict[str, Any]:
    """The LM's keywords under moshi's names, as in a 7B's config.json, with small numbers.

    Args:
        text_card: text tokens, the tokenizer's `vocab_size()`.
        card: codes a codebook.
        dim: width.
        layers: of the temporal transformer.
        context: frames its attention sees (50: 4 s).
    """
    return {
        "dim": dim,
        "text_card": text_card,
        "existing_text_padding_id": 3,
        "n_q": 16,
        "dep_q": 8,
        "card": card,
        "num_heads": 4,
        "num_layers": layers,
        "hidden_scale": 4.125,
        "causal": True,
        "layer_scale": None,
        "context": context,
        "max_period": 10_000,
        "gating": "silu",
        "norm": "rms_norm_f32",
        "positional_embedding": "rope",
        "depformer_dim": 48,
        "depformer_dim_feedforward": 96,
        "depformer_num_heads": 2,
        "depformer_num_layers": 1,
        "depformer_layer_scale": None,
        "depformer_multi_linear": True,
        "depformer_context": 8,
        "depformer_max_period": 10_000,
        "depformer_gating": "silu",
        "depformer_pos_emb": "none",
        "depformer_weights_per_step": True,
        "delays": [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1],
    }


def build_base(
    out_dir: str | Path, seed: int = 0, weights: Path | None = None, **sizes: int
) -> Path:
    """Write a tiny Moshi beside the shipped codec and tokenizer, unless it is there.

    Files: config.json, model.safetensors (float32), mimi.safetensors, mimi_config.json,
    tokenizer.model. config.json names them by absolute `file://`, which moshi needs to stay off
    the network; after moving the folder, load it with `checkpoint_info`.

    Args:
        out_dir: folder, made if missing; files in it that differ are replaced.
        seed: of the weights of an untrained base.
        weights: trained ones; None is an untrained base.
        sizes: `dim`, `layers`, `context` of `base_config`.

    Returns:
        The folder, absolute.
    """
    out = Path(out_dir).absolute()
    out.mkdir(parents=True, exist_ok=True)
    for name in CODEC_FILES:
        _write(out / name, (ASSETS / name).read_bytes())
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    card = json.loads((out / "mimi_config.json").read_text())["quantizer"]["bins"]
    config = base_config(tokenizer.vocab_size(), card, **sizes)
    if weights is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            state = get_moshi_lm(None, lm_kwargs=config, dtype=torch.float32).state_dict()
    else:
        state = load_file(weights)
    moshi_weights = save({k: v.float().contiguous() for k, v in state.items()})
    names = {
        "moshi_name": f"file://{out / 'model.safetensors'}",
        "mimi_name": f"file://{out / 'mimi.safetensors'}",
        "mimi_config_name": f"file://{out / 'mimi_config.json'}",
        "tokenizer_name": f"file://{out / 'tokenizer.model'}",
    }
    _write(out / "model.safetensors", moshi_weights)
    _write(out / "config.json", (json.dumps(config | names, indent=1) + "\n").encode())
    return out


def _write(path: Path, content: bytes) -> None:
    # A file that is right stays as it is: another process may have it open.
    if path.is_file() and path.read_bytes() == content:
        return
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(content)
    os.replace(draft, path)


def checkpoint_info(folder: str | Path) -> CheckpointInfo:
    """What moshi knows of a base folder, wherever it lies, read without network."""
    folder = Path(folder).absolute()
    return CheckpointInfo.from_hf_repo(
        str(folder),
        moshi_weights=folder / "model.safetensors",
        mimi_weights=folder / "mimi.safetensors",
        tokenizer=folder / "tokenizer.model",
        config_path=folder / "config.json",
        mimi_config_path=folder / "mimi_config.json",
    )


def load_codec() -> MimiModel:
    """The shipped tiny Mimi, eight codebooks, float32, on the CPU."""
    config = json.loads((ASSETS / "mimi_config.json").read_text())
    return get_mimi(ASSETS / "mimi.safetensors", config, num_codebooks=8)
