"""The run's folder: whose it is, finished or not, and never lost or half made."""

import shutil
from pathlib import Path

import pytest
import yaml

from finetune.load_args import load_args
from finetune.run_dir import begin_run_dir, finished_summary
from moshi_ttt.errors import UserError
from tests.finetune.small_run import lines


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    """A finished run."""
    return world.run(tmp_path_factory.mktemp("runs") / "done", max_steps=1)


def files(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_a_finished_run_is_reported_and_not_run_again(world, done, capsys):
    before = files(done)
    world.run(done, max_steps=1)
    said = capsys.readouterr().out
    assert "finished" in said
    assert (done / "summary.txt").read_text() in said
    assert "1/5" not in said
    assert files(done) == before
    world.run(done.parent / "." / "done", max_steps="1")  # the same, spelled otherwise
    assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"max_steps": 2}, r"another config \(max_steps: 1, now 2\)"),
        ({"lora__rank": 8}, r"\(lora\.rank: 4, now 8\)"),
        ({"ttt": "none"}, r"\(ttt\.base_lr: 0\.1, now None\)"),
        ({"wandb_offline": True}, r"\(wandb\.offline: False, now True\)"),
    ],
)
def test_another_config_is_refused_and_names_the_key(world, done, overrides, message):
    before = files(done)
    with pytest.raises(UserError, match=message + ".*--overwrite_run_dir"):
        world.run(done, **{"max_steps": 1} | overrides)
    assert files(done) == before


def test_an_unfinished_run_is_refused(world, done, tmp_path):
    shutil.copytree(done, tmp_path / "run")
    (tmp_path / "run" / "summary.txt").unlink()
    with pytest.raises(UserError, match=r"holds this run, unfinished; .*--overwrite_run_dir"):
        world.run(tmp_path / "run", max_steps=1)


def test_overwrite_moves_the_older_run_aside(world, done, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(done, run)
    (run / "mine.txt").write_text("notes")
    world.run(run, max_steps=2, overwrite_run_dir=True)
    (aside,) = [p for p in tmp_path.iterdir() if p != run]
    assert str(aside) in capsys.readouterr().out
    assert aside.name.startswith("run.")
    assert (aside / "mine.txt").read_text() == "notes"
    assert len(lines(aside)) == 1
    assert len(lines(run)) == 2
    assert not (run / "mine.txt").exists()
    assert yaml.safe_load((run / "config.yaml").read_text())["overwrite_run_dir"] is False


def test_two_runs_moved_within_a_second_are_both_kept(world, tmp_path):
    args = load_args(world.config, {"run_dir": str(tmp_path / "run")})
    aside = [begin_run_dir(tmp_path / "run", args) for _ in range(4)]
    assert aside[0] is None
    assert len(set(aside)) == 4
    assert len(list(tmp_path.iterdir())) == 4


def test_a_run_in_the_working_directory(world, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    args = load_args(world.config, {"run_dir": ".", "overwrite_run_dir": True})
    assert finished_summary(tmp_path / "here", args) is None
    begin_run_dir(tmp_path / "here", args)
    monkeypatch.chdir(tmp_path / "here")
    aside = begin_run_dir(Path(), args)
    assert aside is not None
    assert (tmp_path / "here" / "config.yaml").is_file()


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_ours_is_left_alone(world, tmp_path, overwrite):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name, message in (
        ("folder", "exists and is not a run of ours"),
        ("file", "is a file"),
        ("file/run", "file is a file"),
    ):
        with pytest.raises(UserError, match=message):
            world.run(tmp_path / name, overwrite_run_dir=overwrite)
    assert (tmp_path / "folder" / "thesis.tex").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_an_empty_folder_is_taken(world, tmp_path):
    args = load_args(world.config, {"run_dir": str(tmp_path)})
    assert finished_summary(tmp_path, args) is None
    assert begin_run_dir(tmp_path, args) is None
    assert load_args(tmp_path / "config.yaml") == args


def test_a_full_disk_at_the_beginning_leaves_everything_as_it_was(world, tmp_path, monkeypatch):
    args = load_args(world.config, {"run_dir": str(tmp_path / "run")})
    begin_run_dir(tmp_path / "run", args)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    for name in ("run", "new"):
        with pytest.raises(OSError, match="No space left"):
            begin_run_dir(tmp_path / name, args)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert load_args(tmp_path / "run" / "config.yaml") == args


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"ttt__layers": "[0,7]"}, "ttt: layer 7 is out of range: 0 to 1 exist"),
        ({"ttt__num_heads": 5}, "width 32 is not divisible by num_heads 5"),
        (
            {"moshi_paths__hf_repo_id": "./nowhere"},
            r"moshi_paths\.hf_repo_id \./nowhere: no such folder",
        ),
        ({"data__train_data": "nowhere.jsonl"}, r"no such manifest: nowhere\.jsonl"),
        ({"data__eval_data": "nowhere.jsonl", "do_eval": True}, r"no such manifest"),
        ({"data__corpus": "nonsense"}, "data.corpus 'nonsense' is unknown"),
        ({"wandb__key": "secret"}, "wandb.key .*WANDB_API_KEY"),
        ({"batch_size": 10**9}, "this run needs about .* bytes"),
    ],
)
def test_a_refused_run_leaves_no_folder(world, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        world.run(tmp_path / "run", **overrides)
    assert "secret" not in str(caught.value).replace("a secret does", "")
    assert not list(tmp_path.iterdir())
