"""Audio that lies on disk to a manifest: what is broken is named before anything is written."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from finetune.data.recording import Recording, open_audio
from moshi_ttt.errors import UserError
from moshi_ttt.files import check_writable, written_whole


class Group(NamedTuple):
    """Files that are one recording, in order."""

    name: str
    files: tuple[Path, ...]
    speaker: str | None = None


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key in which numbers count as numbers."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part)
        for part in re.split(r"(\d+)", name)
        if part
    ]


def write_manifest(groups: Sequence[Group], out: str | Path, *, skip_broken: bool = False) -> int:
    """Read all headers and transcripts and write a manifest with a line for each group.

    Paths are relative where the audio is under the manifest's folder, else absolute. What is broken
    is named on stderr.

    Args:
        groups: in the manifest's order.
        out: the file, written whole.
        skip_broken: leave out recordings that cannot be read instead of refusing.

    Returns:
        How many recordings it has.

    Raises:
        UserError: recordings that cannot be read, with their number; none that can; `out` cannot be
            written.
    """
    target = check_writable(out)
    folder = target.parent.resolve()
    lines: list[dict[str, Any]] = []
    for group in tqdm(groups, desc="reading headers", unit="recording", delay=1):
        try:
            found = open_audio(group.files, group.name, group.speaker)
        except UserError as error:
            tqdm.write(f"broken: {error}", file=sys.stderr)
            continue
        lines.append(_line(found, folder))
    broken = len(groups) - len(lines)
    if not lines or (broken and not skip_broken):
        raise UserError(
            f"{broken} of {len(groups)} recordings cannot be read (named above); {target} was not "
            "written (--skip-broken leaves them out)"
        )
    with written_whole(target) as beside:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        beside.write_text(text, encoding="utf-8")
    hours = sum(line["duration"] for line in lines) / 3600
    left = f"; {broken} that cannot be read left out" if broken else ""
    tqdm.write(f"{target}: {len(lines)} recordings, {hours:.2f} h{left}")
    return len(lines)


def _line(recording: Recording, folder: Path) -> dict[str, Any]:
    names: list[str] = []
    for file in recording.files:
        path = file.path.resolve()
        names.append(str(path.relative_to(folder) if path.is_relative_to(folder) else path))
    line: dict[str, Any] = {
        "path": names[0] if len(names) == 1 else names,
        "duration": round(recording.duration, 3),
    }
    return line if recording.speaker is None else line | {"speaker": recording.speaker}
