"""Files that appear whole or not at all, locks, and the newest checkpoint of a folder of runs."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

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


@contextmanager
def locked(path: Path, taken: str) -> Iterator[None]:
    """Hold a lock, against other processes and within this one; a killed process lets go of it.

    Args:
        path: of a file that is there while the lock is held; a symbolic link is not followed.
        taken: what it means that another holds it.

    Raises:
        UserError: another holds it: `taken`, and who it is; or it cannot be locked.
    """
    try:
        file, who = _lock(path)
    except OSError as error:
        raise UserError(f"{path} cannot be locked: {error.strerror}") from error
    with file:
        if who is not None:
            raise UserError(f"{taken} ({who})")
        try:
            yield
        finally:
            if _is_at(file, path):
                path.unlink()


def _lock(path: Path) -> tuple[BinaryIO, str | None]:
    """The open file, and who has locked it if that is somebody else."""
    while True:
        file = open(path, "r+b", 0, opener=_not_through_a_link)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return file, file.read().decode(errors="replace") or "unknown"
        if _is_at(file, path):
            with suppress(OSError):  # for others to read; a full disk is no reason not to lock
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            return file, None
        file.close()  # its last holder removed it between our open and our lock


def _not_through_a_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


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
