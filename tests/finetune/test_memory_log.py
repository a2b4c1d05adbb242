"""Readings of a run: a file, wandb, warnings; the run does not notice."""

import json
import logging
import math
from contextlib import contextmanager

import pytest
import torch

from finetune.load_args import load_args
from finetune.loop import Loop
from finetune.memory_log import FILE, MemoryLog, summary
from finetune.metrics import Metrics
from moshi_ttt.monitor import Reading
from moshi_ttt.states import ttt_blocks
from tests.finetune.ranks import on_ranks, train
from tests.finetune.small_run import LORA_ONLY, lines, weights
from tests.small import small_hybrid
from tests.test_hybrid import codes_for


def readings(run_dir):
    return [json.loads(line) for line in (run_dir / FILE).read_text().splitlines()]


@contextmanager
def stopped_before(last):
    """Inside, a run is killed before that step."""
    real = Loop._step

    def step(self, number, bar):
        if number == last:
            raise KeyboardInterrupt
        return real(self, number, bar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_step", step)
        yield


@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True, "num_microbatches": 2}])
def test_a_run_does_not_notice(world, tmp_path, more):
    keys = {"max_steps": 5, "ttt__memory": "lact", **more}
    off = world.run(tmp_path / "off", monitor_freq=0, **keys)
    on = world.run(tmp_path / "on", monitor_freq=2, **keys)
    assert not (off / FILE).exists()
    want, got = weights(off), weights(on)
    assert all(torch.equal(t, got[k]) for k, t in want.items())
    assert [a["loss"] for a in lines(off)] == [b["loss"] for b in lines(on)]
    found = readings(on)
    assert [line["step"] for line in found] == [2, 4, 5]
    values = found[0]["layers"]["transformer.layers.0"]
    assert len(values["loss_before"]) == 2  # heads
    assert values["momentum"][0] > 0
    assert values["attention"] > 0


def test_a_run_without_a_memory_has_no_file(world, tmp_path):
    assert not (world.run(tmp_path / "x", monitor_freq=1, **LORA_ONLY) / FILE).exists()


def test_steps_without_the_memory_leave_no_line(world, tmp_path):
    run = world.run(tmp_path / "x", monitor_freq=1, max_steps=3, memory_start_step=2)
    assert [line["step"] for line in readings(run)] == [3]


def test_a_run_that_goes_on_writes_what_the_whole_one_does(world, tmp_path):
    keys = {"max_steps": 4, "ckpt_freq": 2, "monitor_freq": 1}
    whole = world.run(tmp_path / "whole", **keys)
    cut = tmp_path / "cut"
    with stopped_before(4), pytest.raises(KeyboardInterrupt):
        world.run(cut, **keys)
    assert [line["step"] for line in readings(cut)] == [1, 2, 3]
    world.run(cut, resume=True, **keys)
    assert readings(cut) == readings(whole)


def test_a_run_may_go_on_with_readings_of_another_step(world, tmp_path):
    keys = {"max_steps": 4, "ckpt_freq": 2}
    run = tmp_path / "run"
    with stopped_before(3), pytest.raises(KeyboardInterrupt):
        world.run(run, monitor_freq=0, **keys)
    world.run(run, monitor_freq=1, resume=True, **keys)
    assert [line["step"] for line in readings(run)] == [3, 4]


def log_of(world, lm, folder, **keys):
    folder.mkdir(exist_ok=True)
    metrics = Metrics(folder, load_args(world.config, {}))
    return MemoryLog(lm, folder, metrics, **{"every": 1, "last": 99, **keys}), metrics


def test_a_finding_is_said_once_and_not_again_when_a_run_goes_on(world, tmp_path, caplog):
    lm = small_hybrid()
    gate = next(iter(ttt_blocks(lm).values())).gate
    with torch.no_grad():
        gate.fill_(9.0)

    def steps(log, numbers):
        for number in numbers:
            with log.step(number), torch.no_grad():
                lm(codes_for(lm, 2, 12))

    with caplog.at_level(logging.WARNING, "finetune.memory_log"):
        log, metrics = log_of(world, lm, tmp_path / "x")
        steps(log, [1, 2, 3])
        metrics.close()
        (line,) = caplog.messages
        assert line.startswith("step 1: layer 0: the gate is saturated, 100 % of the channels")
        log, metrics = log_of(world, lm, tmp_path / "x", after_step=2)
        assert [r["step"] for r in readings(tmp_path / "x")] == [1, 2]
        steps(log, [3])
        assert len(caplog.messages) == 1
        with torch.no_grad():
            gate.zero_()  # an opened gate that closes, and one that is open: no news of the first
        steps(log, range(4, 8))
        metrics.close()
    assert len(caplog.messages) == 2
    assert "the gate is closed" in caplog.messages[1]


def test_an_error_in_a_step_leaves_nothing_of_the_monitor(world, tmp_path):
    lm = small_hybrid()
    log, metrics = log_of(world, lm, tmp_path / "x")
    with pytest.raises(RuntimeError, match="mine"), log.step(1):
        raise RuntimeError("mine")
    metrics.close()
    assert all(block.watch is None for block in ttt_blocks(lm).values())
    assert readings(tmp_path / "x") == []


def test_a_summary_is_the_mean_over_heads():
    values = {"update": [1.0, math.nan, 3.0], "momentum": [math.nan], "gate_abs": 0.5}
    found = summary(Reading(1, {"transformer.layers.3": values}))
    assert found == {"3/update": 2.0, "3/gate_abs": 0.5}


def test_several_ranks(world, tmp_path):
    """The first rank looks alone; what it sees of its rows is what one rank sees of them."""
    keys = {
        "max_steps": 3, "monitor_freq": 1, "do_ckpt": False, "gate_reg.weight": 0.5,
        "gate_reg.warmup_steps": 1, "log_freq": 1,
    }  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    train(str(world.config), {"run_dir": str(one), "batch_size": 2, **keys})
    on_ranks(2, train, str(world.config), {"run_dir": str(two), "batch_size": 1, **keys})
    for key in ("loss", "grad_norm", "gate_reg", "gate_abs_mean"):
        got, want = ([line[key] for line in lines(run)] for run in (two, one))
        assert got == pytest.approx(want, rel=1e-3), key
    assert [r["step"] for r in readings(two)] == [1, 2, 3]
    for got, want in zip(readings(two), readings(one), strict=True):
        got, want = (r["layers"]["transformer.layers.1"] for r in (got, want))
        assert got["gate_abs"] == pytest.approx(want["gate_abs"], rel=1e-3, abs=1e-6)
        assert got["loss_before"] == pytest.approx(want["loss_before"], rel=0.5)
