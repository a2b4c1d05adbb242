"""`python -m finetune.check`: exit status 1 where the data is not ready."""

from __future__ import annotations

import sys

from finetune.check.command import main
from moshi_ttt.errors import run_cli


def _command() -> None:
    if not main():
        sys.exit(1)


if __name__ == "__main__":
    run_cli(_command)
