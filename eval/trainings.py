"""How the models of a comparison were trained, and whether that was alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from eval.arms import Arm
from finetune.data.manifest import parse_sources, read_lines
from finetune.data.recording import Recording, name_of
from moshi_ttt.base import Base
from moshi_ttt.checkpoint import describe
from moshi_ttt.errors import UserError

CONFIG = "config.yaml"
SAME = ("seed", "max_steps", "batch_size", "duration_sec", "data.train_data")
"""What two trainings must share for their models to be compared."""


def run_of(folder: Path) -> Path | None:
    """The run's folder that a checkpoint's `consolidated/` lies in, None if it lies elsewhere."""
    checkpoints = folder.resolve().parent.parent
    run = checkpoints.parent
    return run if checkpoints.name == "checkpoints" and (run / CONFIG).is_file() else None


def training_of(arm: Arm, base: Base) -> dict[str, Any] | None:
    """What is known of an arm's training: parameters, steps, and the run's config where it lies.

    Returns:
        None for the stock base.
    """
    if arm.checkpoint is None:
        return None
    described = describe(arm.checkpoint, base=base)
    folder, about = described.folder, described.about
    found: dict[str, Any] = {"parameters": trained_parameters(folder), "step": about.get("step")}
    run = run_of(folder)
    if run is not None:
        values = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
        for key in SAME:
            value: Any = values
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            found[key] = value
    return found


def trained_parameters(folder: Path) -> int:
    """Numbers that a checkpoint's `consolidated/` holds."""
    trained = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            trained += sum(math.prod(weights.get_slice(k).get_shape()) for k in weights.keys())
    return trained


def unlike(trainings: dict[str, dict[str, Any] | None], main: str) -> list[str]:
    """How the other arms' trainings differ from the main one's, one line each.

    Parameters may differ by 2 %: a LoRA's rank is a whole number.
    """
    ours = trainings.get(main)
    lines: list[str] = []
    for name, theirs in trainings.items():
        if ours is None or theirs is None or theirs == ours:
            continue
        if abs(theirs["parameters"] - ours["parameters"]) > 0.02 * ours["parameters"]:
            lines.append(
                f"{name} has {theirs['parameters']:,} trained parameters, {main} has "
                f"{ours['parameters']:,}"
            )
        for key in ("step", *SAME):
            if key not in theirs or key not in ours:
                lines.append(f"{name}: its {key} is not known to be that of {main}")
            elif theirs[key] != ours[key]:
                lines.append(f"{name} has {key} {theirs[key]}, {main} has {ours[key]}")
    return lines


def heard_before(arms: Sequence[Arm], books: Sequence[Recording]) -> list[str]:
    """What of a panel a training had too, by file and by name of speaker; a line for each run.

    A run whose data are not to be found has a line that says so.
    """
    lines: list[str] = []
    for folder in dict.fromkeys(arm.checkpoint for arm in arms if arm.checkpoint is not None):
        run = run_of(folder if folder.name == "consolidated" else folder / "consolidated")
        if run is None:
            lines.append(f"{folder}: not known if it was trained on these recordings")
            continue
        try:
            files, speakers = _trained_on(run)
        except UserError as error:
            lines.append(f"{run.name}: not known if it was trained on these recordings: {error}")
            continue
        same = [b for b in books if files & {b.name, *(str(f.path.resolve()) for f in b.files)}]
        known = [b for b in books if b.speaker in speakers and b not in same]
        for found, what in ((same, ""), (known, "other speech of the speakers of ")):
            if found:
                lines.append(
                    f"{run.name} WAS TRAINED on {what}{len(found)} of these {len(books)} "
                    f"recordings, {found[0].name} is one"
                )
    return list(dict.fromkeys(lines))


def _trained_on(run: Path) -> tuple[set[str], set[str]]:
    """Files (and names, of stored codes) and speakers of a run's manifests."""
    data = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8")).get("data") or {}
    files: set[str] = set()
    speakers: set[str] = set()
    for manifest, _ in parse_sources(str(data.get("train_data", ""))):
        for line in read_lines(manifest):
            files |= {str(path.resolve()) for path in line.paths}
            files |= {name_of(line.names)} if "shard" in line.entry else set()
            speakers |= {line.entry["speaker"]} if line.entry.get("speaker") else set()
    return files, speakers
