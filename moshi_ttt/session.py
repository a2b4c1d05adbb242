"""A conversation on disk: all of it, to go on bit for bit, or only what its memory has learned.

Both are safetensors files whose metadata says which model they belong to; nothing in them is code.
A session holds the streaming state of Mimi, of LMGen (token cache) and of the LM (key-value rings,
positions, memories), and the random generators. A memory holds the fast weights, for tomorrow's
conversation. Restoring copies into the tensors that are there, so captured CUDA graphs go on seeing
them, and all checks come before the first copy.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from moshi.modules.streaming import StreamingModule
from moshi.modules.transformer import RingKVCache
from moshi.utils.compile import CUDAGraphed
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moshi_ttt.block import STREAMING
from moshi_ttt.config import TTTConfig
from moshi_ttt.engine import Engine, Sampling
from moshi_ttt.errors import UserError
from moshi_ttt.files import written_whole
from moshi_ttt.hybrid import BLOCK, HybridLMModel
from moshi_ttt.lanes import named_tensors
from moshi_ttt.states import restore_ttt_states, save_ttt_states

FORMAT = 1
SESSION, MEMORY = "session", "memory"
_PICKED = 256  # numbers looked at, at the start, in the middle and at the end of each weight
_MACHINERY = (CUDAGraphed, ExitStack, FunctionType, nn.Module, torch.device)
_FIXED = ("batch_size", "capacity", "respect_exec_mask")


def save_session(engine: Engine, path: str | os.PathLike[str]) -> None:
    """Write the whole state of an engine's conversations; the file appears whole or not at all."""
    tensors, values = _split(_live(engine))
    tensors |= {f"rng.{name}": state for name, state in _rng(engine).items()}
    about = {
        "rows": engine.rows,
        "frames": engine.frames,
        "device": engine.device.type,
        "sampling": asdict(engine.sampling),
        "values": values,
    }
    _write(path, SESSION, engine, tensors, about)


def load_session(engine: Engine, path: str | os.PathLike[str]) -> None:
    """Go on where a saved session ended, to the bit, on the same kind of device.

    How tokens are drawn is the engine's affair: make it with `session_sampling(path)`.

    Raises:
        UserError: no such file, not a session, of another model, configuration, number of rows or
            kind of device; the engine is as it was.
    """
    about, saved = _read(path, SESSION)
    _check_model(engine, about, path, codec=True)
    for name, here in (("rows", engine.rows), ("device", engine.device.type)):
        if about[name] != here:
            raise UserError(f"{path}: saved with {name} {about[name]}, here it is {here}")
    live = _live(engine)
    tensors, values = _split(live)
    rng = _rng(engine)
    like = tensors | {f"rng.{name}": state for name, state in rng.items()}
    if differ := sorted(set(like) ^ set(saved)) or sorted(set(values) ^ set(about["values"])):
        raise UserError(f"{path}: {differ[0]} is not in both the session and the model's state")
    for key, tensor in like.items():
        if (saved[key].shape, saved[key].dtype) != (tensor.shape, tensor.dtype):
            raise UserError(
                f"{path}: {key} was saved as {_kind(saved[key])}, here it is {_kind(tensor)}"
            )
    for key, value in values.items():
        there, fixed = about["values"][key], key.rpartition(".")[2] in _FIXED
        if type(there) is not type(value) or (fixed and there != value):
            raise UserError(f"{path}: {key} was saved as {there!r}, here it is {value!r}")
    with torch.no_grad():
        for key, (owner, name, value) in live.items():
            if isinstance(value, Tensor):
                value.copy_(saved[key])
            else:
                setattr(owner, name, about["values"][key])
    engine.frames = about["frames"]
    torch.set_rng_state(saved["rng.cpu"])
    if engine.device.type == "cuda":
        torch.cuda.set_rng_state(saved["rng.cuda"], engine.device)


def session_sampling(path: str | os.PathLike[str]) -> Sampling:
    """How a saved session drew its tokens.

    Raises:
        UserError: no such file, or not a session.
    """
    return Sampling(**_read(path, SESSION, tensors=False)[0]["sampling"])


def save_memory(engine: Engine, path: str | os.PathLike[str]) -> None:
    """Write what the memories have learned; the file appears whole or not at all.

    Raises:
        UserError: the model has no memory, or one that keeps nothing.
    """
    require_memory(engine)
    tensors: dict[str, Tensor] = {}
    for block, state in save_ttt_states(engine.lm).items():
        tensors |= {f"{block}/{name}": tensor for name, tensor in state[STREAMING].items()}
    _write(path, MEMORY, engine, tensors, {"rows": engine.rows, "frames": engine.frames})


