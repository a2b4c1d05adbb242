"""Base + LoRA + memory: find it, load it, save it, and refuse what does not fit."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo, get_lora_moshi, get_moshi_lm
from moshi.modules.lora import LoRALinear, replace_all_linear_with_lora
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moshi_ttt.config import TTTConfig
from moshi_ttt.errors import UserError
from moshi_ttt.hybrid import BLOCK, HybridLMModel, splice
from moshi_ttt.states import ttt_blocks

FORMAT = 1
LORA_FILE, TTT_FILE, FULL_FILE = "lora.safetensors", "ttt.safetensors", "consolidated.safetensors"
CONFIG_FILE, TTT_CONFIG_FILE = "config.json", "ttt.json"
_SAMPLE = 4096  # bytes read at the start, middle and end of each tensor for a fingerprint
_LORA_KEYS = ("lora", "lora_rank", "lora_scaling", "lora_name")


@dataclass(frozen=True)
class Base:
    """A stock Moshi on disk.

    Attributes:
        name: what a person would type to get it again: a hub repository or a folder.
        info: moshi's own description of its files.
    """

    name: str
    info: CheckpointInfo

    @property
    def lm_config(self) -> dict[str, Any]:
        """Keyword arguments of LMModel, without those of LoRA."""
        config = self.info.lm_config
        if config is None:
            raise UserError(f"base {self.name}: it has no config.json; name one (config_path)")
        return {k: v for k, v in config.items() if k not in _LORA_KEYS}


def find_base(
    name: str | Path,
    *,
    moshi_path: str | None = None,
    mimi_path: str | None = None,
    tokenizer_path: str | None = None,
    config_path: str | None = None,
) -> Base:
    """Locate a base: a folder with config.json, or a repository of the Hugging Face hub.

    Args:
        name: the folder or repository; local folders need no network.
        moshi_path: a file to use instead of the one that config.json names; likewise the others.
        mimi_path: Mimi's weights.
        tokenizer_path: the sentencepiece model.
        config_path: a config.json.

    Raises:
        UserError: no such folder, a file is missing, or the hub cannot be reached.
    """
    folder = Path(name).expanduser()
    given: dict[str, Any] = {
        "moshi_weights": moshi_path,
        "mimi_weights": mimi_path,
        "tokenizer": tokenizer_path,
        "config_path": config_path,
    }
    given = {k: Path(v) for k, v in given.items() if v is not None}
    if folder.is_dir():
        given.setdefault("config_path", folder / CONFIG_FILE)
        config = read_json(given["config_path"])
        keys = {
            "moshi_weights": ("moshi_name", "model.safetensors"),
            "mimi_weights": ("mimi_name", None),
            "tokenizer": ("tokenizer_name", None),
            "mimi_config_path": ("mimi_config_name", None),
        }
        for argument, (key, default) in keys.items():
            value = config.get(key, default)
            if value is not None and argument not in given:
                given[argument] = folder / str(value).removeprefix("file://")
    for argument, path in given.items():
        if not path.is_file():
            raise UserError(f"base {name}: {argument.replace('_', ' ')} {path} does not exist")
    if not folder.is_dir() and str(name).count("/") != 1:
        raise UserError(f"base {name}: no such folder, and not a hub repository (owner/name)")
    try:
        if "config_path" not in given:
            # moshi takes an unreachable hub for a repository without config.json: ask first
            given["config_path"] = Path(hf_hub_download(str(name), CONFIG_FILE))
        info = CheckpointInfo.from_hf_repo(str(name), **given)
    except (OSError, ConnectionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"base {name}: the Hugging Face hub cannot be reached or has no such file ({reason}); "
            "give a local folder, or moshi_paths.* for each file"
        ) from error
    return Base(str(name), info)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


def fingerprint(path: Path) -> str:
    """SHA-256 over a safetensors header and 4 KiB from start, middle and end of each tensor.

    Reads megabytes where the whole file has gigabytes; `file_hash` reads all of it.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        raw = file.read(size)
        digest.update(raw)
        for name, entry in sorted(json.loads(raw).items()):
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            for start in (begin, (begin + end) // 2, max(begin, end - _SAMPLE)):
                file.seek(8 + size + start)
                digest.update(file.read(min(_SAMPLE, end - start)))
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a whole file, about 1 GB/s."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()


def load_base(
    base: Base, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16
) -> LMModel:
    """Load the stock LM through moshi's own loader.

    Raises:
        UserError: the base is quantised, or its weights do not fit its config.
    """
    _refuse_quantised(base)
    try:
        lm = get_moshi_lm(base.info.moshi_weights, dict(base.lm_config), device, dtype)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"base {base.name}: {' '.join(str(error).split())[:300]}") from error
    return lm.eval()


def _refuse_quantised(base: Base) -> None:
    with safe_open(base.info.moshi_weights, "pt") as file:
        quantised = any(key.endswith("_scb") for key in file.keys())
    if quantised or base.lm_config.get("quantize"):
        raise UserError(f"base {base.name} is quantised; use its bfloat16 form")


