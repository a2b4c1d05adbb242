"""What a step takes by its length: the command itself, on a size that a CPU runs at once."""

import json

import pytest
import yaml

from eval.bench import lact_816m
from moshi_ttt.errors import UserError
from tests.finetune.small_run import ROOT


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The shipped file with the tiny size and a short chunk."""
    monkeypatch.chdir(tmp_path)
    values = yaml.safe_load((ROOT / "configs/lact_816m.yaml").read_text())
    values["moshi_paths"] = {"size": "tiny"}
    values["ttt"] |= {"chunk_size": 8, "low_rank": 4}
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_steps_are_run_at_every_length(config, tmp_path, capsys):
    command = ["--config", str(config), "--frames", "24", "48", "--out", str(tmp_path / "out")]
    lact_816m.main([*command, "--device", "cpu"])
    rows = json.loads((tmp_path / "out/lact_816m.json").read_text())["rows"]
    assert [(r["frames"], r["checkpointing"]) for r in rows] == [
        (24, True), (24, False), (48, True), (48, False)
    ]  # fmt: skip
    assert all(r["ran"] and r["step_seconds"] > 0 for r in rows if r["checkpointing"])
    assert all(r["estimated"] >= r["resident"] > 4 * r["parameters"] for r in rows)
    page = (tmp_path / "out/lact_816m.md").read_text()
    assert page.startswith(capsys.readouterr().out)
    assert "not yet run on a GPU" not in page


def test_without_a_gpu_the_bytes_are_computed_and_that_is_said(config, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    lact_816m.main(["--config", str(config), "--frames", "48", "--out", str(tmp_path / "out")])
    page = (tmp_path / "out/lact_816m.md").read_text()
    assert page.count("not yet run on a GPU") == 2
    assert "computed" in page
    assert "ran" not in json.loads((tmp_path / "out/lact_816m.json").read_text())["rows"][0]


def test_what_does_not_fit_is_a_row_that_says_so(config, tmp_path, monkeypatch):
    monkeypatch.setattr(lact_816m, "steps", lambda *_: None)
    command = ["--config", str(config), "--frames", "48", "--out", str(tmp_path / "out")]
    lact_816m.main([*command, "--device", "cpu"])
    assert "| did not fit |" in (tmp_path / "out/lact_816m.md").read_text()


def test_a_config_with_a_base_is_refused():
    with pytest.raises(UserError, match=r"moshi_paths\.size is wanted"):
        lact_816m.main(["--config", str(ROOT / "configs/tiny.yaml")])
    with pytest.raises(UserError, match="--frames must be above 0"):
        lact_816m.main(["--frames", "0"])
