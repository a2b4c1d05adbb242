"""A base that nobody trained: a Moshi's shape and a seed on disk instead of its weights.

Its folder is like any base's, config.json and model.safetensors, but the latter holds no tensor:
its header says what the weights are made of, and is what tells one such base from another. It need
have neither Mimi nor tokenizer, as codes without transcripts need none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo, get_moshi_lm
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor

from moshi_ttt.errors import UserError
from moshi_ttt.files import written_whole

WEIGHTS = "model.safetensors"
MIMI, MIMI_CONFIG, TOKENIZER = "mimi.safetensors", "mimi_config.json", "tokenizer.model"
"""Files that such a base finds in its folder, where its config.json names no others."""
_KEY = "untrained"


@dataclass(frozen=True)
class Recipe:
    """What random weights are made from, beside the LM's keywords.

    Attributes:
        seed: of the weights.
        codec: fingerprint of the Mimi whose stored codes it is trained on; None if there are none.
    """

    seed: int
    codec: str | None

    def build(
        self, lm_config: Mapping[str, Any], device: str | torch.device, dtype: torch.dtype
    ) -> LMModel:
        """The model; its weights are the same on every device, the generators are left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            lm = get_moshi_lm(None, dict(lm_config), "cpu", torch.float32)
        return lm.to(device=device, dtype=dtype)


def write_untrained(folder: Path, config: Mapping[str, Any], recipe: Recipe) -> Path:
    """Write such a base.

    Args:
        folder: made if missing; what is there and right stays as it is.
        config: keywords of LMModel, and names of Mimi and tokenizer if it has them.
        recipe: of its weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(config), indent=1) + "\n"
    file = folder / "config.json"
    if not file.is_file() or file.read_text() != text:
        with written_whole(file) as beside:
            beside.write_text(text)
    shape = {k: v for k, v in config.items() if not k.endswith("_name")}
    said = json.dumps({"config": shape, **asdict(recipe)}, sort_keys=True)
    if _said(folder / WEIGHTS) != said:
        with written_whole(folder / WEIGHTS) as beside:
            save_file({}, beside, {_KEY: said})
    return folder


def read_recipe(weights: Path) -> Recipe | None:
    """What weights are made from, None of a file that has them."""
    said = _said(weights)
    if said is None:
        return None
    values = json.loads(said)
    return Recipe(values["seed"], values["codec"])


def _said(weights: Path) -> str | None:
    if not weights.is_file() or weights.suffix != ".safetensors":
        return None
    try:
        with safe_open(weights, "pt") as file:
            return (file.metadata() or {}).get(_KEY)
    except SafetensorError as error:
        raise UserError(f"{weights} cannot be read: {error}") from error


@dataclass
class UntrainedInfo(CheckpointInfo):
    """moshi's description of such a base, whose Mimi and tokenizer may not be there."""

    @classmethod
    def of(cls, info: CheckpointInfo) -> UntrainedInfo:
        """The same files."""
        return cls(**vars(info))

    def get_mimi(self, device: torch.device | str = "cpu") -> MimiModel:
        """Mimi.

        Raises:
            UserError: there is none.
        """
        if not self.mimi_weights.is_file():
            raise UserError(
                f"base {self.moshi_weights.parent} has no Mimi, it was made for codes alone: to "
                f"hear or make sound, put the Mimi that made them at {self.mimi_weights}"
            )
        return super().get_mimi(device)

    def get_text_tokenizer(self) -> SentencePieceProcessor:
        """The tokenizer; where there is none, one that refuses the first word."""
        if not self.tokenizer.is_file():
            return _NoTokenizer(self.tokenizer)
        return super().get_text_tokenizer()

    @property
    def names(self) -> dict[str, str]:
        """Names of Mimi and tokenizer for a config.json, of those that are there."""
        found = {"mimi_name": self.mimi_weights, "tokenizer_name": self.tokenizer}
        return {k: f"file://{v.resolve()}" for k, v in found.items() if v.is_file()}


class _NoTokenizer(SentencePieceProcessor):
    """Stands where no word is looked up."""

    def __init__(self, wanted: Path) -> None:
        super().__init__()
        self.wanted = wanted

    def __len__(self) -> int:
        """No token."""
        return 0

    def encode(self, input: object, *_: object, **__: object) -> NoReturn:
        """Refuse."""
        raise UserError(
            f"a transcript ({input!r}) needs a tokenizer, and this base has none: name "
            f"moshi_paths.tokenizer_path, or put the file at {self.wanted}"
        )
