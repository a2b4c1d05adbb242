"""Conversations that come and go at random, in real time, for `eval.bench.soak`."""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from contextlib import ExitStack
from typing import Any

import torch
from numpy.typing import NDArray
from tqdm import tqdm

from eval.bench.soak_runs import FRAME, FRAMES_PER_MINUTE, SPEECH_MINUTES, engine_twin, speech
from eval.bench.soak_watch import Watch
from moshi_ttt.engine import Engine
from moshi_ttt.frame_times import FRAME_MS
from moshi_ttt.host import Conversation, Full, Host
from moshi_ttt.models import Talker
from moshi_ttt.monitor import keeps_state
from moshi_ttt.saved_memory import SavedMemory

GATHERING = 25
"""Frames in which nobody leaves, so that all rows are taken once."""
COMES = 0.05
"""Chances of a frame: that a free row is taken, and below, of what a conversation does."""
KNOCKS, PAUSES, GOES_ON, RESTARTS, KEEPS, LEAVES = 0.002, 0.0005, 0.05, 0.0003, 0.0005, 0.001


class Crowd:
    """Those who talk: at most as many as there are rows, and now and then one too many.

    Args:
        host: where they talk.
        heard: `[T, 1920]`, speech that each hears from a place of its own on.
        watch: is told of what is no number.
        rng: of all that happens.

    Attributes:
        counts: what happened, how often.
    """

    def __init__(self, host: Host, heard: NDArray[Any], watch: Watch, rng: random.Random) -> None:
        self.host, self.heard, self.watch, self.rng = host, heard, watch, rng
        self.counts: Counter[str] = Counter()
        self._open: list[tuple[Conversation, int]] = []
        self._kept: SavedMemory | None = None
        self._keeps = keeps_state(host.engine.lm)

    def frame(self, n: int) -> None:
        """Frame n of everybody's time."""
        gathering = n <= GATHERING
        if len(self._open) < self.host.capacity:
            if gathering or self.rng.random() < COMES:
                self._come()
        elif self.rng.random() < KNOCKS:
            self._knock()
        for conversation, at in list(self._open):
            conversation.hear(self.heard[(at + n) % len(self.heard)])
            while (said := conversation.said()) is not None:
                self.counts["frames said"] += 1
                self.watch.finite("sound", torch.from_numpy(said[0]))
            if not gathering:
                self._do_something(conversation, at)

    def leave(self) -> None:
        """All go."""
        for conversation, at in list(self._open):
            self._leave(conversation, at)

    def _come(self) -> None:
        memory = self._kept if self.rng.random() < 0.5 else None
        conversation = self.host.open(memory=memory)
        self._open.append((conversation, self.rng.randrange(len(self.heard))))
        self.counts["came"] += 1
        self.counts["came with a memory"] += memory is not None

    def _knock(self) -> None:
        try:
            self.host.open()
        except Full:
            self.counts["turned away"] += 1

    def _leave(self, conversation: Conversation, at: int) -> None:
        if conversation.diverged:
            self.watch.bad.append(f"a memory started over {conversation.diverged} times")
        conversation.close()
        self._open.remove((conversation, at))
        self.counts["left"] += 1

    def _do_something(self, conversation: Conversation, at: int) -> None:
        chance = self.rng.random()
        if conversation.paused:
            conversation.paused = chance > GOES_ON
        elif (chance := chance - PAUSES) < 0:
            conversation.paused = True
            self.counts["paused"] += 1
        elif (chance := chance - RESTARTS) < 0:
            conversation.restart()
            self.counts["started over"] += 1
        elif (chance := chance - LEAVES) < 0:
            self._leave(conversation, at)
        elif chance - KEEPS < 0 and self._keeps:
            self._kept = conversation.take_memory().result()
            self.watch.finite("a kept memory", *self._kept.tensors.values())
            self.counts["memory kept"] += 1


def soak_sessions(
    talker: Talker, rows: int, frames: int, window: int, seed: int = 0
) -> dict[str, Any]:
    """Conversations that come, pause, start over, keep their memory and go, in real time.

    Args:
        talker: the model.
        rows: conversations at a time.
        frames: of 80 ms, all in all.
        window: frames of a window.
        seed: of who comes and goes.
    """
    minutes = min(SPEECH_MINUTES, frames / FRAMES_PER_MINUTE)
    heard = torch.cat([both[1] for both in speech(minutes)]).view(-1, FRAME)
    with ExitStack() as stack:
        watch = Watch(talker.lm.device, engine_twin(stack, talker, rows, heard))
        engine = Engine(talker.lm, talker.mimi, talker.tokenizer, rows=rows, seed=seed)
        stack.enter_context(engine)
        engine.step = watch.timed(engine.step)
        with (
            Host(engine) as host,
            tqdm(
                total=frames, desc="sessions", unit="frame", file=sys.stderr, mininterval=1
            ) as bar,
        ):
            crowd = Crowd(host, heard.numpy(), watch, random.Random(seed))
            due = time.monotonic()
            for n in range(1, frames + 1):
                crowd.frame(n)
                watch.frames = n
                if n % window == 0:
                    watch.close_window()
                bar.update()
                due += FRAME_MS / 1000
                time.sleep(max(0.0, due - time.monotonic()))
            crowd.leave()
            if host.failed is not None:
                watch.bad.append(host.failed)
            dropped = {"heard": host.dropped_heard, "said": host.dropped_said}
        p50, p95, p99 = engine.times.percentiles()
        times = {"p50": p50, "p95": p95, "p99": p99, "late": engine.times.late}
    return watch.result() | {
        "sessions": rows, "happened": dict(crowd.counts), "dropped": dropped,
        "step_ms": times, "steps": engine.times.count,
    }  # fmt: skip
