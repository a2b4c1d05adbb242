"""`finetune.encode` in a process of its own that is forked, not started: quick, and killable."""

import os
import signal
from multiprocessing import get_context

from finetune import encode
from finetune.data import encoding

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["finetune.encode"])


def start(argv, *, die_at=None, **env):
    """Run `main`; with `die_at`, kill -9 as the file of that number is about to appear."""
    process = CONTEXT.Process(target=_run, args=([str(a) for a in argv], die_at, env))
    process.start()
    return process


def _run(argv, die_at, env):
    os.environ.update(env)
    replace, seen = os.replace, []

    def counted(source, target):
        seen.append(target)
        if len(seen) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = counted
    encode.main(argv)


def orphan(connection):
    """A worker whose parent is killed at once; it says "up" and would wait for ever."""
    process = CONTEXT.Process(target=_leave_a_worker, args=(connection,))
    process.start()
    connection.close()
    return process


def _leave_a_worker(connection):
    CONTEXT.Process(target=_wait, args=(connection,)).start()
    os.kill(os.getpid(), signal.SIGKILL)


def _wait(connection):
    connection.send("up")
    encoding._start_worker(None)
    connection.recv()
