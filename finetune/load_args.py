"""A run's configuration from its file and the command line."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from finetune.args import TrainArgs
from finetune.yaml_config import Values
from moshi_ttt.errors import UserError

ALIASES = {"wandb_offline": "wandb.offline", "state_passing": "ttt.state_passing"}
"""Names allowed on the command line -> the key they mean."""
_NO_MEMORY = (None, False, "", "null", "none", "None", "false", "False")
_OFF = (False, "off", "false", "False")
"""`ttt.memory: off` (yaml reads false) is `ttt: null` with the rest of it kept in sight."""


def load_args(
    path: str | os.PathLike[str], overrides: Mapping[str, object] | None = None
) -> TrainArgs:
    """Read a config and put overrides in.

    Args:
        path: a yaml file.
        overrides: dotted key -> value, text or already typed: `{"ttt.layers": "every:4"}`. A whole
            section can be switched: `{"ttt": "false"}`; `{"no_state_passing": True}` (fire makes
            it `{"_state_passing": False}`) is `{"ttt.state_passing": False}`, and `ttt.memory` off
            is `ttt` null.

    Raises:
        UserError: every mistake in either, named by file and line or by `--key`.
    """
    values = Values.read(Path(path))
    for name, given in (overrides or {}).items():
        # fire takes the "no" off `--no_state_passing` and hands over `_state_passing` as false
        off = name[1:] if name.startswith("_") and given is False else name.removeprefix("no_")
        if off != name and off in ALIASES:
            if given not in (True, False, "True", "true"):
                raise UserError(f"--no_{off} takes no value, got {given!r}")
            key, value = ALIASES[off], False
        else:
            key, value = ALIASES.get(name, name), given
        if key == ALIASES["state_passing"] and values.tree.get("ttt") in _NO_MEMORY:
            raise UserError(f"--{name}: there is no memory to pass on states (ttt is null)")
        values.override(key, value)
    ttt = values.tree.get("ttt")
    if isinstance(ttt, dict) and "memory" in ttt and ttt["memory"] in _OFF:
        values.tree["ttt"] = None
    return values.build(TrainArgs)
