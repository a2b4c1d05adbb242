"""`python -m finetune.train`: what a person types, and what comes back."""

import sys

import pytest
import yaml

from finetune.train import main
from tests.finetune.small_run import command, lines


@pytest.fixture
def typed(monkeypatch, capsys):
    """The command in this process: its status, and what it wrote to stdout and stderr."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["train", *map(str, argv)])
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def test_a_run_with_overrides_and_the_same_again(world, tmp_path, typed):
    run = tmp_path / "run"
    argv = [
        world.config, "--run_dir", run, "--ttt.layers", "[0,1]", "--max_steps", 1,
        "--wandb.project", "p", "--wandb_offline",
    ]  # fmt: skip
    done = command(*argv)
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["ttt"]["layers"] == [0, 1]
    assert config["wandb"]["offline"] is True
    assert len(lines(run)) == 1
    assert (run / "curves.png").is_file()
    assert list((run / "wandb").glob("offline-run-*"))
    status, out, err = typed(*argv)
    assert (status, err) == (0, "")
    assert "finished" in out
    status, _, err = typed(*argv, "--ttt", "none")
    assert status == 2
    assert err.count("\n") == 1
    assert "another config (ttt" in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ttt.layers", "[0,9]"], "layer 9 is out of range"),
        (["--max_stepps", "3"], "--max_stepps: unknown key 'max_stepps'"),
        (["more.yaml"], "'more.yaml' is too much"),
    ],
    ids=["layer", "key", "surplus"],
)
def test_a_mistake_is_one_line_and_status_2(world, tmp_path, typed, more, message):
    status, _, err = typed(world.config, "--run_dir", tmp_path / "run", *more)
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_a_mistake_in_a_process_of_its_own_brings_no_word_more(world, tmp_path):
    """Of what is imported, nothing warns."""
    done = command(world.config, "--run_dir", tmp_path / "run", "--ttt.layers", "[0,9]")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
