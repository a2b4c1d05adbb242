"""One person's kept memory, for as long as a conversation has that name."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from moshi_ttt.errors import UserError
from moshi_ttt.frame_times import FRAME_MS
from moshi_ttt.kept import Keeper, Kept
from moshi_ttt.saved_memory import SavedMemory, read_memory


class Remembered:
    """Has a name, reads what is kept for it and saves.

    Args:
        kept: where.
        name: as `check_name` gives it.
        writes: False reads only, and has the name for nobody.
        notify: called from another thread after every save, failed ones too.
    """

    def __init__(
        self, kept: Kept, name: str, *, writes: bool, notify: Callable[[], object]
    ) -> None:
        self.kept, self.name, self.writes, self._notify = kept, name, writes, notify
        self._taken = ExitStack()
        self._keeper: Keeper | None = None
        self._is_kept = False
        self._lost: str | None = None

    def begin(self, *, load: bool, most: int, anew: bool = False) -> SavedMemory | None:
        """Have the name, and read what is kept if `load`; takes as long as disks do.

        Raises:
            UserError: another conversation has the name, what is kept cannot be read, `anew` and
                something is kept, or nothing is and `most` memories are kept already.
        """
        with ExitStack() as stack:
            if self.writes:
                stack.enter_context(self.kept.taken(self.name))
            found = self.kept.find(self.name)
            if found is not None and anew:
                raise UserError(
                    f"a memory is kept for {self.name!r} already: begin with it, or take another "
                    "name"
                )
            if found is None and self.writes and len(self.kept.list()) >= most:
                raise UserError(
                    f"this server keeps {most} memories and has them: go on without a name, or "
                    "take one that is kept"
                )
            saved = read_memory(found.path) if found is not None and load else None
            if self.writes:
                self._keeper = Keeper(self.kept, self.name, self._notify)
            self._is_kept = found is not None
            self._taken = stack.pop_all()
        return saved

    def offer(self, saved: SavedMemory, *, diverged: bool) -> None:
        """Save soon, at once; but what is kept is not given for what started over by itself.

        Args:
            saved: what to save.
            diverged: it was no longer finite in this conversation, and was put back to its start.
        """
        assert self._keeper is not None
        if diverged and self._is_kept:
            self._lost = "the memory broke and started over: what is kept stays as it was"
            self._notify()
        else:
            self._is_kept, self._lost = True, None
            self._keeper.offer(saved)

    def news(self) -> dict[str, Any]:
        """How the last save went, as a client is told; after one."""
        assert self._keeper is not None
        reason = self._lost or self._keeper.error
        if reason is not None:
            return {"type": "save failed", "reason": for_clients(reason, self.kept)}
        assert self._keeper.frames is not None
        seconds = self._keeper.frames * FRAME_MS / 1000
        return {"type": "saved", "seconds": seconds, "at": self._keeper.saved_at}

    def end(self) -> None:
        """Wait until all is on the disk, and let go of the name."""
        with self._taken:
            if self._keeper is not None:
                self._keeper.close()


def for_clients(error: object, kept: Kept) -> str:
    """What went wrong, without where the server keeps its files, and which process has them."""
    sentence = re.sub(r" \(process [^)]*\)$", "", str(error))
    return sentence.replace(f"{kept.folder}{os.sep}", "").replace(str(kept.folder), "the folder")
