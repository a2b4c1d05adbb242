"""Base + LoRA + memory: find it, load it, save it, and refuse what does not fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import get_moshi_lm
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moshi_ttt.base import (
    CONFIG_FILE,
    LORA_KEYS,
    Base,
    file_hash,
    find_base,
    fingerprint,
    read_json,
    refuse_quantised,
)
from moshi_ttt.config import TTTConfig
from moshi_ttt.errors import UserError
from moshi_ttt.files import folder_written_whole
from moshi_ttt.hybrid import BLOCK, HybridLMModel, splice
from moshi_ttt.lora import load_lora, lora_layers, lora_state_dict
from moshi_ttt.states import ttt_blocks
from moshi_ttt.untrained import UntrainedInfo, read_recipe, write_untrained

FORMAT = 1
LORA_FILE, TTT_FILE, FULL_FILE = "lora.safetensors", "ttt.safetensors", "consolidated.safetensors"
TTT_CONFIG_FILE = "ttt.json"
BASE_FOLDER = "base"
"""In a checkpoint of a model that began with random weights: what it began with."""
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float64)}


def ttt_state_dict(lm: nn.Module) -> dict[str, Tensor]:
    """The slow weights of the memories, under the names they have in the model."""
    return {k: v for k, v in _tensors(lm) if f".{BLOCK}." in k}


def full_state_dict(lm: nn.Module) -> dict[str, Tensor]:
    """The base's weights under stock names, LoRA merged in where there is any; no memory."""
    out: dict[str, Tensor] = {}
    merged = {f"{n}.weight": m for n, m in lora_layers(lm).items()}
    for key, value in _tensors(lm):
        if f".{BLOCK}." in key or ".lora_A." in key or ".lora_B." in key:
            continue
        stock = key.replace(".frozen_W.", ".")
        out[stock] = merged[stock].merge_weight() if stock in merged else value
    return out


