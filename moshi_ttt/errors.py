"""What a user did wrong, said in one line; used by every command line of the project."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from safetensors import SafetensorError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class UserError(ValueError):
    """A mistake in what the user gave: the message names file, line and value, in one line."""


class Parser(argparse.ArgumentParser):
    """A command's options; what is wrong with them is a `UserError`.

    Args:
        command: what a person types, e.g. `"python -m eval.librilight"`.
        about: its module's docstring, the head of `--help`.
        more: further options of ArgumentParser, e.g. those of a subcommand.
    """

    def __init__(self, command: str | None = None, about: str | None = None, **more: Any) -> None:
        given: dict[str, Any] = {"prog": command, "description": about, "allow_abbrev": False}
        given["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(**{**given, **more})

    def error(self, message: str) -> NoReturn:
        """Raise instead of leaving."""
        raise UserError(f"{message} (see --help)")


def no_space_left(error: BaseException) -> bool:
    """Whether a write failed because the disk is full or the quota used up."""
    if isinstance(error, OSError):
        return error.errno in NO_SPACE
    # safetensors carries the system's error number in its text only
    return isinstance(error, SafetensorError) and any(
        f"(os error {n})" in str(error) for n in NO_SPACE
    )


def run_cli(main: Callable[[], object], interrupted: str | None = None) -> None:
    """Run a command line's body; a user's mistake becomes one line on stderr and exit status 2.

    An error that nobody foresaw keeps its traceback.

    Args:
        main: the body, without arguments: `run_cli(lambda: fire.Fire(train))`.
        interrupted: a line to say after Ctrl-C; None leaves that to the caller.

    Raises:
        SystemExit: status 2, after a `UserError` or a full disk; 130, after Ctrl-C.
    """
    try:
        main()
    except UserError as error:
        line = " ".join(str(error).split())
    except (OSError, SafetensorError) as error:
        if not no_space_left(error):
            raise
        name = getattr(error, "filename", None)
        line = f"no space left on the device{f' for {name}' if name else ''}: {error}"
    except KeyboardInterrupt:
        if interrupted is None:
            raise
        sys.stderr.write(f"\ninterrupted: {interrupted}\n")
        sys.exit(130)
    else:
        return
    sys.stderr.write(f"error: {line}\n")
    sys.exit(2)
