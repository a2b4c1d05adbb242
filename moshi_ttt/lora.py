"""LoRA on every Linear, in moshi's own modules and file format."""

from __future__ import annotations

from pathlib import Path

from moshi.models.lm import LMModel
from moshi.models.loaders import get_lora_moshi
from moshi.modules.lora import LoRALinear, replace_all_linear_with_lora
from safetensors import safe_open
from torch import Tensor, nn

from moshi_ttt.errors import UserError


def add_lora(lm: LMModel, rank: int, scaling: float) -> None:
    """Put LoRA on every Linear, as moshi does, and start it as no change at all (B = 0)."""
    replace_all_linear_with_lora(lm, rank, scaling)
    for module in lora_layers(lm).values():
        nn.init.zeros_(module.lora_B.weight)


def lora_layers(lm: nn.Module) -> dict[str, LoRALinear]:
    """The LoRALinear modules of a model by name."""
    return {n: m for n, m in lm.named_modules() if isinstance(m, LoRALinear)}


def lora_state_dict(lm: nn.Module, *, with_embeddings: bool = False) -> dict[str, Tensor]:
    """A and B of every LoRALinear (the stock loader needs all), and trained embeddings if asked."""
    out: dict[str, Tensor] = {}
    for name, layer in lora_layers(lm).items():
        out[f"{name}.lora_A.weight"] = layer.lora_A.weight
        out[f"{name}.lora_B.weight"] = layer.lora_B.weight
    if with_embeddings:
        for name, module in lm.named_modules():
            if isinstance(module, nn.Embedding):
                out[f"{name}.weight"] = module.weight
    return out


def load_lora(lm: LMModel, path: Path, rank: int, scaling: float) -> None:
    """Put LoRA on `lm` with the weights of a lora.safetensors, ours or moshi-finetune's.

    Raises:
        UserError: missing or extra keys, or another rank.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    with safe_open(path, "pt") as file:
        keys = set(file.keys())
    names = {n for n, m in lm.named_modules() if isinstance(m, nn.Linear)}
    wanted = {f"{n}.lora_{ab}.weight" for n in names for ab in "AB"}
    known = wanted | set(lm.state_dict())
    if missing := sorted(wanted - keys):
        raise UserError(f"{path} lacks {missing[0]} and {len(missing) - 1} more keys")
    if extra := sorted(keys - known):
        raise UserError(f"{path} has {extra[0]}, which the model does not know ({len(extra)} such)")
    try:
        get_lora_moshi(lm, path, rank, scaling, lm.dtype, lm.device, fuse_lora=False)
    except RuntimeError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())[:300]}") from error
