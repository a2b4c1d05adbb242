"""All lines of a manifest, the broken ones too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moshi_ttt.errors import UserError


@dataclass(frozen=True)
class Line:
    """A line of a manifest that is not empty.

    Attributes:
        manifest: the file.
        number: of the line, from 1.
        entry: its JSON object; empty where there is none.
        names: its audio files as it has them; several are one recording, in order.
        problem: why it cannot be used, None where it can.
    """

    manifest: Path
    number: int
    entry: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def where(self) -> str:
        """`manifest:line`."""
        return f"{self.manifest}:{self.number}"

    @property
    def files(self) -> tuple[Path, ...]:
        """The audio files; relative ones start at the manifest's folder."""
        return tuple(self.manifest.parent / name for name in self.names)

    @property
    def shard(self) -> Path | None:
        """The file of codes that the line names, where it was encoded already."""
        name = self.entry.get("shard")
        return self.manifest.parent / name if isinstance(name, str) and name else None


def manifests(names: list[str]) -> list[Path]:
    """The manifests named; a folder stands for all its .jsonl files.

    Raises:
        UserError: no such file, a folder without any, one named twice, or one that is not text.
    """
    found: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        inside = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"{path}: the folder has no .jsonl file")
        for manifest in inside:
            if not manifest.is_file():
                raise UserError(f"{manifest}: no such manifest")
            if manifest.resolve() in [m.resolve() for m in found]:
                raise UserError(f"{manifest}: named twice")
            with manifest.open("rb") as file:
                if b"\0" in file.read(4096):
                    raise UserError(f"{manifest}: not a manifest but a binary file; name a jsonl")
            found.append(manifest)
    return found


def read_lines(manifest: Path) -> Iterator[Line]:
    """Every line of a manifest that is not empty, in order."""
    with manifest.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                yield _line(manifest, number, raw)


def _line(manifest: Path, number: int, raw: bytes) -> Line:
    try:
        entry = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Line(manifest, number, problem=f"not text in UTF-8: {error.reason}")
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        text = raw[:60].decode("utf-8", "replace").strip()
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        return Line(manifest, number, problem=f"not JSON ({reason}): {text!r}")
    path = entry.get("path") if isinstance(entry, dict) else None
    names = path if isinstance(path, list) else [path]
    good = tuple(name for name in names if isinstance(name, str) and name and "\0" not in name)
    if not good or len(good) < len(names):
        text = raw[:60].decode("utf-8", "replace").strip()
        return Line(manifest, number, problem=f"no path in {text!r}")
    speaker = entry.get("speaker")
    if not (speaker is None or isinstance(speaker, str)):
        return Line(manifest, number, problem=f"speaker must be text, got {str(speaker)[:30]}")
    return Line(manifest, number, entry, good)
