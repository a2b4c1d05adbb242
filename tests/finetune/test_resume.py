"""A run that was stopped, killed or met a full disk goes on, to the bit."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import finetune.step
from finetune.loop import Loop
from finetune.run_dir import held
from finetune.signals import Stopped
from finetune.trainer_state import find_state, newest_state, numbered, read_about
from moshi_ttt.checkpoint import load
from moshi_ttt.errors import UserError
from tests.finetune.ranks import CONTEXT
from tests.finetune.small_run import LORA_ONLY, checkpoint, lines, weights
from tests.small import small_lm, small_tokenizer

RUN = {
    "max_steps": 10, "num_microbatches": 2, "tbptt_segments": 2, "carry_kv": True, "ckpt_freq": 1,
    "state_reset_interval": 4, "data.shuffle": True, "num_ckpt_keep": 2, "log_freq": 1,
    "memory_start_step": 2,
}  # fmt: skip
PASSING = {"seconds", "tokens_per_second", "peak_memory"}
"""What two runs may differ in."""


def command_line(said: str, argv: list[str]) -> None:
    """`python -m finetune.train ARGV` in a process that has imported it, output to a file.

    Without its curves, which are drawn elsewhere.
    """
    import finetune.train

    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False)
    torch.set_num_threads(1)
    sys.argv = ["train", *argv]
    with mock.patch("finetune.train.plot_curves"):
        finetune.train.main()


class Started:
    """A run in a process of its own."""

    def __init__(self, world, run_dir: Path, *more: str, **keys) -> None:
        typed = {"run_dir": run_dir, **RUN, **keys}
        argv = [str(world.config), *(f"--{k}={v}" for k, v in typed.items()), *more]
        self.run_dir, self.said = run_dir, run_dir.with_name(f"{run_dir.name}.said")
        self.process = CONTEXT.Process(target=command_line, args=(str(self.said), argv))
        self.process.start()

    def until(self, happened) -> None:
        """Wait until something is so, or the run has ended."""
        for _ in range(100_000):
            if happened() or not self.process.is_alive():
                return
            self.process.join(0.002)

    def steps(self) -> int:
        """Steps in the log."""
        log = self.run_dir / "metrics.jsonl"
        return log.read_text().count('"kind": "train"') if log.exists() else 0

    def end(self, signum: int | None = None) -> int:
        """Send a signal if any, and wait; the exit status."""
        if signum is not None and self.process.is_alive():
            os.kill(self.process.pid, signum)
        self.process.join(100)
        assert not self.process.is_alive()
        return self.process.exitcode


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The run that nobody interrupts."""
    run = Started(world, tmp_path_factory.mktemp("whole") / "run")
    assert run.end() == 0, run.said.read_text()
    return run.run_dir


