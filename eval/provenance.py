"""Where numbers come from: code, machine, versions, command and date."""

from __future__ import annotations

import datetime
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch


def provenance(module: str, device: torch.device | None = None) -> dict[str, str]:
    """Commit, machine, versions, command and date.

    Args:
        module: that was run, e.g. `"eval.bench.ops"`.
        device: a GPU, if it was measured.
    """

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", *args],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[1],
            check=False,
        )
        return done.stdout.strip()

    code = ("moshi_ttt", "finetune", "eval", ":(exclude)eval/bench/results")
    dirty = " with changes" if git("status", "--porcelain", "--", *code) else ""
    cpu = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    machine = f"{cpu}, {torch.backends.cpu.get_cpu_capability()}, {threads} thread"
    machine += "s" if threads > 1 else ""
    if device is not None and device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        machine = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return {
        "commit": (git("rev-parse", "HEAD") or "unknown") + dirty,
        "machine": machine,
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, "
        f"moshi {version('moshi')}",
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
