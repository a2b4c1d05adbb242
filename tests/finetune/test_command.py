"""`python -m finetune.train` in a process of its own: what a person types, and what comes back."""

import pytest
import yaml

from tests.finetune.small_run import command, lines


def test_a_run_with_overrides_and_the_same_again(world, tmp_path):
    run = tmp_path / "run"
    typed = [
        world.config, "--run_dir", run, "--ttt.layers", "[0,1]", "--max_steps", 1,
        "--wandb.project", "p", "--wandb_offline",
    ]  # fmt: skip
    done = command(*typed)
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["ttt"]["layers"] == [0, 1]
    assert config["wandb"]["offline"] is True
    assert len(lines(run)) == 1
    assert list((run / "wandb").glob("offline-run-*"))
    again = command(*typed)
    assert again.returncode == 0
    assert "finished" in again.stdout
    assert again.stderr == ""
    other = command(*typed, "--ttt", "none")
    assert other.returncode == 2
    assert other.stderr.count("\n") == 1
    assert "another config (ttt" in other.stderr


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--ttt.layers", "[0,9]"], "layer 9 is out of range"),
        (["--max_stepps", "3"], "--max_stepps: unknown key 'max_stepps'"),
        (["more.yaml"], "'more.yaml' is too much"),
    ],
    ids=["layer", "key", "surplus"],
)
def test_a_mistake_is_one_line_and_status_2(world, tmp_path, typed, message):
    done = command(world.config, "--run_dir", tmp_path / "run", *typed)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not list(tmp_path.iterdir())
