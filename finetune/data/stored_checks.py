"""Whether stored codes fit a run: the model, each other, and what was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from finetune.data.manifest import Source
from finetune.data.recording import Recording
from finetune.data.stored import SILENCE, StoredCodes, digest_of
from moshi_ttt.errors import UserError

Broken = Callable[[Recording, UserError], object]
"""Called with a recording that cannot be read, and why."""


def needs_codec(sources: Sequence[Source], codec_file: str) -> bool:
    """Whether Mimi has to be loaded: for audio, or to see that stored codes are its own.

    Args:
        sources: of a run.
        codec_file: fingerprint of Mimi's file; codes made by that file need no other look.
    """
    stored = [r.stored for s in sources for r in s.recordings]
    return any(codes is None or codes.codec_file != codec_file for codes in stored)


def check_codes(sources: Sequence[Source], codebooks: int, card: int) -> None:
    """See that stored codes fit a model and each other; reads none of them.

    Args:
        sources: of a run, those of audio too.
        codebooks: of the model, each side.
        card: codes of a codebook that the model knows.

    Raises:
        UserError: another number of codebooks or of codes in each, or codes of two codecs; with
            manifest and line.
    """
    first: Recording | None = None
    for recording in (r for s in sources for r in s.recordings):
        stored = recording.stored
        if stored is None:
            continue
        if stored.codebooks != codebooks:
            raise UserError(
                f"{recording.where}: codes of {stored.codebooks} codebooks, but the model has "
                f"{codebooks} a side: encode with its base (python -m finetune.encode --base)"
            )
        if stored.card != card:
            raise UserError(
                f"{recording.where}: {stored.card} codes a codebook, but the model knows "
                f"{card}: encode with its base (python -m finetune.encode --base)"
            )
        first = first or recording
        assert first.stored is not None
        if stored.codec != first.stored.codec:
            raise _other_codec(recording, stored.codec, first.where, first.stored.codec)


def _other_codec(recording: Recording, codec: str, others: str, theirs: str) -> UserError:
    return UserError(
        f"{recording.where}: its codes are of another codec ({codec[:12]}) than {others} "
        f"({theirs[:12]}): encode all of a run with one base"
    )


def verify_codes(
    recordings: Sequence[Recording],
    codec: str | None,
    mono_side: str,
    broken: Broken | None = None,
) -> None:
    """Read all stored codes and compare them with their index; what is audio is left alone.

    Args:
        recordings: any.
        codec: fingerprint of the run's Mimi, None if it has none.
        mono_side: whose voice the run takes mono recordings for.
        broken: called with every recording whose codes are broken, and why; None raises at the
            first.

    Raises:
        UserError: codes that are broken, of another codec, or mono with another side.
    """
    stored = [(r, r.stored) for r in recordings if r.stored is not None]
    for recording, codes in stored:
        if codec not in (None, codes.codec):
            raise _other_codec(recording, codes.codec, "the base's Mimi", str(codec))
        if recording.channels == 1 and codes.mono_side != mono_side:
            raise UserError(
                f"{recording.where}: encoded with --mono-side {codes.mono_side}, but here mono "
                f"recordings are the {mono_side} side: set data.mono_side or --side to the same"
            )
    with tqdm(total=len(stored), desc="checking codes", leave=False, delay=1) as progress:
        for shard, group in groupby(stored, lambda pair: pair[1].shard):
            pairs = list(group)
            for recording, error in _broken_in(shard, pairs):
                if broken is None:
                    raise error
                broken(recording, error)
            progress.update(len(pairs))


def _broken_in(
    shard: Path, stored: Sequence[tuple[Recording, StoredCodes]]
) -> Iterator[tuple[Recording, UserError]]:
    left = list(stored)
    try:
        with safe_open(shard, "pt") as file:
            silence = 0  # frames of it that are right
            if any(r.channels == 1 for r, _ in stored):
                quiet = file.get_tensor(SILENCE)
                if (file.metadata() or {}).get(SILENCE) == digest_of(quiet):
                    silence = quiet.shape[-1]
            for recording, codes in stored:
                try:
                    _verify(recording, codes, file.get_tensor(codes.key), silence)
                except UserError as error:
                    yield recording, error
                except SafetensorError as error:
                    yield recording, _no_codes(recording, shard, error)
                left.pop(0)
    except (SafetensorError, OSError) as error:
        for recording, _ in left:
            yield recording, _no_codes(recording, shard, error)


def _no_codes(recording: Recording, shard: Path, error: Exception) -> UserError:
    return UserError(f"{recording.where}: {shard}: no such codes there: {error}")


def _verify(recording: Recording, codes: StoredCodes, found: Tensor, silence: int) -> None:
    said = [recording.channels, codes.codebooks, codes.frames]
    what = f"{recording.where}: {codes.shard}: {codes.key}"
    if list(found.shape) != said:
        raise UserError(f"{what} is {list(found.shape)}, but the line says {said}")
    if found.dtype != torch.int16 or int(found.min()) < 0 or int(found.max()) >= codes.card:
        raise UserError(f"{what} holds what is no code: 0 to {codes.card - 1} are, in int16")
    if digest_of(found) != codes.sha1:
        raise UserError(f"{what} is not what was written")
    if recording.channels == 1 and silence < max(codes.file_frames):
        raise UserError(f"{what}: the codes of silence are too few or not what was written")
