"""A safetensors file that says which model its tensors belong to; nothing in it is code."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moshi_ttt.config import TTTConfig
from moshi_ttt.engine import Engine
from moshi_ttt.errors import UserError
from moshi_ttt.files import written_whole
from moshi_ttt.hybrid import BLOCK, HybridLMModel

FORMAT = 1
_PICKED = 256  # numbers looked at, at the start, in the middle and at the end of each weight
_SAYS = {"rows": int, "ttt": (dict, type(None)), "model": dict}  # of what type, in every file

_known: WeakKeyDictionary[Engine, dict[str, str]] = WeakKeyDictionary()


def _fingerprints(engine: Engine) -> dict[str, str]:
    """Of the base, of what was trained on it, and of the codec: from the weights as they run.

    Taken once an engine, whose weights do not change; a conversation must not wait for it.
    """
    if engine not in _known:
        weights = engine.lm.state_dict()
        adapters = {
            name: weight
            for name, weight in weights.items()
            if any(part in name for part in (".lora_A.", ".lora_B.", f".{BLOCK}."))
        }
        base = {n.replace(".frozen_W.", "."): w for n, w in weights.items() if n not in adapters}
        parts = {"base": base, "adapters": adapters, "codec": engine.mimi.state_dict()}
        _known[engine] = {part: _digest(weights) for part, weights in parts.items()}
    return _known[engine]


def about_model(engine: Engine) -> dict[str, Any]:
    """What a file says of the model it is for."""
    return {"format": FORMAT, "ttt": _config(engine), "model": _fingerprints(engine)}


def _digest(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        flat, middle = weight.detach().flatten(), weight.numel() // 2
        picked = torch.cat([flat[:_PICKED], flat[middle : middle + _PICKED], flat[-_PICKED:]])
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(picked.double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _config(engine: Engine) -> dict[str, Any] | None:
    return engine.lm.ttt_config.to_dict() if isinstance(engine.lm, HybridLMModel) else None


def check_model(engine: Engine, about: Mapping[str, Any], path: object, *, codec: bool) -> None:
    """See that a file is for the model of an engine.

    Args:
        engine: any.
        about: what the file says (`about_model`).
        path: what errors call it.
        codec: the codec matters too.

    Raises:
        UserError: it is of another model or configuration: which.
    """
    theirs, mine = about["ttt"] or {}, _config(engine) or {}
    if theirs:  # it may be older than a key
        try:
            theirs = TTTConfig.from_dict(theirs).to_dict()
        except (TypeError, ValueError) as error:
            raise UserError(f"{path} holds a memory of another version: {error}") from error
    if theirs != mine:
        if not theirs or not mine:
            raise UserError(f"{path}: one of it and the model has a memory, the other has none")
        differ = [
            f"{k} {theirs.get(k)!r}, not {v!r}" for k, v in mine.items() if theirs.get(k) != v
        ]
        raise UserError(f"{path} belongs to another memory: {'; '.join(differ)}")
    reasons = {
        "base": "another base model",
        "adapters": "another checkpoint of this base (other LoRA or memory weights)",
        "codec": "another codec (Mimi)",
    }
    prints = _fingerprints(engine)
    for part, reason in reasons.items():
        if prints[part] != about["model"].get(part) and (codec or part != "codec"):
            raise UserError(f"{path} belongs to {reason}")


def write(
    path: str | os.PathLike[str],
    kind: str,
    about: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write a file of a kind, e.g. `"memory"`, that appears whole or not at all."""
    copies = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
    with written_whole(path) as beside:
        save_file(copies, beside, {f"moshi_ttt.{kind}": json.dumps(dict(about))})


def read(
    path: str | os.PathLike[str],
    kind: str,
    *,
    only: str = "",
    says: Mapping[str, type] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file says of itself, and its tensors on the CPU, those whose names end in `only`.

    Args:
        path: the file.
        kind: e.g. `"memory"`.
        only: see above.
        says: types of what files of this kind say beside `about_model` and `rows`.

    Raises:
        UserError: no such file, it is broken, or not of this kind or format.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(f"moshi_ttt.{kind}")
            if header is None:
                raise UserError(f"{path} is not a saved {kind}")
            about = json.loads(header)
            if not isinstance(about, dict):
                raise ValueError(f"it says {about!r} of itself")
            if about.get("format") != FORMAT:
                format = about.get("format")
                raise UserError(f"{path}: format {format!r}, this version reads {FORMAT}")
            for name, type in {**_SAYS, **(says or {})}.items():
                if name not in about or not isinstance(about[name], type):
                    raise ValueError(f"its {name} is {about.get(name)!r}")
            return about, {k: file.get_tensor(k) for k in file.keys() if k.endswith(only)}
    except UserError:
        raise
    except (OSError, RecursionError, SafetensorError, ValueError) as error:
        raise UserError(f"{path} is not a saved {kind}, or is broken: {error}") from error


def kind_of(tensor: Tensor) -> str:
    """Shape and dtype of a tensor, for people."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
