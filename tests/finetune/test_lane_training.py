"""The trainer and its lanes: many steps, the memory's schedule, what can be switched off."""

import gc
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

from finetune.load_args import load_args
from finetune.loss import LossWeights, TeacherForced
from finetune.optim import Group, MasterAdamW
from finetune.step import train_step
from moshi_ttt.errors import UserError
from moshi_ttt.hybrid import carry_kv
from moshi_ttt.lanes import attach_lanes, lanes_of
from tests.finetune.small_run import LORA_ONLY, MEMORY_ONLY, lines, weights
from tests.finetune.test_loss import batch, segment
from tests.small import small_hybrid


def held() -> int:
    """Bytes of all tensors that are alive."""
    gc.collect()
    # by type(): to ask a lazy module of torch's for its class warns
    alive = [x.untyped_storage() for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in alive}.values())


@pytest.mark.parametrize(
    ("steps", "linked"), [(80, 1), (40, 2), pytest.param(1000, 1, marks=pytest.mark.slow)]
)
def test_many_steps_take_no_more_memory_than_the_first_ones(steps, linked):
    """States passed, never reset: no graph hangs on, and no second backward through one."""
    lm = small_hybrid(lm={"num_layers": 1, "depformer_num_layers": 1, "context": 6})
    carry_kv(lm)
    attach_lanes(lm, 1)
    for p in lm.parameters():
        p.requires_grad_(False)
    block = lm.transformer.layers[0].seq_modeling_block.requires_grad_(True)
    optimizer = MasterAdamW([Group("memory", 1e-4, 0.0, list(block.parameters()))], (0.9, 0.95))
    part = replace(batch(segment(0, 5), frames=5), begins=torch.tensor([False]))
    seen = []
    for step in range(steps):
        result = train_step(
            TeacherForced(lm), [[part]] * linked, optimizer, LossWeights(), max_norm=1.0
        )
        assert result.bad is None
        if step in (9, steps - 1):
            seen.append(held())
    assert seen[1] <= seen[0]
    pos = lanes_of(lm)["transformer.layers.0.seq_modeling_block"].values[0].fast.pos
    assert pos.tolist() == [5 * steps * linked]


# -- the memory's schedule -------------------------------------------------------------------------


def memory(found):
    return {k: v for k, v in found.items() if ".seq_modeling_block." in k}


def test_before_its_start_the_memory_neither_reads_nor_writes(world, tmp_path):
    """Until then the run is LoRA alone, to the bit, and the memory's weights stay as they were."""
    keys = {"max_steps": 3, "log_freq": 1}
    late = world.run(tmp_path / "late", memory_start_step=3, **keys | {"max_steps": 4})
    alone = world.run(tmp_path / "alone", **keys, **LORA_ONLY, carry_kv=False)
    at_once = world.run(tmp_path / "at_once", **keys)
    assert lines(late)[0]["loss"] == lines(at_once)[0]["loss"]  # gates start at 0
    assert lines(late)[1]["loss"] != lines(at_once)[1]["loss"]
    assert alone
    assert all(math.isnan(x["state_norm"] or math.nan) for x in lines(late)[:3])
    assert [x["gate_abs_mean"] == 0 for x in lines(late)] == [True, True, True, False]
    later = world.run(tmp_path / "later", memory_start_step=2, **keys)
    assert [x["gate_abs_mean"] == 0 for x in lines(later)] == [True, True, False]
    assert memory(weights(later)).keys() == memory(weights(late)).keys()


def test_writing_off_trains_slow_weights_only(world, tmp_path):
    """Its fast weights are W0 as it is now, also in a lane that began with an earlier one."""
    run = world.run(tmp_path / "run", ttt__writing="off", max_steps=3, log_freq=1)
    assert all(x["state_moved"] == 0 for x in lines(run))
    assert lines(run)[-1]["gate_abs_mean"] > 0


def test_write_every_is_part_of_the_checkpoint(world, tmp_path):
    run = world.run(tmp_path / "run", ttt__write_every=2, max_steps=2, log_freq=1)
    assert (run / "config.yaml").read_text().count("write_every: 2") == 1
    other = world.run(tmp_path / "other", max_steps=2, log_freq=1)
    assert lines(run)[0]["state_moved"] != lines(other)[0]["state_moved"]


# -- passing on and off ----------------------------------------------------------------------------


