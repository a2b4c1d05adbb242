"""A Moshi and a Mimi that are real and small: for tests, built in memory, seeded, untrained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from moshi.models.loaders import _lm_kwargs, _seanet_kwargs, _transformer_kwargs, get_mimi
from moshi.quantization.core_vq import EuclideanCodebook
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor
from torch import nn

from moshi_ttt.config import TTTConfig
from moshi_ttt.hybrid import splice
from moshi_ttt.states import ttt_blocks
from moshi_ttt.tiny.model import ASSETS

CARD, TEXT_CARD, CONTEXT = 64, 64, 20

LM_KWARGS: dict[str, Any] = {
    "dim": 32,
    "text_card": TEXT_CARD,
    "card": CARD,
    "num_heads": 4,
    "num_layers": 2,
    "context": CONTEXT,
    "depformer_dim": 16,
    "depformer_dim_feedforward": 32,
    "depformer_num_heads": 2,
    "depformer_num_layers": 1,
}

MIMI_CONFIG: dict[str, Any] = {
    "sample_rate": 24_000,
    "channels": 1,
    "frame_rate": 12.5,
    "seanet": dict(_seanet_kwargs, dimension=16, n_filters=2),
    "transformer": dict(
        _transformer_kwargs,
        d_model=16,
        num_heads=2,
        num_layers=1,
        layer_scale=0.1,
        context=30,
        dim_feedforward=32,
        input_dimension=16,
        output_dimensions=[16],
    ),
    "quantizer": {
        "dimension": 8,
        "n_q": 8,
        "bins": CARD,
        "input_dimension": 16,
        "output_dimension": 16,
    },
}


def small_lm(*, seed: int = 0, **overrides: Any) -> LMModel:
    """A stock LMModel in float32 with the 7B's streams and delays and small widths, not spliced.

    Args:
        seed: of the weights; the global generator is left alone.
        overrides: keyword arguments of LMModel, e.g. `norm="rms_norm"`, `num_layers=4`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LMModel(dtype=torch.float32, **{**_lm_kwargs, **LM_KWARGS, **overrides})


def small_mimi(*, seed: int = 0) -> MimiModel:
    """A Mimi with the true ratios and frame rate, whose codebooks hold random entries.

    Its codes vary with the sound, and what it decodes is noise that varies with the codes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mimi = get_mimi(None, MIMI_CONFIG, num_codebooks=8)
        for module in mimi.modules():
            if isinstance(module, EuclideanCodebook):
                nn.init.normal_(module.embedding_sum)
                module._initialized.fill_(1)
        for name, parameter in mimi.named_parameters():
            if name.endswith("bias"):  # they would drown what an untrained codec makes of a sound
                parameter.data.zero_()
        with torch.no_grad():
            latent = mimi.encode_to_latent(0.1 * torch.randn(1, 1, 48_000), quantize=False)
            for quantiser in (mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest):
                quantiser.input_proj.weight.div_(quantiser.input_proj(latent).std())
    return mimi


START = {"W1", "b1", "W2", "b2", "Lg", "Rg", "Lu", "Ru", "Wo"}
"""Parameters of the memories that make W0."""


def randomise_memories(lm: nn.Module, *, seed: int = 0) -> None:
    """Open the gates and move every slow weight of the memories away from where it starts.

    W0 gets a spread of 0.3, the rest 0.1 around its start; the global generator is left alone.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for block in ttt_blocks(lm).values():
            for name, parameter in block.named_parameters():
                start = name.rpartition(".")[2] in {*START, "gate"}
                parameter.add_(torch.randn_like(parameter) * (0.3 if start else 0.1))


def small_hybrid(*, seed: int = 0, lm: dict[str, Any] | None = None, **config: Any) -> LMModel:
    """`small_lm` in eval mode with a TTT-MLP of chunk 4 in both layers, all of it random.

    Args:
        seed: of the weights.
        lm: overrides for `small_lm`.
        config: of `TTTConfig`.
    """
    model = small_lm(seed=seed, **(lm or {}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        splice(model, TTTConfig(**({"layers": "all", "chunk_size": 4, "num_heads": 2} | config)))
    randomise_memories(model, seed=seed)
    return model.eval()


def small_tokenizer() -> SentencePieceProcessor:
    """The tokenizer that is shipped with the tiny base."""
    return SentencePieceProcessor(str(ASSETS / "tokenizer.model"))


def small_base(folder: Path, *, seed: int = 0) -> Path:
    """Write `small_lm` and `small_mimi` as a base that moshi's own loader reads; returns `folder`.

    Its text card is that of `small_tokenizer`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lm_config = {**_lm_kwargs, **LM_KWARGS, "text_card": small_tokenizer().vocab_size()}
    lm = small_lm(seed=seed, text_card=lm_config["text_card"])
    save_file({k: v.contiguous() for k, v in lm.state_dict().items()}, folder / "model.safetensors")
    save_file(dict(small_mimi(seed=seed).state_dict()), folder / "mimi.safetensors")
    (folder / "mimi_config.json").write_text(json.dumps(MIMI_CONFIG))
    shutil.copyfile(ASSETS / "tokenizer.model", folder / "tokenizer.model")
    names = {
        "moshi_name": "model.safetensors",
        "mimi_name": "mimi.safetensors",
        "mimi_config_name": "mimi_config.json",
        "tokenizer_name": "tokenizer.model",
    }
    (folder / "config.json").write_text(json.dumps(lm_config | names))
    return folder
