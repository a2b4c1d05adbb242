"""Libri-Light: `<root>/<small|medium|large>/<speaker>/<book>/<stem>.flac`, a json beside each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from finetune.corpora.listing import Group, natural, write_manifest
from finetune.data.transcript import read_speaker
from moshi_ttt.errors import UserError


def prepare(root: str | Path, out: str | Path, *, skip_broken: bool = False) -> int:
    """Write a manifest whose recordings are the books of a folder in Libri-Light's layout.

    Args:
        root: all of it, or any part; see `find_books`.
        out: the manifest.
        skip_broken: leave out books that cannot be read instead of refusing.

    Returns:
        How many recordings it has.

    Raises:
        UserError: nothing there, or broken audio.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    return write_manifest(find_books(root), out, skip_broken=skip_broken)


def find_books(root: Path, broken: Callable[[str, UserError], object] | None = None) -> list[Group]:
    """The books under a folder in Libri-Light's layout, or under any part of it, down to one book.

    A book's chapters, in natural order (2 before 10), are one recording. The speaker is that of the
    json of the same stem, else the folder above the book's.

    Args:
        root: where to look.
        broken: called with the name of every book with a json that is none, and why; None raises
            at the first.

    Raises:
        UserError: no flac file there, or a json that is none.
    """
    found: dict[tuple[str, str], list[Path]] = {}
    lost: set[Path] = set()
    for flac in root.resolve().rglob("*.flac"):
        if flac.parent in lost:
            continue
        try:
            speaker = read_speaker(flac) or flac.parent.parent.name
        except UserError as error:
            if broken is None:
                raise
            lost.add(flac.parent)
            broken(f"{flac.parent.parent.name}/{flac.parent.name}", error)
            continue
        found.setdefault((speaker, flac.parent.name), []).append(flac)
    found = {key: flacs for key, flacs in found.items() if flacs[0].parent not in lost}
    if not found and not lost:
        raise UserError(f"{root}: no .flac file under it (<speaker>/<book>/<stem>.flac is wanted)")
    return [
        Group(f"{speaker}/{book}", tuple(sorted(flacs, key=lambda f: natural(f.stem))), speaker)
        for (speaker, book), flacs in sorted(found.items())
    ]
