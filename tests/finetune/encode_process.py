"""`finetune.encode` in a process of its own that is forked, not started: quick, and killable."""

import os
import signal
from multiprocessing import get_context

from finetune import encode

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
