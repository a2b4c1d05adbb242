"""Many conversations in the rows of one engine: one thread steps them all, and waits for nobody.

A step takes every row that has a frame. It costs the same for one row as for all, so it waits for
the rows whose next frame is about to come, but only as long as the frame that came first can
afford: a frame and the step that answers it shall take no more than 80 ms together. A row that is
late, paused or gone is not waited for. Whoever brings frames faster than they are answered loses
the oldest of them; the queues are bounded, and what they lose is counted.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
import torch

from moshi_ttt.engine import Engine, Frame
from moshi_ttt.errors import UserError
from moshi_ttt.frame_times import FRAME_MS
from moshi_ttt.frames import FrameRing, Samples
from moshi_ttt.monitor import Reading
from moshi_ttt.saved_memory import SavedMemory, check_memory, put_memory, take_memory

HEARD_FRAMES, SAID_FRAMES = 8, 25
"""640 ms wait to be heard at most, 2 s to be taken."""
TEXT_PIECES = 1000
COMMANDS_SECONDS = 0.01  # from one step to the next, and one command more: frames go before
EXPECTED_SECONDS = 0.16  # a row whose last frame came longer ago is not waited for

T = TypeVar("T")


class Full(UserError):
    """Every row has a conversation."""


class Conversation:
    """One of a host's, in a row of its engine; all of it may be called from any thread.

    Made by `Host.open`.

    Attributes:
        row: of the engine.
        over: why it has ended, in words; None while it goes on.
        reading: the newest of its memories (`moshi_ttt.monitor`); None before the first.
        diverged: how often a memory was no longer finite and started over from W0.
    """

    def __init__(self, host: Host, row: int, notify: Callable[[], object]) -> None:
        self.row, self.diverged = row, 0
        self.over: str | None = None
        self.reading: Reading | None = None
        self._host, self._notify, self._paused = host, notify, False
        self._heard, self._said = FrameRing(HEARD_FRAMES), FrameRing(SAID_FRAMES)
        self._text: deque[str] = deque(maxlen=TEXT_PIECES)
        self._last = 0.0  # when its last frame came
        self._starts = 0  # asked for and not done yet; until then no frame is heard

    @property
    def frames(self) -> int:
        """Frames heard and answered."""
        return self._said.total

    @property
    def dropped_heard(self) -> int:
        """Frames that came faster than they were answered: the oldest were left out."""
        return self._heard.dropped

    @property
    def dropped_said(self) -> int:
        """Frames that Moshi said and nobody took in time."""
        return self._said.dropped

    def hear(self, frame: Samples) -> None:
        """Bring a frame, `[1920]` float32; at once. While paused or over, nobody hears it."""
        with self._host._changed:
            if self.over is None and not self._paused:
                self._heard.put(frame)
                self._last = time.monotonic()
                self._host._changed.notify()

    def said(self) -> tuple[Samples, str] | None:
        """The next frame that Moshi said, with the text since the last one; None if none is there.

        One comes for every frame that was heard and not dropped.
        """
        pcm = np.empty(self._said.size, np.float32)
        if not self._said.get(pcm):
            return None
        text = ""
        while self._text:
            text += self._text.popleft()
        return pcm, text

    @property
    def paused(self) -> bool:
        """Whether the row is left out of the steps; it goes on as if no time had passed."""
        return self._paused

    @paused.setter
    def paused(self, value: bool) -> None:
        with self._host._changed:
            self._paused = value
            if value:
                self._heard.clear()
            self._host._changed.notify()

    def restart(self) -> None:
        """Start anew, memories at W0; what is heard from now on is the new one's."""
        self._start()

    def _start(self, memory: SavedMemory | None = None) -> None:
        host = self._host

        def start() -> None:
            if self.over is None:  # else the row may be another's by now
                host.engine.start(np.arange(host.capacity) == self.row)
                if memory is not None:
                    put_memory(host.engine, memory, self.row)
            with host._changed:
                self._starts -= 1

        with host._changed:
            self._heard.clear()  # it was said to the one before
            self._starts += 1
            host._do(start)

    def take_memory(self) -> Future[SavedMemory]:
        """Copy what its memories have learned, between two frames; `close` may follow at once.

        The future fails with `UserError` where the model has no memory that keeps a state, and
        once the conversation is over: its row may be another's.
        """
        with self._host._changed:
            return self._host._do(lambda: take_memory(self._host.engine, self.row), self.over)

    def close(self, why: str = "it was closed") -> None:
        """End it; its row is free at once."""
        self._host._end(self, why)

    def _answer(self, frame: Frame) -> None:
        """In the engine's thread: what came out for this row."""
        if frame.text[self.row]:  # before its sound, which is what a client waits for
            self._text.append(frame.text[self.row])
        self._said.put(frame.pcm[self.row].numpy())
        self._notify()