def _tensors(lm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    # moshi's LM has no buffers; `state_dict()` would take an FSDP model that is whole apart again
    return lm.named_parameters()


def save_checkpoint(
    lm: LMModel,
    folder: Path,
    base: Base,
    *,
    full: bool = False,
    with_embeddings: bool = False,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write `folder/consolidated/` with what was trained; appears whole or not at all.

    Args:
        lm: the model, with LoRA or a memory or both.
        folder: e.g. `checkpoints/checkpoint_000500`; replaced if it exists.
        base: what the adapters belong to.
        full: write all weights, LoRA merged (full finetuning, `save_adapters: false`).
        with_embeddings: the embeddings were trained too (`lora.ft_embed`).
        extra: further facts for ttt.json, e.g. the step and the training segment.

    Returns:
        `folder/consolidated`.
    """
    with folder_written_whole(folder) as beside:
        write_consolidated(
            lm, beside / "consolidated", base,
            full=full, with_embeddings=with_embeddings, extra=extra,
        )  # fmt: skip
    return folder / "consolidated"


def write_consolidated(
    lm: LMModel,
    out: Path,
    base: Base,
    *,
    full: bool = False,
    with_embeddings: bool = False,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write the files of `save_checkpoint` to a new folder `out`, as they come."""
    out.mkdir()
    layers = lora_layers(lm)
    config = {k: v for k, v in (base.info.raw_config or {}).items() if k not in LORA_KEYS}
    names = {
        "moshi_name": out.parent / FULL_FILE if full else base.info.moshi_weights,
        "mimi_name": base.info.mimi_weights,
        "tokenizer_name": base.info.tokenizer,
    }
    recipe = read_recipe(base.info.moshi_weights)
    if isinstance(base.info, UntrainedInfo) and recipe is not None:
        config |= base.info.names
        write_untrained(out / BASE_FOLDER, base.lm_config | base.info.names, recipe)
    elif Path(base.name).is_dir():  # stock moshi reads local files as file:///...
        config |= {k: f"file://{Path(v).resolve()}" for k, v in names.items()}
        if "mimi_config_name" in config:
            mimi = Path(base.name) / str(config["mimi_config_name"]).removeprefix("file://")
            config["mimi_config_name"] = f"file://{mimi.resolve()}"
    if full:
        _save(full_state_dict(lm), out / FULL_FILE)
        config["moshi_name"] = FULL_FILE
        config["lora"] = False
    elif layers:
        first = next(iter(layers.values()))
        config |= {"lora": True, "lora_rank": first.rank, "lora_scaling": first.scaling}
        _save(lora_state_dict(lm, with_embeddings=with_embeddings), out / LORA_FILE)
    else:
        config["lora"] = False
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    weights = out / FULL_FILE if full else base.info.moshi_weights
    about: dict[str, Any] = {
        "format": FORMAT,
        "base": {
            "name": str(Path(base.name).resolve()) if Path(base.name).is_dir() else base.name,
            "fingerprint": fingerprint(weights),
            "sha256": file_hash(weights),
        },
        "dtype": str(lm.dtype).removeprefix("torch."),
        "full": full,
        "ttt": None,
    }
    if full:  # the fingerprint above is of its own weights
        about["base"]["stock"] = fingerprint(base.info.moshi_weights)
    if isinstance(lm, HybridLMModel):
        about["ttt"] = lm.ttt_config.to_dict()
        _save(ttt_state_dict(lm), out / TTT_FILE)
    (out / TTT_CONFIG_FILE).write_text(json.dumps(about | (extra or {}), indent=2) + "\n")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, path)


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, and what it was made of.

    Attributes:
        lm: the model, in eval mode.
        base: its base, for Mimi and the tokenizer.
        ttt: the memory's configuration, None without one.
        about: the content of ttt.json; empty for a bare base.
    """

    lm: LMModel
    base: Base
    ttt: TTTConfig | None
    about: dict[str, Any]


@dataclass(frozen=True)
class Described:
    """A checkpoint that was found to fit its base; none of its weights are loaded.

    Attributes:
        folder: the one that holds the adapters.
        base: its base.
        ttt: the memory's configuration, None without one.
        about: the content of ttt.json.
        dtype: it was saved in.
        weights: of the LM: the base's, or its own after full finetuning.
    """

    folder: Path
    base: Base
    ttt: TTTConfig | None
    about: dict[str, Any]
    dtype: torch.dtype
    weights: Path


def describe(
    checkpoint: str | Path, *, base: Base | str | Path | None = None, verify_base: bool = False
) -> Described:
    """Find a checkpoint and its base, and see that they fit.

    Args:
        checkpoint: folder written by `save_checkpoint`, or its `consolidated/`.
        base: the base to use; default the one the checkpoint names.
        verify_base: hash the whole base, not only a fingerprint of it.

    Raises:
        UserError: not a checkpoint, or a wrong base; the message says which.
    """
    folder = Path(checkpoint).expanduser()
    if (folder / "consolidated").is_dir():
        folder = folder / "consolidated"
    if not (folder / TTT_CONFIG_FILE).is_file():
        raise UserError(f"{checkpoint} is not a checkpoint: {_why_not(Path(checkpoint))}")
    about = read_json(folder / TTT_CONFIG_FILE)
    if about.get("format") != FORMAT:
        raise UserError(f"{folder}: format {about.get('format')!r}, this version reads {FORMAT}")
    if missing := [k for k in ("base", "dtype", "full", "ttt") if k not in about]:
        raise UserError(f"{folder / TTT_CONFIG_FILE} lacks {missing[0]!r}")
    if about["dtype"] not in _DTYPES:
        raise UserError(f"{folder / TTT_CONFIG_FILE}: dtype {about['dtype']!r} is not one of ours")
    own = folder / BASE_FOLDER
    name = own if own.is_dir() else about["base"]["name"]
    base = base if isinstance(base, Base) else find_base(base or name)
    weights = folder / FULL_FILE if about["full"] else base.info.moshi_weights
    _check_base(weights, about["base"], base, verify_base)
    saved = None
    if about["ttt"] is not None:
        try:
            saved = TTTConfig.from_dict(about["ttt"])
        except (ValueError, TypeError) as error:
            raise UserError(f"{folder / TTT_CONFIG_FILE}: {error}") from error
    return Described(folder, base, saved, about, _DTYPES[about["dtype"]], weights)


def _why_not(given: Path) -> str:
    """What a folder without a checkpoint is, and where there is one in a run's."""
    folder = given.expanduser()
    if not folder.exists():
        return f"it has no {TTT_CONFIG_FILE}, for there is no such folder"
    found = [p for where in (folder, folder / "checkpoints") for p in where.glob("checkpoint_*")]
    hint = f"; did you mean {max(found)}?" if found else ""
    return f"it has no {TTT_CONFIG_FILE}{hint}"


def load(
    checkpoint: str | Path,
    *,
    base: Base | str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    ttt: TTTConfig | None = None,
    verify_base: bool = False,
) -> Loaded:
    """Load base + LoRA + memory from a checkpoint folder (or its `consolidated/`).

    Args:
        checkpoint: see `describe`; `base` and `verify_base` too.
        base: the base to use.
        device: where to.
        dtype: compute dtype; default the one it was saved in, in which logits are those of the
            saved model to the bit.
        ttt: the configuration the caller counts on; anything else is refused.
        verify_base: hash the whole base.

    Raises:
        UserError: see `describe`; another configuration (`chunk_size`, ...), a quantised base,
            missing or extra keys; the message says which.
    """
    found = describe(checkpoint, base=base, verify_base=verify_base)
    folder, base, saved = found.folder, found.base, found.ttt
    config = read_json(folder / CONFIG_FILE)
    if ttt is not None and ttt != saved:
        theirs = {} if saved is None else saved.to_dict()
        differ = [f"{k} {theirs.get(k)!r}, not {v!r}" for k, v in ttt.to_dict().items()
                  if theirs.get(k) != v]  # fmt: skip
        raise UserError(f"{folder} was trained with another memory: {'; '.join(differ)}")
    compute: torch.dtype = dtype or found.dtype
    refuse_quantised(base)
    lm = get_moshi_lm(found.weights, dict(base.lm_config), device, compute)
    if config.get("lora"):
        load_lora(lm, folder / LORA_FILE, config["lora_rank"], config["lora_scaling"])
    if saved is not None:
        splice(lm, saved)
        _load_ttt(lm, folder / TTT_FILE, saved, device, compute)
    return Loaded(lm.eval(), base, saved, found.about)


def _check_base(weights: Path, saved: dict[str, str], base: Base, verify: bool) -> None:
    if not weights.is_file():
        raise UserError(f"{weights} does not exist")
    if fingerprint(weights) != saved["fingerprint"]:
        raise UserError(
            f"base {base.name} is not the one this checkpoint was trained on "
            f"({saved['name']}): their fingerprints differ"
        )
    if verify and file_hash(weights) != saved["sha256"]:
        raise UserError(f"base {base.name}: the whole file's hash differs ({weights})")


def _load_ttt(
    lm: LMModel, path: Path, config: TTTConfig, device: str | torch.device, dtype: torch.dtype
) -> None:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    tensors, wanted = load_file(path, device=str(device)), ttt_state_dict(lm)
    if missing := sorted(set(wanted) - set(tensors)):
        raise UserError(f"{path} lacks {missing[0]} and {len(missing) - 1} more keys")
    if extra := sorted(set(tensors) - set(wanted)):
        raise UserError(f"{path} has {extra[0]}, which the model does not know ({len(extra)} such)")
    for key, value in wanted.items():
        if value.shape != tensors[key].shape:
            hint = f" (chunk_size is {config.chunk_size})" if key.endswith("delta") else ""
            raise UserError(
                f"{path}: {key} has shape {tuple(tensors[key].shape)}, {TTT_CONFIG_FILE} means "
                f"{tuple(value.shape)}{hint}"
            )
    for block in ttt_blocks(lm).values():
        block.memory.cast_projections(dtype)
    lm.load_state_dict(tensors, strict=False)
