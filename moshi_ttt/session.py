"""Conversations on disk, all of them or one row's, to go on bit for bit.

A session holds the streaming state of Mimi, of LMGen (token cache) and of the LM (key-value rings,
positions, memories), and the random generators; `moshi_ttt.saved_memory` is the memory alone.
Restoring copies into the tensors that are there, so captured CUDA graphs go on seeing them, and all
checks come before the first copy.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from types import FunctionType
from typing import Any

import torch
from moshi.modules.streaming import StreamingModule
from moshi.modules.transformer import RingKVCache
from moshi.utils.compile import CUDAGraphed
from torch import Tensor, nn

from moshi_ttt.engine import Engine, Sampling
from moshi_ttt.errors import UserError
from moshi_ttt.lanes import named_tensors
from moshi_ttt.state_file import about_model, check_model, kind_of, read, write

SESSION = "session"
_MACHINERY = (CUDAGraphed, ExitStack, FunctionType, nn.Module, torch.device)
_FIXED = ("batch_size", "capacity", "respect_exec_mask")
_PASSING = ("_set_exec_mask_graphed", "diverged")  # nothing that lasts from frame to frame
_SHARED = ("gen.initial",)  # a constant of the model, not of a row
_SAYS = {"frames": int, "device": str, "sampling": dict, "values": dict}


def save_session(engine: Engine, path: str | os.PathLike[str], row: int | None = None) -> None:
    """Write the whole state of conversations; the file appears whole or not at all.

    Args:
        engine: between two frames.
        path: a safetensors file.
        row: one conversation; None is all, with the random generators of the process.
    """
    tensors, values = _split(_live(engine))
    if row is not None:
        tensors = {key: _row(key, t, row, engine.rows) for key, t in tensors.items()}
    tensors |= {f"rng.{name}": state for name, state in _rng(engine).items()}
    about = {
        "rows": engine.rows if row is None else 1,
        "frames": engine.frames,
        "device": engine.device.type,
        "sampling": asdict(engine.sampling),
        "values": values,
    }
    write(path, SESSION, about_model(engine) | about, tensors)


def load_session(engine: Engine, path: str | os.PathLike[str], row: int | None = None) -> None:
    """Go on where a saved session ended.

    All rows, on the same kind of device: to the bit, random numbers included. One row, among others
    that do not notice: with an equal state, but with the random numbers of the process it is in.

    How tokens are drawn is the engine's affair: make it with `session_sampling(path)`.

    Args:
        engine: between two frames.
        path: of `save_session`.
        row: where a conversation that was saved alone is put; None is all rows.

    Raises:
        UserError: no such file, not a session, of another model, configuration, number of rows or
            (all rows) kind of device; the engine is as it was.
    """
    about, saved = read(path, SESSION, says=_SAYS)
    check_model(engine, about, path, codec=True)
    fits = {"rows": 1} if row is not None else {"rows": engine.rows, "device": engine.device.type}
    for name, here in fits.items():
        if about[name] != here:
            raise UserError(f"{path}: saved with {name} {about[name]}, here it is {here}")
    live = _live(engine)
    tensors, values = _split(live)
    rng = {} if row is not None else {f"rng.{name}": t for name, t in _rng(engine).items()}
    saved = {k: t for k, t in saved.items() if row is None or not k.startswith("rng.")}
    if row is not None:
        tensors = {key: _row(key, t, row, engine.rows) for key, t in tensors.items()}
    like = tensors | rng
    if differ := sorted(set(like) ^ set(saved)) or sorted(set(values) ^ set(about["values"])):
        raise UserError(f"{path}: {differ[0]} is not in both the session and the model's state")
    for key, tensor in like.items():
        if (saved[key].shape, saved[key].dtype) != (tensor.shape, tensor.dtype):
            raise UserError(
                f"{path}: {key} was saved as {kind_of(saved[key])}, here it is {kind_of(tensor)}"
            )
    for key, value in values.items():
        there, fixed = about["values"][key], key.rpartition(".")[2] in _FIXED
        fixed = fixed and not (row is not None and key.endswith("batch_size"))
        if type(there) is not type(value) or (fixed and there != value):
            raise UserError(f"{path}: {key} was saved as {there!r}, here it is {value!r}")
    _check_numbers(engine, saved, rng, path)
    with torch.no_grad():
        for key, tensor in tensors.items():
            if key not in _SHARED:
                tensor.copy_(saved[key])
    if row is not None:
        engine.loaded(row)
        return
    for key, (owner, name, value) in live.items():
        if not isinstance(value, Tensor):
            setattr(owner, name, about["values"][key])
    engine.loaded()
    engine.frames = about["frames"]
    torch.set_rng_state(saved["rng.cpu"])
    if engine.device.type == "cuda":
        torch.cuda.set_rng_state(saved["rng.cuda"], engine.device)


def session_sampling(path: str | os.PathLike[str]) -> Sampling:
    """How a saved session drew its tokens.

    Raises:
        UserError: no such file, or not a session.
    """
    about, _ = read(path, SESSION, only="rng.cpu", says=_SAYS)
    try:
        return Sampling(**about["sampling"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is not a saved {SESSION}, or is broken: {error}") from error


def _check_numbers(
    engine: Engine, saved: Mapping[str, Tensor], rng: Iterable[str], path: object
) -> None:
    """Refuse what would end the engine at its next step, or this load in the midst of it."""
    state, lm = engine.gen._streaming_state, engine.lm
    assert state is not None
    most = torch.full_like(saved["gen.cache"], lm.initial_token_id)
    most[:, 0] = lm.text_initial_token_id
    if bool(((saved["gen.cache"] > most) | (saved["gen.cache"] < lm.ungenerated_token_id)).any()):
        raise UserError(f"{path} is broken: gen.cache holds what is no token of this model")
    if not torch.equal(saved["gen.initial"], state.initial.cpu()):
        raise UserError(f"{path} is broken: gen.initial is not this model's")
    for name in rng:
        try:
            torch.Generator(name.removeprefix("rng.")).set_state(saved[name])
        except RuntimeError as error:
            raise UserError(f"{path} is broken: {name}: {error}") from error


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
        if name in _PASSING or isinstance(value, _MACHINERY):
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


def _row(key: str, tensor: Tensor, row: int, rows: int) -> Tensor:
    """A row's part of a tensor of a stream's state, as a view."""
    if key in _SHARED:
        return tensor
    dim = 1 if key.endswith(".kv_cache.cache") else 0  # keys and values come before the rows
    if tensor.dim() <= dim or tensor.shape[dim] != rows:
        raise TypeError(f"{key} is {kind_of(tensor)}: which part of it is a row's is not known")
    return tensor.narrow(dim, row, 1)


def _rng(engine: Engine) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if engine.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(engine.device)
    return states
