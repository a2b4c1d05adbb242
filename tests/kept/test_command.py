"""The command that lists, exports and deletes what is kept."""

import json
import os
import time

import pytest
import torch
from safetensors.torch import save_file

from moshi_ttt.errors import run_cli
from moshi_ttt.kept.__main__ import main
from tests.kept.keeping import ABOUT, saved


def call(capsys, *argv):
    """Exit status, stdout and stderr."""
    status = 0
    try:
        run_cli(lambda: main(list(argv)))
    except SystemExit as left:
        status = left.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_commands(kept, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MOSHI_TTT_MEMORIES", str(kept.folder))
    assert call(capsys, "list") == (0, f"nothing is kept in {kept.folder}\n", "")
    assert not kept.folder.exists()
    kept.write("anna", saved(9000))
    kept.write("李 雷", saved(75))
    kept.path("broken").write_text("no")
    for name, header in {"header": "{", "kind": "[1]", "model": '{"format": 1, "rows": 1}'}.items():
        save_file({"a/fast.pos": torch.tensor([1])}, kept.path(name), {"moshi_ttt.memory": header})
    about = {"moshi_ttt.memory": json.dumps(ABOUT)}
    save_file({"a/fast.pos": torch.tensor([1.0, 2.0])}, kept.path("position"), about)
    for name in ("header", "kind", "model", "position"):
        assert kept.get(name).broken, name  # and the others can still be listed
        kept.delete(name)
    (kept.folder / "Anna.safetensors").write_text("")
    os.utime(kept.path("anna"), (1e9, 1e9))
    status, out, _ = call(capsys, "list")
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(1e9))
    assert status == 0
    assert out.splitlines()[:2] == [
        "name     minutes  saved                  MiB",
        f"anna        12.0  {when}      0.00",
    ]
    assert "\nbroken    broken  2" in out
    assert "\n李 雷          0.1  2" in out
    assert "broken.safetensors is broken: " in out
    assert "Anna.safetensors is nobody's" in out
    mine = str(tmp_path / "mine")
    assert call(capsys, "export", "Anna", mine)[0] == 0
    status, out, err = call(capsys, "export", "Anna", mine)
    assert (status, out) == (2, "")
    assert err == f"error: {mine} exists; --force writes over it\n"
    status, out, _ = call(capsys, "export", "Anna", mine, "--force")
    assert out.startswith(f"exported anna (12.0 minutes of memory, saved {when}) to {mine}")
    assert "is broken" in call(capsys, "export", "broken", str(tmp_path / "no"))[2]
    assert call(capsys, "delete", "broken")[1].startswith("deleted broken (a broken memory, ")
    status, out, _ = call(capsys, "delete", "anna")
    assert out == f"deleted anna (12.0 minutes of memory, saved {when}) from {kept.folder}\n"
    status, out, err = call(capsys, "delete", "anna")
    assert status == 2
    assert err.endswith("; there is: 李 雷\n")
    assert len(err.splitlines()) == 1
    other = str(tmp_path / "other")
    assert call(capsys, "list", "--memories", other)[1] == f"nothing is kept in {other}\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "required: COMMAND"),
        (["lits"], "invalid choice: 'lits'"),
        (["delete"], "required: NAME"),
        (["delete", "../x"], "has '/' in it"),
        (["export", "anna"], "required: FILE"),
    ],
)
def test_mistakes_are_one_line(kept, capsys, monkeypatch, argv, words):
    monkeypatch.setenv("MOSHI_TTT_MEMORIES", str(kept.folder))
    status, out, err = call(capsys, *argv)
    assert (status, out) == (2, "")
    assert words in err
    assert len(err.splitlines()) == 1