def load_memory(engine: Engine, path: str | os.PathLike[str]) -> None:
    """Let a stream start with a memory kept earlier.

    Raises:
        UserError: no such file, not a memory, of another model or configuration (`chunk_size`,
            ...), or this model has none; the engine is as it was.
    """
    require_memory(engine)
    about, saved = _read(path, MEMORY)
    _check_model(engine, about, path, codec=False)
    states = save_ttt_states(engine.lm)
    for block, state in states.items():
        mine = {k.partition("/")[2]: t for k, t in saved.items() if k.startswith(f"{block}/")}
        state[STREAMING] = mine
    try:
        restore_ttt_states(engine.lm, states)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def require_memory(engine: Engine) -> None:
    """See that there is a memory to save or to load into.

    Raises:
        UserError: the model has none, or one that keeps nothing.
    """
    if not isinstance(engine.lm, HybridLMModel):
        raise UserError("the model has no memory: its checkpoint was trained without one")
    if not engine.lm.ttt_config.persistent_states:
        raise UserError("the model's memory keeps nothing (persistent_states: false)")


# -- what a stream consists of ---------------------------------------------------------------------

_Place = tuple[Any, str, Any]  # owner, attribute, value


def _live(engine: Engine) -> dict[str, _Place]:
    """Every value of the three streaming trees by name; LMGen holds the LM apart from its own."""
    roots: tuple[tuple[str, StreamingModule[Any]], ...] = (
        ("mimi", engine.mimi),
        ("gen", engine.gen),
        ("lm", engine.lm),
    )
    return {
        key: place
        for root, module in roots
        for name, state in module.get_streaming_state().items()
        for key, place in _walk(state, f"{root}.{name}" if name else root)
    }


def _walk(owner: object, path: str) -> Iterator[tuple[str, _Place]]:
    for name, value in vars(owner).items():
        key = f"{path}.{name}"
        if name == "_set_exec_mask_graphed" or isinstance(value, _MACHINERY):
            continue
        if isinstance(value, RingKVCache):
            yield from _walk(value, key)
        elif isinstance(value, tuple) and hasattr(value, "_fields"):
            yield from ((f"{key}.{n}", (value, n, t)) for n, t in named_tensors(value))
        elif value is None or isinstance(value, Tensor | int):
            yield key, (owner, name, value)
        else:
            raise TypeError(f"{key} is a {type(value).__name__}: how to save one is not known")


def _split(live: Mapping[str, _Place]) -> tuple[dict[str, Tensor], dict[str, int | None]]:
    tensors = {k: v for k, (_, _, v) in live.items() if isinstance(v, Tensor)}
    return tensors, {k: v for k, (_, _, v) in live.items() if k not in tensors}


def _rng(engine: Engine) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if engine.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(engine.device)
    return states


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


# -- which model it belongs to ---------------------------------------------------------------------


def _fingerprints(engine: Engine) -> dict[str, str]:
    """Of the base, of what was trained on it, and of the codec: from the weights as they run."""
    weights = engine.lm.state_dict()
    adapters = {
        name: weight
        for name, weight in weights.items()
        if any(part in name for part in (".lora_A.", ".lora_B.", f".{BLOCK}."))
    }
    base = {n.replace(".frozen_W.", "."): w for n, w in weights.items() if n not in adapters}
    parts = {"base": base, "adapters": adapters, "codec": engine.mimi.state_dict()}
    return {part: _digest(weights) for part, weights in parts.items()}


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


def _check_model(
    engine: Engine, about: Mapping[str, Any], path: str | os.PathLike[str], *, codec: bool
) -> None:
    theirs, mine = about["ttt"] or {}, _config(engine) or {}
    if theirs:  # it may be older than a key
        try:
            theirs = TTTConfig.from_dict(theirs).to_dict()
        except ValueError as error:
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
        if prints[part] != about["model"][part] and (codec or part != "codec"):
            raise UserError(f"{path} belongs to {reason}")


# -- the file --------------------------------------------------------------------------------------


def _write(
    path: str | os.PathLike[str],
    kind: str,
    engine: Engine,
    tensors: Mapping[str, Tensor],
    about: dict[str, Any],
) -> None:
    about |= {"format": FORMAT, "ttt": _config(engine), "model": _fingerprints(engine)}
    copies = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
    with written_whole(path) as beside:
        save_file(copies, beside, {f"moshi_ttt.{kind}": json.dumps(about)})


def _read(
    path: str | os.PathLike[str], kind: str, *, tensors: bool = True
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(f"moshi_ttt.{kind}")
            if header is None:
                raise UserError(f"{path} is not a saved {kind}")
            about = json.loads(header)
            if about["format"] != FORMAT:
                raise UserError(f"{path}: format {about['format']!r}, this version reads {FORMAT}")
            return about, {k: file.get_tensor(k) for k in file.keys()} if tensors else {}
    except SafetensorError as error:
        raise UserError(f"{path} is not a saved {kind}, or is broken: {error}") from error
