"""Saving while a conversation goes on, which never waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from safetensors import SafetensorError

from moshi_ttt.errors import UserError, no_space_left
from moshi_ttt.kept.folder import Kept
from moshi_ttt.kept.names import check_name
from moshi_ttt.saved_memory import SavedMemory


class Keeper:
    """Saves one person's memory in a thread of its own, for who has `taken` the name.

    Args:
        kept: where.
        name: whose.
        notify: called from that thread after every save, failed ones too.

    Attributes:
        error: why the last save failed, in one line; None if it did not.
        saved_at: when the last one was done, in seconds since 1970; None before the first.
        frames: of the memory saved then.
    """

    def __init__(self, kept: Kept, name: str, notify: Callable[[], object] = lambda: None) -> None:
        self.kept, self.name, self._notify = kept, check_name(name), notify
        self.error: str | None = None
        self.saved_at: float | None = None
        self.frames: int | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="keeper")
        self._lock = threading.Lock()
        self._waiting: SavedMemory | None = None
        self._work: Future[None] | None = None

    def offer(self, saved: SavedMemory) -> None:
        """Have a memory saved soon, and return at once; one that still waits is forgotten."""
        self._raise()
        with self._lock:
            idle, self._waiting = self._waiting is None, saved
            if idle:
                self._work = self._thread.submit(self._save)

    def close(self, saved: SavedMemory | None = None) -> None:
        """Wait until all is saved; `error` says if the last could not be.

        Args:
            saved: what to save last; None if nothing more.
        """
        if saved is not None:
            self.offer(saved)
        self._thread.shutdown()
        self._raise()

    def _raise(self) -> None:
        if self._work is not None and self._work.done():
            self._work.result()  # only an error that nobody foresaw

    def _save(self) -> None:
        with self._lock:
            saved, self._waiting = self._waiting, None
        assert saved is not None
        try:
            self.kept.write(self.name, saved)
        except (OSError, SafetensorError, UserError) as error:
            full = "no space left on the device: " if no_space_left(error) else ""
            self.error = " ".join(f"{full}{error}".split())
        else:
            self.saved_at, self.frames, self.error = time.time(), saved.frames, None
        self._notify()
