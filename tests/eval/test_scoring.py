"""The benchmark of scoring, the command itself on recordings of a second."""

import json

import pytest
import torch

from eval.bench import scoring
from eval.bench.scoring import WAYS, Way, frame_by_frame, missed
from moshi_ttt.errors import UserError
from tests.eval.oracle import assert_same, streamed_nll
from tests.eval.tiny_lm import make_lm, make_recordings

TINY = ["--frames", "8", "--rounds", "1"]


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scoring, "TARGET", 0.0)  # no speed of a second is one
    scoring.main([*TINY, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "scoring.json").read_text())
    assert [row["way"] for row in found["rows"]] == 2 * [way.label for way in WAYS]
    assert {row["model"] for row in found["rows"]} == {"base", "base with ttt_mlp"}
    for row in found["rows"]:
        assert row["ms"] > 0
        assert row["difference"] < 1e-4
        assert (row["times"] == 1) == (row["way"] == WAYS[0].label)
    page = (tmp_path / "scoring.md").read_text()
    for text in ("6 to 10 frames", "**met**", "| base with ttt_mlp | score, 8 at a time |"):
        assert text in page
    assert "- commit: `" in page
    assert page.startswith(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (lambda lm, codes: [x + 2e-4 for x in frame_by_frame(lm, codes)], "differs by 0.0002 nats"),
        (lambda lm, codes: [x.nan_to_num() for x in frame_by_frame(lm, codes)], "in one way only"),
    ],
)
def test_no_speed_is_reported_of_wrong_numbers(tmp_path, capsys, monkeypatch, wrong, line):
    monkeypatch.setattr(scoring, "WAYS", [WAYS[0], Way("wrong", 1, wrong)])
    with pytest.raises(SystemExit) as stopped:
        scoring.main([*TINY, "--out", str(tmp_path / "o")])
    assert stopped.value.code == 1
    said = capsys.readouterr()
    assert not said.out
    assert f"wrong: an NLL {line}" in said.err.replace("is there ", "")
    assert not (tmp_path / "o").exists()


def test_a_missed_target_is_status_1_and_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scoring, "TARGET", 1e6)
    monkeypatch.setattr(scoring, "WAYS", WAYS[:2])
    with pytest.raises(SystemExit) as stopped:
        scoring.main([*TINY, "--out", str(tmp_path)])
    assert stopped.value.code == 1
    assert "less than 1e+06 times as fast: base, base with ttt_mlp" in capsys.readouterr().err
    assert "**missed: base, base with ttt_mlp**" in (tmp_path / "scoring.md").read_text()


def test_the_target_is_for_one_recording_at_a_time():
    rows = [{"model": "m", "way": way.label, "times": 7.9 if i == 1 else 9.0}
            for i, way in enumerate(WAYS)]  # fmt: skip
    assert missed(rows) == ["m"]
    rows[1]["times"], rows[2]["times"] = 8.0, 1.0
    assert missed(rows) == []


def test_what_it_is_compared_with_is_right():
    lm, recordings = make_lm(dtype=torch.float32), make_recordings(30, 17, seed=2)
    recordings = [codes.clamp(min=0) for codes in recordings]
    for found, codes in zip(frame_by_frame(lm, recordings), recordings, strict=True):
        assert_same(found, streamed_nll(lm, codes), 1e-5)


@pytest.mark.parametrize("wrong", [["--frames", "7"], ["--rounds", "0"]])
def test_options_that_make_no_sense(wrong, tmp_path):
    with pytest.raises(UserError, match="--frames must be at least 8"):
        scoring.main([*TINY, *wrong, "--out", str(tmp_path)])
