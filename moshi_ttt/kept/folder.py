"""The folder of memories kept by name: one file a person, written whole or not at all.

Beside `anna.safetensors` there are, for a while, `.anna.lock` (a conversation has the name) and
`.anna.tmp` (a save is going on); no name begins with a dot.
"""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from moshi_ttt.errors import UserError
from moshi_ttt.files import check_writable, locked, written_whole
from moshi_ttt.frame_times import FRAME_MS
from moshi_ttt.kept.names import check_name
from moshi_ttt.saved_memory import SavedMemory, memory_frames

_SUFFIX = ".safetensors"


class KeptMemory(NamedTuple):
    """A memory that is kept.

    Attributes:
        name: whose.
        path: its file.
        saved: when, in seconds since 1970.
        size: bytes.
        frames: that it has lived through, over all conversations; 0 if it is broken.
        broken: why the file cannot be read; None if it can.
    """

    name: str
    path: Path
    saved: float
    size: int
    frames: int
    broken: str | None = None

    @property
    def seconds(self) -> float:
        """How long it has lived."""
        return self.frames * FRAME_MS / 1000

    def __str__(self) -> str:
        """What it is, for people."""
        if self.broken is not None:
            return f"a broken memory, saved {clock(self.saved)}"
        return f"{minutes(self.frames)} of memory, saved {clock(self.saved)}"


def minutes(frames: int) -> str:
    """A number of frames as time."""
    return f"{frames * FRAME_MS / 60_000:.1f} minutes"


def clock(seconds: float) -> str:
    """A time in seconds since 1970, here and for people."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


class Kept:
    """The folder of memories kept by name; it is made, for its owner alone, when one is saved.

    Args:
        folder: None is the default (see the top of this file).
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        if folder is None:
            share = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
            folder = os.environ.get("MOSHI_TTT_MEMORIES") or Path(share, "moshi_ttt", "memories")
        self.folder = Path(folder).expanduser()

    def path(self, name: str) -> Path:
        """The file of a name, whether it is there or not.

        Raises:
            UserError: not a name, or something else than a file is there; a link is not followed.
        """
        path = self.folder / f"{check_name(name)}{_SUFFIX}"
        about = _status(path)
        if about is not None and not stat.S_ISREG(about.st_mode):
            link = stat.S_ISLNK(about.st_mode)
            raise UserError(
                f"{path} is {'a symbolic link, which is not followed' if link else 'not a file'}"
            )
        return path

    def find(self, name: str) -> KeptMemory | None:
        """What is kept for a name; None if nothing is.

        Raises:
            UserError: as `path`.
        """
        path = self.path(name)
        try:
            about = path.stat()
            frames, broken = _frames(path)
        except FileNotFoundError:
            return None
        return KeptMemory(check_name(name), path, about.st_mtime, about.st_size, frames, broken)

    def get(self, name: str) -> KeptMemory:
        """As `find`.

        Raises:
            UserError: as `path`, or nothing is kept for that name.
        """
        found = self.find(name)
        if found is None:
            names = [memory.name for memory in self.list()]
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            there = f"there is: {', '.join(names[:10])}{more}" if names else "nor for any other"
            raise UserError(f"nothing is kept for {check_name(name)!r} in {self.folder}; {there}")
        return found

    @contextmanager
    def taken(self, name: str) -> Iterator[None]:
        """Have a name to oneself, among all processes; a killed one lets go of it.

        Raises:
            UserError: not a name, a conversation has it, or the folder cannot be written to.
        """
        name = check_name(name)
        self._make()
        words = f"{name} is in another conversation: end that one, or take another name"
        with locked(self.folder / f".{name}.lock", words):
            shutil.rmtree(self._beside(name), ignore_errors=True)  # left by a save that was killed
            yield

    def write(self, name: str, saved: SavedMemory) -> None:
        """Keep a memory, whole or not at all; for who has `taken` the name.

        Raises:
            UserError: as `path`, or the memory cannot be saved.
            OSError: it cannot be written, as the disk is full, say; so does SafetensorError.
        """
        path = self.path(name)
        self._make()
        beside = self._beside(name)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        try:
            beside.chmod(0o700)  # the file gets its own mode when it is there
            new = beside / "memory"
            saved.write(new)
            new.chmod(0o600)
            with new.open("rb") as file:  # else a power cut could leave an empty file
                os.fsync(file.fileno())
            os.replace(new, path)
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def export(self, name: str, to: str | os.PathLike[str], *, force: bool = False) -> KeptMemory:
        """Copy a kept memory to a file of one's own, whole or not at all.

        Args:
            name: whose.
            to: the file.
            force: write over one that is there.

        Raises:
            UserError: as `get`, the memory is broken, or `to` is there or cannot be made.
        """
        found, to = self.get(name), check_writable(to)
        if found.broken is not None:
            raise UserError(f"{found.path} is broken: {found.broken}")
        if _status(to) is not None and not force:
            raise UserError(f"{to} exists; --force writes over it")
        with found.path.open("rb") as kept, written_whole(to) as beside:
            with open(beside, "wb", opener=_private) as copy:
                shutil.copyfileobj(kept, copy)
        return found

    def delete(self, name: str) -> KeptMemory:
        """Remove what is kept for a name.

        Raises:
            UserError: as `get`, or a conversation has the name.
        """
        if not self.folder.exists():
            self.get(name)  # says that nothing is there, and makes no folder
        with self.taken(name):
            found = self.get(name)
            found.path.unlink()
        return found

    def list(self) -> Sequence[KeptMemory]:
        """All that is kept, by name.

        Raises:
            UserError: the folder cannot be read.
        """
        names = [p.name.removesuffix(_SUFFIX) for p in self._content() if self._is_kept(p)]
        found = [self.find(name) for name in names]
        return [memory for memory in found if memory is not None]

    def strangers(self) -> Sequence[Path]:
        """Files in the folder that look like memories, but are nobody's.

        Raises:
            UserError: the folder cannot be read.
        """
        return [path for path in self._content() if not self._is_kept(path)]

    def _content(self) -> Sequence[Path]:
        try:
            files = [path for path in self.folder.iterdir() if path.suffix == _SUFFIX]
            return sorted(path for path in files if path.name[0] != ".")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.folder}: {error.strerror}") from error

    def _is_kept(self, path: Path) -> bool:
        try:
            return self.path(path.name.removesuffix(_SUFFIX)) == path
        except UserError:
            return False

    def _beside(self, name: str) -> Path:
        return self.folder / f".{name}.tmp"

    def _make(self) -> None:
        new = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if new:
                self.folder.chmod(0o700)
        except FileExistsError as error:
            raise UserError(f"{self.folder} is not a folder") from error
        except OSError as error:
            raise UserError(f"{self.folder}: {error.strerror}") from error
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise UserError(f"{self.folder} is not writable")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def _frames(path: Path) -> tuple[int, str | None]:
    """How long the memory in a file has lived, or why it cannot be read."""
    try:
        return memory_frames(path), None
    except UserError as error:
        return 0, str(error).removeprefix(f"{path} ")
