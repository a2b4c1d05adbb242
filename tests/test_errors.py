"""One line and exit status 2 for a user's mistake; a traceback for ours."""

import errno
import os

import pytest
import torch
from safetensors.torch import save_file

from moshi_ttt.errors import UserError, run_cli


def _raise(error):
    raise error


def test_user_error_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as left:
        run_cli(lambda: _raise(UserError("a.yaml:3: lr must be positive,\n  got -1")))
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: a.yaml:3: lr must be positive, got -1\n"


def test_no_space_left_is_one_line(capsys):
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a/lora.safetensors")
    with pytest.raises(SystemExit) as left:
        run_cli(lambda: _raise(error))
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert "no space left" in err
    assert "runs/a/lora.safetensors" in err
    assert err.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which is Linux's")
def test_no_space_left_from_safetensors(capsys):
    with pytest.raises(SystemExit) as left:
        run_cli(lambda: save_file({"a": torch.zeros(1 << 16)}, "/dev/full"))
    assert left.value.code == 2
    assert "no space left" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [KeyError("x"), PermissionError(errno.EACCES, "no"), ValueError()]
)
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)):
        run_cli(lambda: _raise(error))


def test_nothing_wrong_returns():
    assert run_cli(lambda: None) is None


def test_ctrl_c_is_a_line_where_one_is_given(capsys):
    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        run_cli(stopped, "goes on from there")
    assert left.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted: goes on from there\n"
    with pytest.raises(KeyboardInterrupt):
        run_cli(stopped)
