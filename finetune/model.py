"""The model of a run: base, LoRA and memory, found, sized and put together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from safetensors import SafetensorError
from sentencepiece import SentencePieceProcessor

from finetune.args import TrainArgs
from finetune.data.manifest import Source
from finetune.data.stored_checks import needs_codec
from finetune.memory_use import check_fits
from finetune.sizes import SIZES
from moshi_ttt import states
from moshi_ttt.base import CONFIG_FILE, Base, find_base, fingerprint, load_base, read_json
from moshi_ttt.errors import UserError, no_space_left
from moshi_ttt.hybrid import Spliced, splice
from moshi_ttt.lora import add_lora, load_lora
from moshi_ttt.untrained import Recipe, UntrainedInfo, read_recipe, write_untrained

UNTRAINED = Path("data/untrained")
"""Where the bases of runs from random weights are noted down: some kB each, no weights."""
SEVEN_B = ("kyutai/moshiko-pytorch", "kyutai/moshika-pytorch")
"""Repositories known to be Moshi 7B, whatever the suffix: their size needs no network."""
_NOT_OF_THE_LM = (
    "moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name", "model_type",
    "lm_gen_config", "tts_config", "stt_config", "model_id",
    "lora", "lora_rank", "lora_scaling", "lora_name",
)  # fmt: skip
"""Keys of a config.json that are no keyword of LMModel."""


def check_remote(args: TrainArgs, device: torch.device) -> None:
    """Refuse a base of the hub that cannot fit, before its weights are downloaded.

    Of a repository that is not known to be the 7B, config.json (a few kB) is fetched to see.

    Raises:
        UserError: it does not fit, or the hub cannot be reached.
    """
    paths = args.moshi_paths
    name = paths.hf_repo_id or ""
    # a local folder may have one slash in its name, too
    if not paths.is_remote or Path(name).expanduser().is_dir():
        return
    config: dict[str, Any] | None = None
    if paths.config_path:
        config = read_json(Path(paths.config_path))
    elif not name.startswith(SEVEN_B):
        config = _remote_config(name)
    if config is not None:
        config = {k: v for k, v in config.items() if k not in _NOT_OF_THE_LM}
    check_fits(config, args, device)


def _remote_config(name: str) -> dict[str, Any] | None:
    try:
        return read_json(Path(hf_hub_download(name, CONFIG_FILE)))
    except LocalEntryNotFoundError as error:  # also an EntryNotFoundError: this one is no network
        raise _unreachable(name, error) from error
    except EntryNotFoundError:
        return None  # an old repository of the 7B
    except (OSError, HFValidationError) as error:
        if no_space_left(error):
            raise
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"moshi_paths.hf_repo_id {name!r}: the Hugging Face hub cannot be reached or has no such "
        f"repository ({reason}); give a local folder, or moshi_paths.* for each file"
    )


def find_base_of(args: TrainArgs, sources: Sequence[Source] = ()) -> Base:
    """The base that `moshi_paths` names; of a `size`, random weights for the codes of `sources`.

    Raises:
        UserError: it is not there, or the hub cannot be reached.
    """
    paths = args.moshi_paths
    if paths.size is not None:
        stored = (r.stored for s in sources for r in s.recordings)
        codec = next((x.codec for x in stored if x), None)
        recipe, config = Recipe(args.seed, codec), SIZES[paths.size]
        digest = hashlib.sha256(f"{config} {recipe}".encode()).hexdigest()
        folder = UNTRAINED / f"{paths.size}-seed{args.seed}-{digest[:8]}"
        return find_base(
            write_untrained(folder, config, recipe),
            mimi_path=paths.mimi_path,
            tokenizer_path=paths.tokenizer_path,
        )
    name = paths.hf_repo_id or ""
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise UserError(f"moshi_paths.hf_repo_id {name}: no such folder")
    try:
        return find_base(
            paths.hf_repo_id or "local",
            moshi_path=paths.moshi_path,
            mimi_path=paths.mimi_path,
            tokenizer_path=paths.tokenizer_path,
            config_path=paths.config_path,
        )
    except HFValidationError as error:
        raise _unreachable(paths.hf_repo_id or "", error) from error
    except json.JSONDecodeError as error:
        raise UserError(f"base {paths.hf_repo_id}: Mimi's config is not JSON: {error}") from error


def load_mimi(base: Base, device: torch.device) -> MimiModel:
    """Mimi, the codec of a base.

    Raises:
        UserError: its file is broken.
    """
    with _readable(f"base {base.name}: Mimi ({base.info.mimi_weights})"):
        return base.info.get_mimi(device)


def codec_file(base: Base) -> str:
    """Fingerprint of a base's Mimi, told without loading it.

    Raises:
        UserError: its file is broken.
    """
    with _readable(f"base {base.name}: Mimi ({base.info.mimi_weights})"):
        return fingerprint(base.info.mimi_weights)


def codec_needed(base: Base, sources: Sequence[Source]) -> bool:
    """Whether Mimi has to be loaded: for audio, or to see that stored codes are its own.

    Raises:
        UserError: its file is broken; or it is needed and the base, an untrained one, has none; or
            has none and was trained on the codes of another Mimi.
    """
    if base.info.mimi_weights.is_file() or not isinstance(base.info, UntrainedInfo):
        return needs_codec(sources, codec_file(base))
    recipe = read_recipe(base.info.moshi_weights)
    codec = None if recipe is None else recipe.codec
    for recording in (r for s in sources for r in s.recordings):
        if recording.stored is None:
            raise UserError(
                f"{recording.where}: this is audio, and base {base.name} has no Mimi: encode it "
                "(python -m finetune.encode MANIFEST FOLDER --base BASE), name "
                "moshi_paths.mimi_path in training, or put Mimi's file at "
                f"{base.info.mimi_weights}"
            )
        if codec not in (None, recording.stored.codec):
            raise UserError(
                f"{recording.where}: its codes are of another codec "
                f"({recording.stored.codec[:12]}) than those that the model is trained on "
                f"({codec[:12]}): encode all of them with one base"
            )
    return False


def load_tokenizer(base: Base) -> SentencePieceProcessor:
    """The text tokenizer of a base.

    Raises:
        UserError: its file is broken, or has more tokens than the model.
    """
    with _readable(f"base {base.name}: tokenizer ({base.info.tokenizer})"):
        found = base.info.get_text_tokenizer()
    tokens, known = len(found), base.lm_config["text_card"]
    if tokens > known:
        raise UserError(
            f"tokenizer {base.info.tokenizer} has {tokens} tokens, but the model knows {known}"
        )
    return found


_BROKEN = (
    SafetensorError, RuntimeError, KeyError, TypeError, AssertionError, json.JSONDecodeError,
    UnicodeDecodeError,
)  # fmt: skip


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """A file that cannot be read as what it should be is the user's to mend."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _BROKEN as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{what} cannot be read: {reason or type(error).__name__}") from error