def test_passing_changes_what_the_second_segment_sees(world, tmp_path):
    """With it recordings are read from end to end, without it each segment stands alone."""
    keys = {
        "max_steps": 3,
        "log_freq": 1,
        "batch_size": 1,
        "optim__lr": 1e-9,
        "optim__gate_lr": 0.3,
    }
    on = world.run(tmp_path / "on", **keys)
    off = world.run(tmp_path / "off", ttt__state_passing=False, **keys)
    assert [x["lanes_passed"] for x in lines(on)] == [0, 1, 1]
    assert [x["lanes_passed"] for x in lines(off)] == [0, 0, 0]
    assert lines(on)[0]["loss"] == lines(off)[0]["loss"]
    assert lines(on)[2]["loss"] != lines(off)[2]["loss"]
    assert lines(on)[2]["state_moved"] != lines(off)[2]["state_moved"]
    kv = world.run(tmp_path / "kv", ttt__state_passing=False, carry_kv=True, **keys)
    assert lines(kv)[2]["loss"] not in (lines(on)[2]["loss"], lines(off)[2]["loss"])
    assert [x["lanes_passed"] for x in lines(kv)] == [0, 1, 1]


def test_lanes_are_reset_at_their_interval_and_it_is_logged(world, tmp_path):
    keys = {"max_steps": 7, "log_freq": 1, "batch_size": 1, "state_reset_interval": 3}
    run = world.run(tmp_path / "run", **keys)
    assert [(x["step"], x["reset"]) for x in lines(run, "lanes")] == [(4, 1), (7, 1)]
    # 50 frames in segments of 15: begins in steps 1 and 5; 28 in two
    assert [x["lanes_passed"] for x in lines(run)] == [0, 1, 1, 0, 0, 1, 0]
    never = world.run(tmp_path / "never", **keys | {"state_reset_interval": 0})
    assert not lines(never, "lanes")
    assert lines(never)[2]["loss"] == lines(run)[2]["loss"]
    assert lines(never)[3]["loss"] != lines(run)[3]["loss"]


def test_keys_and_values_take_what_is_said(world, tmp_path, capsys):
    world.run(tmp_path / "run", carry_kv=True, max_steps=1, num_microbatches=3)
    # 2 layers, k and v, 19 frames, width 32, float32, 6 lanes
    said = f"keys and values of 6 lanes: {2 * 2 * 19 * 32 * 4 * 6 / 2**20:.1f} MiB"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("mode", [LORA_ONLY, MEMORY_ONLY], ids=["lora", "memory"])
def test_keys_and_values_go_with_any_training(world, tmp_path, mode):
    run = world.run(tmp_path / "run", carry_kv=True, max_steps=3, log_freq=1, **mode)
    assert [x["lanes_passed"] for x in lines(run)] == [0, 2, 1]


def test_a_base_without_a_window_has_no_keys_to_carry(world, tmp_path):
    shutil.copytree(world.base, tmp_path / "base")
    config = json.loads((world.base / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"context": None}))
    with pytest.raises(UserError, match=r"carry_kv: layer 0: its attention has no window"):
        world.run(tmp_path / "run", carry_kv=True, moshi_paths__hf_repo_id=str(tmp_path / "base"))
    assert not (tmp_path / "run").exists()


# -- what a person types ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "passing"),
    [
        ({}, True),
        ({"state_passing": True}, True),
        ({"state_passing": "false"}, False),
        ({"no_state_passing": True}, False),
        ({"_state_passing": False}, False),  # what fire makes of it
        ({"ttt.state_passing": "off"}, False),
    ],
)
def test_ways_to_say_whether_states_are_passed(world, overrides, passing):
    args = load_args(world.config, overrides)
    assert args.ttt.state_passing is args.passes_states is args.whole_recordings is passing
    assert load_args(world.config, overrides | {"carry_kv": True}).whole_recordings


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"no_state_passing": "maybe"}, "--no_state_passing takes no value, got 'maybe'"),
        ({"ttt": "none", "state_passing": True}, "--state_passing: there is no memory"),
        ({"state_passing": 7}, r"state_passing must be true or false, got 7"),
        ({"tbptt_segments": 0}, "tbptt_segments must be at least 1, got 0"),
        ({"state_reset_interval": -1}, "state_reset_interval must be at least 0, got -1"),
        ({"memory_start_step": -1}, "memory_start_step must be at least 0, got -1"),
        ({"max_skipped_steps": 0}, "max_skipped_steps must be at least 1, got 0"),
        ({"memory_start_step": 2}, "memory_start_step is 2, but max_steps 2: no step would use"),
        (
            {"memory_start_step": 1, "lora.enable": False},
            "memory_start_step is 1, but before it there is nothing else to train",
        ),
    ],
)
def test_mistakes_about_lanes_are_one_line(world, overrides, message):
    with pytest.raises(UserError, match=message):
        load_args(world.config, overrides)


@pytest.mark.parametrize("off", ["off", False, "false"])
def test_a_memory_that_is_off_is_none(world, off):
    assert load_args(world.config, {"ttt.memory": off}).ttt is None
    assert not load_args(world.config, {"ttt.memory": off}).whole_recordings
