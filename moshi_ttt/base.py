"""A stock Moshi on disk or on the hub: find it, load it, tell it from another."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo, get_moshi_lm
from safetensors import safe_open

from moshi_ttt.errors import UserError
from moshi_ttt.untrained import (
    MIMI,
    MIMI_CONFIG,
    TOKENIZER,
    UntrainedInfo,
    read_recipe,
)

CONFIG_FILE = "config.json"
LORA_KEYS = ("lora", "lora_rank", "lora_scaling", "lora_name")
"""Keys of config.json that say what LoRA file goes with it."""
_SAMPLE = 4096  # bytes read at the start, middle and end of each tensor for a fingerprint


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
        return {k: v for k, v in config.items() if k not in LORA_KEYS}


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
    untrained = folder.is_dir() and read_recipe(given["moshi_weights"]) is not None
    if untrained:  # what is not there is missed when it is needed
        given.setdefault("mimi_weights", folder / MIMI)
        given.setdefault("tokenizer", folder / TOKENIZER)
        if (folder / MIMI_CONFIG).is_file():
            given.setdefault("mimi_config_path", folder / MIMI_CONFIG)
    if not folder.is_dir() and str(name).count("/") != 1:
        raise UserError(f"base {name}: no such folder, and not a hub repository (owner/name)")
    try:
        if "config_path" not in given:
            # moshi takes an unreachable hub for a repository without config.json: ask first
            given["config_path"] = Path(hf_hub_download(str(name), CONFIG_FILE))
        info = CheckpointInfo.from_hf_repo(str(name), **given)
    except (OSError, ConnectionError, HFValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"base {name}: the Hugging Face hub cannot be reached or has no such file ({reason}); "
            "give a local folder, or moshi_paths.* for each file"
        ) from error
    for path in (info.moshi_weights, info.mimi_weights):
        if path.suffix != ".safetensors":  # moshi would unpickle it: that can run anything
            raise UserError(f"base {name}: {path} is not a .safetensors file; nothing else is read")
    return Base(str(name), UntrainedInfo.of(info) if untrained else info)


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
    """SHA-256 of a whole file, about 1 GB/s; an unchanged file is read once in a process."""
    status = path.stat()
    return _file_hash(path.resolve(), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _file_hash(path: Path, mtime_ns: int, size: int) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()


def load_base(
    base: Base,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    wider: int = 1,
) -> LMModel:
    """Load the stock LM through moshi's own loader; one that is `untrained` is made from its seed.

    Args:
        base: which.
        device: where to.
        dtype: of its weights.
        wider: factor on its attention window; anything but 1 is no longer the stock model.

    Raises:
        UserError: the base is quantised, or its weights do not fit its config.
    """
    refuse_quantised(base)
    config = dict(base.lm_config)
    if wider != 1:
        config["context"] = config["context"] * wider
    recipe = read_recipe(base.info.moshi_weights)
    try:
        if recipe is not None:
            lm = recipe.build(config, device, dtype)
        else:
            lm = get_moshi_lm(base.info.moshi_weights, config, device, dtype)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"base {base.name}: {' '.join(str(error).split())[:300]}") from error
    return lm.eval()


def refuse_quantised(base: Base) -> None:
    """See that the weights are not int8.

    Raises:
        UserError: they are.
    """
    with safe_open(base.info.moshi_weights, "pt") as file:
        quantised = any(key.endswith("_scb") for key in file.keys())
    if quantised or base.lm_config.get("quantize"):
        raise UserError(f"base {base.name} is quantised; use its bfloat16 form")
