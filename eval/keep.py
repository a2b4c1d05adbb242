"""Scores on disk as they come, so that an evaluation that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from eval.stats import Array
from moshi_ttt.files import written_whole

FORMAT = 1
"""Raised when the same settings mean other numbers."""


@dataclass
class Found:
    """What scoring one recording in one arm gave.

    Attributes:
        nll: kind -> [frames] nats, float64, NaN where undefined; all NaN if `broken`.
        ms_per_frame: of each call, wall time over the frames it scored.
        state_norm: block -> norm of the fast weights at the end.
        state_moved: block -> norm of their distance from W0 at the end.
        broken: where the model's output is no finite number; empty if nowhere.
    """

    nll: dict[str, Array]
    ms_per_frame: list[float] = field(default_factory=list)
    state_norm: dict[str, float] = field(default_factory=dict)
    state_moved: dict[str, float] = field(default_factory=dict)
    broken: str = ""


class Keep:
    """A folder with one safetensors file for each recording scored in an arm.

    A file's name is a hash of all that decides the numbers: the weights, how the memory is run,
    the codes, shapes of calls, dtype. Nothing else is ever found under it.

    Args:
        folder: made when the first file is written.
        settings: plain values that decide the numbers, whatever the recording.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.settings = json.dumps([FORMAT, settings], sort_keys=True)

    def file(self, name: str) -> Path:
        """Where a recording's scores are or will be."""
        digest = hashlib.sha256(f"{self.settings} {name}".encode()).hexdigest()
        return self.folder / f"{digest[:32]}.safetensors"

    def get(self, name: str) -> Found | None:
        """The scores kept under a name, None if there are none or the file is broken."""
        file = self.file(name)
        if not file.is_file():
            return None
        try:
            with safe_open(file, "pt") as kept:
                nll = {key: kept.get_tensor(key).numpy() for key in kept.keys()}
                said = kept.metadata()
                if said["sha256"] != _digest(nll, said["about"]):
                    return None
                return Found(nll, **json.loads(said["about"]))
        except (SafetensorError, KeyError, TypeError, ValueError):
            return None  # it is scored again, and written anew

    def put(self, name: str, found: Found) -> None:
        """Keep scores; the file appears whole or not at all."""
        about = json.dumps({key: value for key, value in vars(found).items() if key != "nll"})
        digest = _digest(found.nll, about)
        tensors = {key: torch.from_numpy(values).contiguous() for key, values in found.nll.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        with written_whole(self.file(name)) as beside:
            save_file(tensors, beside, {"about": about, "sha256": digest})


def _digest(nll: dict[str, Array], about: str) -> str:
    digest = hashlib.sha256(about.encode())
    for key, values in sorted(nll.items()):
        digest.update(f"{key} {values.dtype} {values.shape}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()
