"""What there is to talk to: a checkpoint, a bare base, or the embedded default; and how."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from safetensors import safe_open
from sentencepiece import SentencePieceProcessor

from moshi_ttt.base import Base, find_base, load_base
from moshi_ttt.checkpoint import load
from moshi_ttt.engine import Sampling
from moshi_ttt.errors import UserError
from moshi_ttt.files import newest_checkpoint

_NUMBERS_PER_THREAD = 1 << 25
_SEEDS = 1 << 63
EMBEDDED_BASE = Path("data/tiny/base")
_SAMPLING = tuple(f.name for f in fields(Sampling))
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Talker:
    """The parts of a Moshi, on one device, in eval mode.

    Attributes:
        lm: with a memory or without.
        mimi: the codec.
        tokenizer: of the text.
        gen_config: what the base's config.json says of sampling.
        name: what this is and how it was chosen, for people.
    """

    lm: LMModel
    mimi: MimiModel
    tokenizer: SentencePieceProcessor
    gen_config: dict[str, Any]
    name: str


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options of a command line that talks: to what, where, and how tokens are drawn."""
    p = parser
    p.add_argument("--checkpoint", help="a checkpoint folder (the newest under runs/)")
    p.add_argument("--base", help="a base folder or hub repository; alone: without a checkpoint")
    p.add_argument("--device", help="cuda or cpu (cuda if there is one)")
    p.add_argument("--threads", type=int, help="CPU threads (one per 32 M parameters)")
    p.add_argument("--seed", type=int, help="of the sampling (0; a session brings its own)")
    p.add_argument("--temp", type=float, help="temperature of the voice (0.8)")
    p.add_argument("--temp-text", type=float, help="temperature of the text (0.7)")
    p.add_argument("--top-k", type=int, help="most likely codes to draw from (250; 0: all)")
    p.add_argument("--top-k-text", type=int, help="most likely text tokens (25; 0: all)")
    p.add_argument("--greedy", action="store_true", default=None, help="no sampling")


def check_model_options(args: argparse.Namespace) -> None:
    """See that the options of `add_model_options` can be meant, before anything is loaded.

    Raises:
        UserError: a value out of range.
    """
    if args.threads is not None and args.threads < 1:
        raise UserError(f"--threads must be at least 1, got {args.threads}")
    if args.seed is not None and not 0 <= args.seed < _SEEDS:
        raise UserError(f"--seed must be 0 to {_SEEDS - 1}, got {args.seed}")
    sampling_of(args, {})


def sampling_of(
    args: argparse.Namespace, gen_config: Mapping[str, Any], session: Sampling | None = None
) -> Sampling:
    """The options' sampling; what they leave open is the session's, or else the base's.

    Raises:
        UserError: a value out of range.
    """
    start = session or Sampling(**{k: v for k, v in gen_config.items() if k in _SAMPLING})
    given = {k: getattr(args, k) for k in _SAMPLING if getattr(args, k) is not None}
    try:
        return replace(start, **given)
    except ValueError as error:
        raise UserError(str(error)) from error


def cpu_threads(lm: LMModel) -> int:
    """Threads for the CPU's part: where little is computed, more of them only wait."""
    numbers = sum(p.numel() for p in lm.parameters())
    return min(1 + numbers // _NUMBERS_PER_THREAD, os.cpu_count() or 1)


def choose_device(name: str | None) -> torch.device:
    """The device of that name; None is CUDA where there is one, else the CPU.

    Raises:
        UserError: no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cuda", "cpu"):
            raise RuntimeError(f"{device.type} is known to torch, and not to Moshi")
    except RuntimeError as error:
        raise UserError(f"device {name!r} is unknown; choose cuda, cuda:1, ... or cpu") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name}: {torch.cuda.device_count()} CUDA devices were found")
    return device


def open_talker(
    checkpoint: str | None, base: str | None, device: torch.device, *, runs: str = "runs"
) -> Talker:
    """Load what is named, or else the newest checkpoint under `runs`, or else the embedded base.

    A base without a checkpoint is talked to as it is, without a memory.

    Raises:
        UserError: it cannot be found or does not fit (see `moshi_ttt.checkpoint`).
    """
    newest = None if checkpoint or base else newest_checkpoint(runs)
    if checkpoint or newest:
        loaded = load(checkpoint or str(newest), base=base, device=device)
        name = f"checkpoint {checkpoint or newest}" + (
            f" (the newest under {runs}/)" if newest else ""
        )
        return _with_codec(loaded.lm, loaded.base, device, name)
    name = f"base {base}, without a memory"
    if base is None:
        from moshi_ttt.tiny import build_base

        if not (EMBEDDED_BASE / "config.json").is_file():
            build_base(EMBEDDED_BASE)
        base = str(EMBEDDED_BASE)
        name = (
            f"the embedded base {base}, untrained and without a memory (no checkpoint in {runs}/)"
        )
    found = find_base(base)
    lm = load_base(found, device=device, dtype=_stored_dtype(found.info.moshi_weights))
    return _with_codec(lm, found, device, name)


def _with_codec(lm: LMModel, base: Base, device: torch.device, name: str) -> Talker:
    try:
        mimi, tokenizer = base.info.get_mimi(device), base.info.get_text_tokenizer()
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"base {base.name}: its codec or tokenizer is broken: {reason}") from error
    return Talker(lm, mimi, tokenizer, dict(base.info.lm_gen_config), name)


def _stored_dtype(weights: Path) -> torch.dtype:
    with safe_open(weights, "pt") as file:
        stored = {file.get_slice(key).get_dtype() for key in file.keys()} & set(_DTYPES)
    # an untrained base stores none
    return _DTYPES[min(stored, key=list(_DTYPES).index, default="F32")]
