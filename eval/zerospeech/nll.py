"""The NLL of short clips: codes made once, batches of like lengths, a fresh stream for each clip.

A clip's score is by default the mean NLL a frame of codebook 0, Mimi's semantic one. The mean and
not the sum, because the two clips of a pair differ in length and a sum mostly says which is the
shorter; it is what later spoken language models do (github.com/slp-rl/slamkit, `mean_nll: true`).
The sum is the clip's probability itself, as the first ZeroSpeech 2021 submissions gave it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from moshi.models.lm import LMModel
from torch import Tensor
from tqdm import tqdm

from eval.perplexity import Progress, score
from eval.zerospeech.sets import Pair
from finetune.data.codes import CodesCache
from finetune.data.recording import Recording, open_audio
from moshi_ttt.errors import UserError

CODEBOOKS = ("0", "all")
NORMALISE = ("mean", "sum")


def clip_codes(
    pairs: Sequence[Pair], cache: CodesCache, text_padding: int, workers: int = 1
) -> tuple[dict[Path, Tensor], dict[Path, str]]:
    """The codes of all clips, encoded where the cache lacks them.

    Args:
        pairs: each file of which is read once.
        cache: its `mono_side` is where the clips go, the other side is encoded silence.
        text_padding: the token of the text row, which is not scored.
        workers: processes that encode.

    Returns:
        File -> [1 + 2K, T] int64, and file -> what is wrong with it.
    """
    recordings: dict[Path, Recording] = {}
    broken: dict[Path, str] = {}
    for path in dict.fromkeys(path for pair in pairs for path in (pair.correct, pair.incorrect)):
        try:
            recordings[path] = _open(path)
        except UserError as error:
            broken[path] = str(error)

    def leave_out(recording: Recording, error: UserError) -> None:
        path = recording.files[0].path
        broken[path] = str(error)
        recordings.pop(path, None)

    cache.prepare(list(recordings.values()), workers, leave_out)
    codes = {}
    for path, recording in tqdm(recordings.items(), desc="reading codes", unit="clip"):
        audio = cache.load(recording).long()
        codes[path] = torch.cat([torch.full_like(audio[:1], text_padding), audio])
    return codes, broken


def _open(path: Path) -> Recording:
    recording = open_audio([path], str(path.parent))
    if recording.channels != 1:
        raise UserError(f"{path}: {recording.channels} channels; a clip has one")
    return recording


def scored_rows(config: Mapping[str, Any], side: str, codebooks: str = "0") -> slice:
    """The rows of an NLL that belong to a side: its codebook 0, or all of them.

    Args:
        config: of the base, with `n_q` and `dep_q`.
        side: `"moshi"` or `"user"`.
        codebooks: of `CODEBOOKS`.

    Raises:
        UserError: the model predicts Moshi's codebooks only, and the side is the user's.
    """
    each = config["n_q"] // 2
    start = 1 + (each if side == "user" else 0)  # row 0 is text
    if start + each > 1 + config["dep_q"]:
        raise UserError(
            f"--side user: the model predicts {config['dep_q']} of {config['n_q']} codebooks, "
            "Moshi's, so a clip on the user's side has no NLL: --side moshi"
        )
    return slice(start, start + (each if codebooks == "all" else 1))


def clip_nll(
    lm: LMModel,
    codes: Mapping[Path, Tensor],
    rows: slice,
    *,
    normalise: str = "mean",
    batch_size: int = 1,
    progress: Progress | None = None,
) -> tuple[dict[Path, float], dict[Path, str]]:
    """The score of every clip in nats; batches change it by rounding only.

    Args:
        lm: stock or spliced, not streaming.
        codes: of `clip_codes`.
        rows: of `scored_rows`.
        normalise: `"mean"` over the codes that are predicted (all but the last frame of a delayed
            codebook), or `"sum"`.
        batch_size: clips at a time.
        progress: called with numbers of frames.

    Returns:
        File -> score, and file -> why its NLL is no number.
    """
    reduce = {"mean": np.nanmean, "sum": np.nansum}[normalise]
    paths = sorted(codes, key=lambda path: codes[path].shape[-1])  # so that little is padding
    found = score(lm, [codes[path] for path in paths], rows=batch_size, progress=progress)
    scores: dict[Path, float] = {}
    broken: dict[Path, str] = {}
    for path, nll in zip(paths, found, strict=True):
        if nll.broken:
            broken[path] = nll.broken
        else:
            scores[path] = float(reduce(nll.values[rows].double().numpy()))
    return scores, broken
