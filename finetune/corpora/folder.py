"""Any folder of audio: each file a recording."""

from __future__ import annotations

from pathlib import Path

from finetune.corpora.listing import Group, natural, write_manifest
from moshi_ttt.errors import UserError

ENDINGS = (".wav", ".flac", ".mp3", ".ogg")


def prepare(root: str | Path, out: str | Path, *, skip_broken: bool = False) -> int:
    """Write a manifest of all wav, flac, mp3 and ogg files under a folder, in natural order.

    Args:
        root: the folder; those in it are read too.
        out: the manifest.
        skip_broken: leave out files that cannot be read instead of refusing.

    Returns:
        How many recordings it has.

    Raises:
        UserError: no such folder, no audio in it, or broken audio.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    found = [f for f in root.rglob("*") if f.suffix.lower() in ENDINGS and f.is_file()]
    if not found:
        raise UserError(f"{root}: no audio under it ({', '.join(ENDINGS)})")
    found.sort(key=lambda f: [natural(part) for part in f.relative_to(root).parts])
    groups = [Group(str(f.relative_to(root)), (f,)) for f in found]
    return write_manifest(groups, out, skip_broken=skip_broken)
