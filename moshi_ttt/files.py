"""Files that appear whole or not at all, and the newest checkpoint of a folder of runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moshi_ttt.errors import UserError


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a name beside `path` to write to; it takes the place of `path` when all went well.

    If the body raises, an interrupt included, what it wrote is removed and `path` is as it was.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def staging(folder: Path) -> Path:
    """An empty folder beside `folder` to write to, with the leftovers of an earlier one gone."""
    beside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    return beside


def remove_folder(folder: Path) -> None:
    """Remove a folder; one that is half removed no longer has its name."""
    aside = folder.with_name(folder.name + ".tmp")
    os.replace(folder, aside)
    shutil.rmtree(aside)


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """`written_whole` for a folder; one that is there is replaced."""
    beside = staging(folder)
    try:
        yield beside
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def check_writable(path: str | os.PathLike[str]) -> Path:
    """See that a file can be made at `path`, before the work whose result it is to hold.

    Raises:
        UserError: its folder does not exist or is not writable, or `path` is a folder.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"{path}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: the folder {path.parent} is not writable")
    return path


def newest_checkpoint(root: str | os.PathLike[str] = "runs") -> Path | None:
    """The checkpoint written last under `root/*/checkpoints/`, by the time of its ttt.json.

    Returns:
        Its `consolidated` folder, or None if there is none.
    """
    found = list(Path(root).glob("*/checkpoints/checkpoint_*[0-9]/consolidated/ttt.json"))
    return max(found, key=lambda file: file.stat().st_mtime_ns).parent if found else None