def check_lora_file(args: TrainArgs) -> None:
    """Refuse a `lora.path` that is not there, before anything is loaded.

    Raises:
        UserError: no such file, or LoRA is not enabled.
    """
    if args.lora.path is None:
        return
    if not args.lora.enable:
        raise UserError(f"lora.path is {args.lora.path!r}, but lora.enable is false")
    if not Path(args.lora.path).expanduser().is_file():
        raise UserError(f"lora.path {args.lora.path} does not exist")


def build_model(
    base: Base, args: TrainArgs, device: torch.device
) -> tuple[LMModel, Spliced | None]:
    """Load the base and put in what is trained.

    Returns:
        The model in train mode, and what was spliced.

    Raises:
        UserError: the base, the LoRA file or the memory's configuration does not fit.
    """
    bf16 = device.type == "cuda" and args.param_dtype == "bfloat16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    with _readable(f"base {base.name} ({base.info.moshi_weights})"):
        lm = load_base(base, device=device, dtype=dtype)
    if args.lora.enable:
        if args.lora.path is None:
            add_lora(lm, args.lora.rank, args.lora.scaling)
        else:
            path = Path(args.lora.path).expanduser()
            with _readable(f"lora.path {path}"):
                load_lora(lm, path, args.lora.rank, args.lora.scaling)
    done = None
    if args.ttt is not None:
        try:
            done = splice(lm, args.ttt)
        except ValueError as error:
            raise UserError(f"ttt: {error}") from error
        for block in states.ttt_blocks(lm).values():
            block.memory.cast_projections(dtype)
    lm.transformer.checkpointing = args.gradient_checkpointing
    if lm.depformer is not None:
        lm.depformer.checkpointing = args.gradient_checkpointing
    return lm.train(), done
