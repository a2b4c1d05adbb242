"""Memories kept by name: no save is half done, no two conversations have one name."""

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from safetensors.torch import load_file

from moshi_ttt.errors import UserError
from moshi_ttt.kept import Keeper
from moshi_ttt.saved_memory import SavedMemory
from tests.kept.keeping import WAIT, content, saved, until


def test_two_conversations_cannot_have_one_name(kept):
    with kept.taken("Anna"):
        with pytest.raises(UserError, match=rf"another conversation.*\(process {os.getpid()} on "):
            with kept.taken("anna"):
                pass
        with kept.taken("carl"):
            pass
        kept.write("anna", saved(1))
        with pytest.raises(UserError, match="another conversation"):
            kept.delete("anna")
        assert kept.find("anna").frames == 1
    with kept.taken("anna"):
        pass
    assert content(kept.folder) == ["anna.safetensors"]


def test_a_full_disk_does_not_keep_a_memory_from_being_deleted(kept, monkeypatch):
    kept.write("anna", saved(1))

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("moshi_ttt.files.socket.gethostname", full)
    kept.delete("anna")
    assert content(kept.folder) == []


def test_deleting_takes_along_what_a_killed_process_left(kept):
    with pytest.raises(UserError, match="nothing is kept for 'anna'"):
        kept.delete("anna")
    assert not kept.folder.exists()
    kept.write("anna", saved(1))
    (kept.folder / ".anna.tmp").mkdir()
    (kept.folder / ".anna.tmp" / "memory").write_text("half")
    (kept.folder / ".anna.lock").write_text("process 1 on a machine")
    kept.delete("anna")
    assert content(kept.folder) == []


HOLD = """
import sys, time
from moshi_ttt.kept import Kept
with Kept(sys.argv[1]).taken("anna"):
    print("taken", flush=True)
    time.sleep(600)
"""


def test_a_killed_process_lets_go(kept):
    command = [sys.executable, "-c", HOLD, str(kept.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "taken\n"
            with pytest.raises(UserError, match=f"process {other.pid} on "), kept.taken("anna"):
                pass
        finally:
            other.kill()
    with kept.taken("anna"):
        pass
    assert content(kept.folder) == []


def test_many_threads_have_a_name_one_at_a_time(kept):
    inside, most, turns = 0, 0, 0

    def visit():
        nonlocal inside, most, turns
        while turns < 200:
            try:
                with kept.taken("anna"):
                    inside += 1
                    most = max(most, inside)
                    time.sleep(0)
                    inside -= 1
                    turns += 1
            except UserError:
                continue

    threads = [threading.Thread(target=visit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert (most, inside) == (1, 0)
    assert turns >= 200


SAVE = """
import sys
from pathlib import Path
from moshi_ttt.kept import Keeper, Kept
from tests.kept.keeping import saved
kept = Kept(sys.argv[1])
with kept.taken("anna"):
    keeper, n = Keeper(kept, "anna"), 0
    while True:
        n += 1
        keeper.offer(saved(n, size=300_000))
        if n == 1:
            while keeper.saved_at is None and keeper.error is None: pass
            print("saved", flush=True)
"""


def test_killed_at_any_moment_the_file_is_whole(kept):
    left, numbers, rng = [], set(), random.Random(0)
    while len(left) < 2 or (not any(left) and len(left) < 8):
        command = [sys.executable, "-c", SAVE, str(kept.folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
            try:
                assert other.stdout.readline() == "saved\n"
                time.sleep(rng.uniform(0.02, 0.1))
            finally:
                other.send_signal(signal.SIGKILL)
        left.append((kept.folder / ".anna.tmp").exists())
        values = load_file(kept.path("anna"))["a/fast.w"].unique()
        assert len(values) == 1
        assert int(values) == kept.find("anna").frames
        numbers.add(int(values))
        with kept.taken("anna"):
            assert content(kept.folder) == [".anna.lock", "anna.safetensors"]
    assert any(left)  # some were killed in the middle of a save
    assert max(numbers) > 1


class Other(SavedMemory):
    """One that does something else before it writes."""

    def __init__(self, frames, first):
        like = saved(frames)
        super().__init__(like.tensors, like.about)
        object.__setattr__(self, "first", first)

    def write(self, path):
        self.first(path)
        super().write(path)


def test_the_newest_wins_and_nobody_waits(kept):
    gate, began, told = threading.Event(), [], []

    def slow(n):
        return Other(n, lambda _: began.append(n) or gate.wait(WAIT))

    keeper = Keeper(kept, "Anna", lambda: told.append(keeper.frames))
    keeper.offer(slow(1))
    until(lambda: began == [1])
    start = time.monotonic()
    for n in range(2, 500):
        keeper.offer(slow(n))
    assert time.monotonic() - start < WAIT / 2
    assert began == [1]
    assert keeper.saved_at is None
    gate.set()
    until(lambda: told == [1, 499])
    keeper.close(saved(500))
    assert began == [1, 499]
    assert told == [1, 499, 500]
    assert kept.find("anna").frames == keeper.frames == 500
    assert time.time() - keeper.saved_at < WAIT
    assert keeper.error is None


def full(frames):
    def write(path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    return Other(frames, write)


def broken(frames):
    def write(path):
        raise RuntimeError("nobody foresaw this")

    return Other(frames, write)


def test_a_full_disk_leaves_the_old_one_and_the_conversation_goes_on(kept):
    told = []
    keeper = Keeper(kept, "anna", lambda: told.append(keeper.error))
    keeper.offer(saved(1))
    until(lambda: len(told) == 1)
    keeper.offer(full(2))
    until(lambda: len(told) == 2)
    assert told[0] is None
    assert "no space left on the device" in told[1]
    assert kept.find("anna").frames == keeper.frames == 1
    assert content(kept.folder) == ["anna.safetensors"]
    keeper.offer(saved(3))
    until(lambda: len(told) == 3)
    assert keeper.error is None
    keeper.close(full(4))
    assert "no space left" in keeper.error
    assert kept.find("anna").frames == 3


def test_an_error_that_nobody_foresaw_is_not_kept_quiet(kept):
    keeper = Keeper(kept, "anna")
    with pytest.raises(RuntimeError, match="nobody foresaw"):
        keeper.close(broken(1))
    keeper = Keeper(kept, "anna")
    keeper.offer(broken(1))
    until(lambda: keeper._work.done())
    with pytest.raises(RuntimeError, match="nobody foresaw"):
        keeper.offer(saved(2))
    with pytest.raises(RuntimeError, match="nobody foresaw"):
        keeper.close()