class Host:
    """One engine, its thread, and the conversations in its rows.

    As a context manager: the thread runs inside, and all conversations are over afterwards.

    Args:
        engine: nobody else may step it meanwhile.
        on_failure: called from the thread when it has ended with an error (`failed` says it).

    Attributes:
        capacity: conversations at a time, the rows of the engine.
        failed: the error that ended the thread, in words; None while all is well.
        error: that error.
    """

    def __init__(self, engine: Engine, on_failure: Callable[[], object] = lambda: None) -> None:
        self.engine, self.capacity = engine, engine.rows
        self.failed: str | None = None
        self.error: BaseException | None = None
        self._on_failure = on_failure
        self._conversations: dict[int, Conversation] = {}
        self._commands: deque[tuple[Future[Any], Callable[[], None]]] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._lost_heard = self._lost_said = 0  # of conversations that are over
        self._pcm = np.zeros((engine.rows, engine.frame_size), np.float32)
        self._mask = np.zeros(engine.rows, bool)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> Host:
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread, once it has done what was asked of it, and all conversations."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()
        self._end_all("the server has stopped")

    def open(
        self, *, memory: SavedMemory | None = None, notify: Callable[[], object] = lambda: None
    ) -> Conversation:
        """Begin a conversation in a free row.

        Args:
            memory: kept earlier; None starts at W0.
            notify: called, from the engine's thread, when there is something new: a frame that was
                said, or the end.

        Raises:
            Full: there is no free row.
            UserError: the memory does not fit this model (see `check_memory`), or the engine has
                failed.
        """
        if memory is not None:
            check_memory(self.engine, memory)
        with self._changed:
            if self.failed is not None or self._stopping:
                raise UserError(self.failed or "the server is stopping")
            free = sorted(set(range(self.capacity)) - set(self._conversations))
            if not free:
                n = self.capacity
                raise Full(f"{'all ' if n > 1 else ''}{n} conversation{'s' * (n > 1)} of {n} taken")
            conversation = Conversation(self, free[0], notify)
            conversation._start(memory)  # before a step can see it
            self._conversations[conversation.row] = conversation
        return conversation

    @property
    def taken(self) -> int:
        """Conversations that go on."""
        return len(self._conversations)

    @property
    def waiting(self) -> int:
        """Frames that wait to be heard."""
        return sum(c._heard.held for c in self._open())

    @property
    def dropped_heard(self) -> int:
        """Frames of all conversations so far that came faster than they were answered."""
        with self._changed:
            return self._lost_heard + sum(c.dropped_heard for c in self._conversations.values())

    @property
    def dropped_said(self) -> int:
        """Frames of all conversations so far that nobody took in time."""
        with self._changed:
            return self._lost_said + sum(c.dropped_said for c in self._conversations.values())

    def _open(self) -> list[Conversation]:
        with self._changed:
            return list(self._conversations.values())

    # -- asked by any thread ---------------------------------------------------------------------

    def _do(self, command: Callable[[], T], over: str | None = None) -> Future[T]:
        """Have the engine's thread do something between two frames, in the order it was asked.

        Unless it is `over` for who asks: then the future fails with that.
        """
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(command())
            except UserError as error:
                future.set_exception(error)

        with self._changed:
            why = self.failed or over or ("the server is stopping" if self._stopping else None)
            if why is not None:
                future.set_exception(UserError(why))
            else:
                self._commands.append((future, run))
                self._changed.notify()
        return future

    def _end(self, conversation: Conversation, why: str) -> None:
        with self._changed:
            if conversation.over is not None:
                return
            conversation.over = why
            del self._conversations[conversation.row]
            self._lost_heard += conversation.dropped_heard
            self._lost_said += conversation.dropped_said
            self._changed.notify()
        conversation._notify()

    def _end_all(self, why: str) -> None:
        for conversation in self._open():
            self._end(conversation, why)

    # -- the engine's thread ---------------------------------------------------------------------

    def _run(self) -> None:
        if self.engine.device.type == "cuda":
            torch.cuda.set_device(self.engine.device)
        try:
            while self._wait():
                until = time.monotonic() + COMMANDS_SECONDS
                while self._commands and time.monotonic() < until:
                    self._commands[0][1]()
                    self._commands.popleft()
                if self._due():
                    self._step()
        except BaseException as error:  # whatever it was: nobody may go on waiting for answers
            with self._changed:
                self.error, self.failed = error, f"the engine has failed: {type(error).__name__}"
            for future, _ in self._commands:
                if future.running() or future.set_running_or_notify_cancel():
                    future.set_exception(UserError(self.failed))
            self._end_all(self.failed)
            self._on_failure()

    def _wait(self) -> bool:
        """Until there is something to do; False when that is to stop."""
        with self._changed:
            while True:
                if self._commands:
                    return True
                if self._stopping:
                    return False
                seconds = self._seconds_to_wait()
                if seconds is not None and seconds <= 0:
                    return True
                self._changed.wait(seconds)

    def _due(self) -> bool:
        with self._changed:
            seconds = self._seconds_to_wait()
        return seconds is not None and seconds <= 0

    def _seconds_to_wait(self) -> float | None:
        """Until the next step is due; None if nothing waits for one."""
        came: list[float] = []
        expected = False
        now = time.monotonic()
        for c in self._conversations.values():
            if c._starts:
                continue
            if self.engine.starting[c.row]:
                return 0.0  # nobody shall wait for a conversation to begin
            oldest = c._heard.oldest()
            if oldest is not None:
                came.append(oldest)
            elif not c._paused and now - c._last < EXPECTED_SECONDS:
                expected = True
        if not came:
            return None
        if not expected:
            return 0.0
        patience = max(0.0, FRAME_MS - self.engine.times.recent()) / 1000
        return min(came) + patience - now

    def _step(self) -> None:
        with self._changed:
            conversations = list(self._conversations.values())
            self._mask[:] = False
            for c in conversations:  # a restart comes before or after its row's frame is taken
                ready = not (self.engine.starting[c.row] or c._starts or c._paused)
                self._mask[c.row] = ready and c._heard.get(self._pcm[c.row])
        if not self._mask.any() and not self.engine.starting.any():
            return
        frame = self.engine.step(self._pcm, self._mask)
        for c in conversations:
            if c.over is None:
                c.diverged = int(self.engine.diverged[c.row])
                if frame.readings and (reading := frame.readings[c.row]) is not None:
                    c.reading = reading
                if self._mask[c.row]:
                    c._answer(frame)
