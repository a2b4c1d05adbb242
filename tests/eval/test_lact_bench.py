"""The benchmark of LaCT's backward: three ways that agree, or no speed."""

import json

import pytest

from eval.bench import lact
from moshi_ttt.errors import UserError
from moshi_ttt.ops.lact_scan import scan

SMALL = ["--heads", "1", "--width", "16", "--chunk-size", "8", "--rounds", "1"]


def test_the_table_is_written(tmp_path, capsys):
    lact.main([*SMALL, "--frames", "256", "64", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "lact_backward.json").read_text())
    assert {"commit", "machine", "versions", "command", "date"} < set(found)
    short, long = found["rows"]
    assert (short["frames"], long["frames"]) == (64, 256)
    for row in (short, long):
        assert row["ours"]["saved"] < row["checkpoint"]["saved"] < row["plain"]["saved"]
        assert row["ours"]["alive"] < row["plain"]["alive"]
        assert all(row[way]["seconds"] > 0 for way in lact.WAYS)
        for error in row["differences"].values():
            assert error["outputs"] <= 1e-6
            assert error["gradients"] <= 1e-5
    page = (tmp_path / "lact_backward.md").read_text()
    assert page.startswith(capsys.readouterr().out)
    for text in ("| 256 | checkpoint | ", "- commit: `", "- command: `python -m eval.bench.lact"):
        assert text in page


def test_what_would_not_fit_is_left_out_and_said(tmp_path):
    lact.main([*SMALL, "--frames", "64", "--most-gib", "1e-6", "--out", str(tmp_path)])
    page = (tmp_path / "lact_backward.md").read_text()
    assert "| 64 | plain | would keep 0.0 GiB: left out | " in page
    assert "| 64 | checkpoint | 0" in page


def test_no_speed_without_agreement(tmp_path, capsys, monkeypatch):
    def wrong(*args):
        o, W, D = scan(*args)
        o.register_hook(lambda g: 1.01 * g)
        return o, W, D

    monkeypatch.setitem(lact.WAYS, "ours", wrong)
    with pytest.raises(SystemExit, match="1"):
        lact.main([*SMALL, "--frames", "64", "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert "64 frames: gradients of ours and plain differ by" in said
    assert "no speed is reported" in said
    assert not list(tmp_path.iterdir())


def test_what_makes_no_run_is_the_users_mistake(tmp_path):
    for wrong in (["--frames", "12"], ["--rounds", "0"], ["--frames", "0"]):
        with pytest.raises(UserError):
            lact.main([*SMALL, *wrong, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
