"""Whose memory a conversation of the command line starts with, and is kept for."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from typing import Any

from moshi_ttt.engine import Engine
from moshi_ttt.errors import UserError
from moshi_ttt.kept.folder import Kept, clock, minutes
from moshi_ttt.kept.keeper import Keeper
from moshi_ttt.kept.names import check_name
from moshi_ttt.saved_memory import put_memory, read_memory, require_memory, take_memory

SAVE_SECONDS = 60.0


class Person:
    """Keeps what one conversation learns under a name, every minute and at its end, and says so.

    Args:
        kept: where.
        name: whose.
        incognito: start with what is kept, if anything is, and write nothing.
        new: nothing may be kept yet, as the conversation starts with another memory.

    Raises:
        UserError: (on entering) not a name, a conversation has it, the memory is broken or should
            not be there, or the folder cannot be written to.
    """

    def __init__(self, kept: Kept, name: str, *, incognito: bool = False, new: bool = False):
        self.kept, self.name = kept, check_name(name)
        self.incognito, self.new = incognito, new
        self._held = ExitStack()
        self._ended = self._stopped = False

    def __enter__(self) -> Person:
        """Take the name and read the memory."""
        with ExitStack() as held:
            if not self.incognito:
                held.enter_context(self.kept.taken(self.name))
            self._found = self.kept.find(self.name)
            if self._found is not None and self.new:
                raise UserError(
                    f"{self.name} has {self._found}: leave out --load-memory, or take another name"
                )
            self._memory = None if self._found is None else read_memory(self._found.path)
            self._keeper = Keeper(self.kept, self.name, self._report)
            held.callback(self._keeper.close)
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        """Wait for a save that is going on, and let go of the name."""
        self._held.close()

    def begin(self, engine: Engine) -> None:
        """Start a conversation with what is kept.

        Raises:
            UserError: the model has no memory, or what is kept does not fit it; nothing was written
                and the engine is as it was.
        """
        require_memory(engine)
        self._engine, self._next = engine, time.monotonic() + SAVE_SECONDS
        if self._found is None or self._memory is None:
            line = f"{self.name} is new here"
        else:
            try:
                put_memory(engine, self._memory, name=self._found.path)
            except UserError as error:
                raise UserError(
                    f"{error}; it stays as it is: take another --user, or first export or delete "
                    "it (python -m moshi_ttt.kept)"
                ) from error
            line = f"{self.name} has {self._found}"
        self._say(f"{line}; incognito: nothing will be kept" if self.incognito else line)

    def frame(self) -> None:
        """To be called after every frame."""
        if self.incognito or self._stopped or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + SAVE_SECONDS
        if not self._started_over():
            self._keeper.offer(take_memory(self._engine))

    def end(self) -> None:
        """Save for the last time, and wait until that is done.

        Raises:
            UserError: it could not be saved, and why.
        """
        self._ended = True
        if self.incognito:
            was = "is as it was" if self._found is not None else "is still new here"
            self._say(f"incognito: {self.name} {was}")
        elif not self._engine.times.count:
            self._say(f"no frame was heard: nothing was saved for {self.name}")
        elif not self._stopped and not self._started_over():
            self._keeper.close(take_memory(self._engine))
            if self._keeper.error is not None:
                raise UserError(f"{self._failed()}; {self._left()}")
            assert self._keeper.frames is not None
            path = self.kept.path(self.name)
            self._say(f"saved {self.name}: {minutes(self._keeper.frames)} of memory, in {path}")

    def _started_over(self) -> bool:
        """Stop saving where the memory has lost what it knew, and something better is kept."""
        self._stopped = bool(self._engine.diverged[0]) and self._saved_at() is not None
        if self._stopped:
            self._say(
                f"the memory was no longer finite and started over: no more of this conversation "
                f"is saved, {self._left()}; a new conversation starts with that"
            )
        return self._stopped

    def _saved_at(self) -> float | None:
        before = None if self._found is None else self._found.saved
        return self._keeper.saved_at or before

    def _left(self) -> str:
        at = self._saved_at()
        return "nothing is kept" if at is None else f"{self.name} stays as saved {clock(at)}"

    def _failed(self) -> str:
        return f"{self.name} could not be saved: {self._keeper.error}"

    def _report(self) -> None:
        if self._keeper.error is not None and not self._ended:
            self._say(f"{self._failed()}; {self._left()}, the next try is in a minute")

    def _say(self, line: str) -> None:
        sys.stderr.write(f"{line}\n")