def add_lora(lm: LMModel, rank: int, scaling: float) -> None:
    """Put LoRA on every Linear, as moshi does, and start it as no change at all (B = 0)."""
    replace_all_linear_with_lora(lm, rank, scaling)
    for module in lora_layers(lm).values():
        nn.init.zeros_(module.lora_B.weight)


def lora_layers(lm: nn.Module) -> dict[str, LoRALinear]:
    """The LoRALinear modules of a model by name."""
    return {n: m for n, m in lm.named_modules() if isinstance(m, LoRALinear)}


def ttt_state_dict(lm: nn.Module) -> dict[str, Tensor]:
    """The slow weights of the memories, under the names they have in the model."""
    return {k: v for k, v in lm.state_dict().items() if f".{BLOCK}." in k}


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


def full_state_dict(lm: nn.Module) -> dict[str, Tensor]:
    """The base's weights under stock names, LoRA merged in where there is any; no memory."""
    out: dict[str, Tensor] = {}
    merged = {f"{n}.weight": m for n, m in lora_layers(lm).items()}
    for key, value in lm.state_dict().items():
        if f".{BLOCK}." in key or ".lora_A." in key or ".lora_B." in key:
            continue
        stock = key.replace(".frozen_W.", ".")
        out[stock] = merged[stock].merge_weight() if stock in merged else value
    return out


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
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    out = beside / "consolidated"
    try:
        out.mkdir(parents=True)
        _write(lm, out, base, full, with_embeddings, extra or {})
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return folder / "consolidated"


def _write(
    lm: LMModel, out: Path, base: Base, full: bool, with_embeddings: bool, extra: dict[str, Any]
) -> None:
    layers = lora_layers(lm)
    config = {k: v for k, v in (base.info.raw_config or {}).items() if k not in _LORA_KEYS}
    names = {
        "moshi_name": out.parent / FULL_FILE if full else base.info.moshi_weights,
        "mimi_name": base.info.mimi_weights,
        "tokenizer_name": base.info.tokenizer,
    }
    if Path(base.name).is_dir():  # stock moshi reads local files as file:///...
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
    if isinstance(lm, HybridLMModel):
        about["ttt"] = lm.ttt_config.to_dict()
        _save(ttt_state_dict(lm), out / TTT_FILE)
    (out / TTT_CONFIG_FILE).write_text(json.dumps(about | extra, indent=2) + "\n")


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
        checkpoint: folder written by `save_checkpoint`.
        base: the base to use; default the one the checkpoint names.
        device: where to.
        dtype: compute dtype; default the one it was saved in, in which logits are those of the
            saved model to the bit.
        ttt: the configuration the caller counts on; anything else is refused.
        verify_base: hash the whole base, not only a fingerprint of it.

    Raises:
        UserError: not a checkpoint, wrong base, another configuration (`chunk_size`, ...), a
            quantised base, missing or extra keys; the message says which.
    """
    folder = Path(checkpoint).expanduser()
    if (folder / "consolidated").is_dir():
        folder = folder / "consolidated"
    if not (folder / TTT_CONFIG_FILE).is_file():
        raise UserError(f"{checkpoint} is not a checkpoint: it has no {TTT_CONFIG_FILE}")
    about = read_json(folder / TTT_CONFIG_FILE)
    if about.get("format") != FORMAT:
        raise UserError(f"{folder}: format {about.get('format')!r}, this version reads {FORMAT}")
    config = read_json(folder / CONFIG_FILE)
    base = base if isinstance(base, Base) else find_base(base or about["base"]["name"])
    weights = folder / FULL_FILE if about["full"] else base.info.moshi_weights
    _check_base(weights, about["base"], base, verify_base)
    saved = None
    if about["ttt"] is not None:
        try:
            saved = TTTConfig.from_dict(about["ttt"])
        except (ValueError, TypeError) as error:
            raise UserError(f"{folder / TTT_CONFIG_FILE}: {error}") from error
    if ttt is not None and ttt != saved:
        theirs = {} if saved is None else saved.to_dict()
        differ = [f"{k} {theirs.get(k)!r}, not {v!r}" for k, v in ttt.to_dict().items()
                  if theirs.get(k) != v]  # fmt: skip
        raise UserError(f"{folder} was trained with another memory: {'; '.join(differ)}")
    compute: torch.dtype = dtype or getattr(torch, about["dtype"])
    _refuse_quantised(base)
    lm = get_moshi_lm(weights, dict(base.lm_config), device, compute)
    if config.get("lora"):
        load_lora(lm, folder / LORA_FILE, config["lora_rank"], config["lora_scaling"])
    if saved is not None:
        splice(lm, saved)
        _load_ttt(lm, folder / TTT_FILE, saved, device, compute)
    return Loaded(lm.eval(), base, saved, about)


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