def assert_the_same(got: Path, want: Path) -> None:
    found, wanted = weights(got), weights(want)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[k], w) for k, w in wanted.items())
    one, two = (load_file(next(newest_state(r).glob("*.safetensors"))) for r in (got, want))
    assert one.keys() == two.keys()
    assert {key.split(".")[0] for key in two} == {"master", "exp_avg", "exp_avg_sq", "lanes", "rng"}
    assert all(torch.equal(one[key], tensor) for key, tensor in two.items())
    one, two = (read_about(newest_state(r)) for r in (got, want))
    assert {k: one[k] for k in ("progress", "reading", "adam_steps", "lanes")} == {
        k: two[k] for k in ("progress", "reading", "adam_steps", "lanes")
    }
    strip = lambda run: [{k: v for k, v in line.items() if k not in PASSING} for line in lines(run)]  # noqa: E731
    assert strip(got) == strip(want)
    assert [line["step"] for line in lines(want)] == list(range(1, RUN["max_steps"] + 1))
    assert not list((got / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_goes_on(world, whole, tmp_path, signum):
    run = Started(world, tmp_path / "run", ckpt_freq=0)  # nothing is saved but what is asked for
    run.until(lambda: run.steps() >= 4)
    assert run.end(signum) == 128 + signum
    said = run.said.read_text()
    assert "stopped after step" in said
    assert "--resume goes on" in said
    assert "Traceback" not in said
    assert 4 <= len(lines(run.run_dir)) < RUN["max_steps"]
    assert not (run.run_dir / "summary.txt").exists()
    again = Started(world, tmp_path / "run", "--resume")
    assert again.end() == 0, again.said.read_text()
    assert "goes on after step" in again.said.read_text()
    assert_the_same(run.run_dir, whole)


@pytest.mark.parametrize("many", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_many_moments_it_goes_on(world, whole, tmp_path, many):
    """Random ones, before the first step and in the middle of saves, too."""
    rng = random.Random(0)
    saves, kills = tmp_path / "run" / "checkpoints", 0
    torn = 0
    while kills < many:
        run = Started(world, tmp_path / "run", "--resume")
        if kills % 2:
            run.until(lambda: list(saves.glob("*.tmp")))  # a save is going on
            run.process.join(rng.uniform(0, 0.02))
        else:
            run.process.join(rng.uniform(0.2, 1.2))
        status = run.end(signal.SIGKILL)
        if status == 0:  # it was faster
            shutil.rmtree(tmp_path / "run")
            continue
        assert status == -signal.SIGKILL, run.said.read_text()
        kills += 1
        torn += bool(list(saves.glob("*.tmp")))
    assert torn
    last = Started(world, tmp_path / "run", "--resume")
    assert last.end() == 0, last.said.read_text()
    assert_the_same(tmp_path / "run", whole)


@pytest.fixture
def small_disk(tmp_path):
    """A folder that is a disk of 1.3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1300k", "tmpfs", str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip(f"no small disk can be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_and_what_was_saved_stays(world, whole, small_disk, tmp_path):
    run = Started(world, small_disk / "run", num_ckpt_keep=99)
    assert run.end() == 2
    said = run.said.read_text()
    assert "no space left for" in said
    assert "what was saved before is whole: make room, then --resume" in said
    assert "Traceback" not in said
    there = sorted(p.name for p in (run.run_dir / "checkpoints").iterdir())
    assert there
    assert not [name for name in there if name.endswith(".tmp")]
    assert load(checkpoint(run.run_dir)).about["step"] == len(there)
    shutil.copytree(run.run_dir, tmp_path / "run")  # room
    again = Started(world, tmp_path / "run", "--resume")
    assert again.end() == 0, again.said.read_text()
    assert_the_same(tmp_path / "run", whole)


def test_a_file_asks_for_a_stop_where_signals_do_not_reach(world, whole, tmp_path):
    """torchrun kills its processes 30 s after a signal, too soon for a long step."""
    run = Started(world, tmp_path / "run")
    run.until(lambda: run.steps() >= 2)
    (run.run_dir / "stop").touch()
    assert run.end() == 128 + signal.SIGTERM
    assert not (run.run_dir / "stop").exists()
    again = Started(world, tmp_path / "run", "--resume")
    assert again.end() == 0, again.said.read_text()
    assert_the_same(run.run_dir, whole)


def test_asked_in_the_last_step_it_does_not_go_on_to_the_evaluation(world, tmp_path, monkeypatch):
    real = Loop._step

    def asked(self, step, bar):
        self.stop.signum = signal.SIGTERM if step == 2 else None
        return real(self, step, bar)

    monkeypatch.setattr(Loop, "_step", asked)
    keys = {"max_steps": 2, "do_eval": True, "eval__eval_after_training": True}
    with pytest.raises(Stopped, match="stopped after step 2: saved in"):
        world.run(tmp_path / "run", **keys)
    assert not lines(tmp_path / "run", "held_out")
    monkeypatch.undo()
    world.run(tmp_path / "run", resume=True, **keys)
    assert [line["step"] for line in lines(tmp_path / "run", "held_out")] == [2]
    assert (tmp_path / "run" / "eval" / "results.json").exists()


def test_a_folder_is_held_against_a_second_process(world, tmp_path):
    run = Started(world, tmp_path / "run", max_steps=1000)
    run.until(lambda: run.steps() >= 1)
    with pytest.raises(
        UserError, match=rf"another process is training .*process {run.process.pid}"
    ):
        resume(world, tmp_path / "run", max_steps=1000)
    assert run.end(signal.SIGKILL) == -signal.SIGKILL
    with held(tmp_path / "run"):  # who was killed holds nothing
        pass


def test_a_folder_is_held_before_its_checkpoints_are_looked_at(world, stopped):
    """Which the other process makes and removes meanwhile."""
    (newest_state(stopped) / "trainer.json").unlink()
    with held(stopped), pytest.raises(UserError, match="another process is training"):
        resume(world, stopped)
    with pytest.raises(UserError, match="holds no state to go on from"):
        resume(world, stopped)


# -- what may go on, and where ---------------------------------------------------------------------


@pytest.fixture
def stopped(whole, tmp_path):
    """The whole run as it was after step 9."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint_000010")
    (tmp_path / "run" / "summary.txt").unlink()
    return tmp_path / "run"


def resume(world, run, resume=True, **keys):
    return world.run(run, resume=resume, **{k.replace(".", "__"): v for k, v in RUN.items()} | keys)


def test_without_resume_an_unfinished_run_is_refused(world, stopped):
    with pytest.raises(UserError, match=r"unfinished; --resume goes on with it"):
        resume(world, stopped, False)


def test_a_named_checkpoint_goes_on_in_a_folder_of_its_own(world, whole, stopped, tmp_path):
    for name in (stopped, stopped / "checkpoints" / "checkpoint_000009"):
        other = tmp_path / f"other{len(name.parts)}"
        resume(world, other, str(name))
        found = weights(other)
        assert all(torch.equal(found[k], want) for k, want in weights(whole).items())
        assert [line["step"] for line in lines(other)] == [10]
    with pytest.raises(UserError, match="no run or checkpoint with a state"):
        find_state(str(tmp_path))
    with pytest.raises(UserError, match="no run or checkpoint with a state"):
        resume(world, tmp_path / "new", str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"optim__lr": 5e-3}, r"optim\.lr: 0\.001, now 0\.005"),
        ({"max_steps": 20}, "max_steps: 10, now 20"),
        ({"seed": 5}, "seed: 0, now 5"),
        ({"carry_kv": False}, "carry_kv: True, now False"),
        ({"ttt__chunk_size": 8}, "chunk_size: 4, now 8"),
        (LORA_ONLY, "ttt"),
    ],
    ids=["lr", "steps", "seed", "kv", "chunk", "memory"],
)
def test_another_training_is_refused(world, stopped, tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        resume(world, stopped, **keys)
    with pytest.raises(UserError, match=message):
        resume(world, tmp_path / "other", str(stopped), **keys)
    assert not (tmp_path / "other").exists()


def test_other_micro_batches_and_logs_may_go_on(world, whole, stopped):
    """Four lanes, two rows in two slots or four in one; float32 sums them in another order."""
    run = resume(world, stopped, batch_size=4, num_microbatches=1, log_freq=7, ckpt_freq=0)
    for key, want in weights(whole).items():
        assert torch.allclose(weights(run)[key], want, atol=1e-5)
    assert lines(run)[-1]["loss"] == pytest.approx(lines(whole)[-1]["loss"], rel=1e-5)


def test_another_base_under_the_same_name_is_refused(world, stopped, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    save_file(dict(small_lm(seed=1, text_card=small_tokenizer().vocab_size()).state_dict()),
              base / "model.safetensors")  # fmt: skip
    with pytest.raises(UserError, match="trained on a base with other weights"):
        resume(world, stopped, moshi_paths__hf_repo_id=str(base))


def test_checkpoints_of_later_steps_are_made_again(world, whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "summary.txt").unlink()
    (run / "checkpoints" / "checkpoint_000099.tmp").mkdir()  # of a save that was killed
    resume(world, run, str(run / "checkpoints" / "checkpoint_000009"))
    assert "checkpoint_000010 is of a later step: removed" in capsys.readouterr().out
    assert_the_same(run, whole)


def test_checkpoints_without_a_state_are_not_trained_over(world, stopped):
    shutil.rmtree(newest_state(stopped))
    shutil.rmtree(newest_state(stopped) or stopped / "nothing", ignore_errors=True)
    with pytest.raises(UserError, match="checkpoint_000009 holds no state to go on from"):
        resume(world, stopped)


def test_giving_up_leaves_the_last_good_state_and_nothing_later(world, tmp_path, monkeypatch):
    real = finetune.step.loss_sums

    def bad(model, *given):
        text, audio, sums = real(model, *given)
        return text, audio * (math.nan if model.broken else 1), sums

    step = Loop._step

    def breaks(self, number, bar):
        self.model.broken = number >= 4
        return step(self, number, bar)

    monkeypatch.setattr(finetune.step, "loss_sums", bad)
    monkeypatch.setattr(Loop, "_step", breaks)
    keys = {"max_steps": 9, "max_skipped_steps": 3, "ckpt_freq": 2, "num_ckpt_keep": 1}
    with pytest.raises(UserError, match=r"step 6: .*3 steps in a row.*state after step 3 is in"):
        world.run(tmp_path / "run", **keys)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint_000003"]
    monkeypatch.undo()
    world.run(tmp_path / "run", resume=True, **keys)
    whole = world.run(tmp_path / "whole", **keys)
    want = weights(whole)
    assert all(torch.equal(v, want[k]) for k, v in weights(tmp_path / "run").items())


def test_a_checkpoints_folder_that_is_none_is_said_before_the_first_step(world, tmp_path):
    begun = world.run(tmp_path / "run", max_steps=1, do_ckpt=False)
    (begun / "summary.txt").unlink()
    (begun / "checkpoints").write_text("")
    with pytest.raises(UserError, match="no folder for checkpoints"):
        world.run(begun, max_steps=1, resume=True)


def test_names_of_checkpoints_count(tmp_path):
    for name in ("000002", "999999", "1000000", "000003.tmp", "best"):
        state = tmp_path / "checkpoints" / f"checkpoint_{name}" / "trainer"
        state.mkdir(parents=True)
        (state / "trainer.json").touch()
    assert list(numbered(tmp_path / "checkpoints")) == [2, 999999, 1000000]
    assert newest_state(tmp_path).parent.name == "checkpoint_1000000"
    with pytest.raises(UserError, match="is empty"):
        find_state("")


def test_a_finished_run_is_reported_with_resume_too(world, whole, capsys):
    resume(world, whole)
    assert "finished" in capsys.readouterr().out


def test_resume_begins_what_is_not_there(world, tmp_path, capsys):
    run = world.run(tmp_path / "run", resume=True, max_steps=1)
    assert "begins at step 1" in capsys.readouterr().out
    assert len(lines(run)) == 1


def test_a_broken_state_is_named(world, stopped):
    state = newest_state(stopped)
    about = json.loads((state / "trainer.json").read_text())
    (state / "trainer.json").write_text(json.dumps(about | {"format": 99}))
    with pytest.raises(UserError, match="format 99, this version reads 1"):
        resume(world, stopped)
    (state / "trainer.json").write_text("{")
    with pytest.raises(UserError, match="no state to go on from"):
        resume(world, stopped)
    (state / "trainer.json").write_text(json.dumps(about))
    next(state.glob("*.safetensors")).write_bytes(b"junk")
    with pytest.raises(UserError, match=r"safetensors is broken: .*header"):
        resume(world, stopped)
    for text, message in (("[]", "format None"), ('{"format": 1}', "lacks 'adam_steps'")):
        (state / "trainer.json").write_text(text)
        with pytest.raises(UserError, match=message):
            resume(world, stopped)
