"""Several ranks: the losses of one, states in float32, saved on some and gone on with others."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from finetune.load_args import load_args
from finetune.world import World, rows_of
from moshi_ttt.checkpoint import load
from moshi_ttt.errors import UserError
from moshi_ttt.memory import MEMORIES
from tests.finetune.ranks import on_ranks, steps, train
from tests.finetune.small_run import ROOT, checkpoint, lines
from tests.finetune.test_loss import batch, segment
from tests.small import small_base

RUN = {
    "max_steps": 7, "carry_kv": True, "state_reset_interval": 3, "log_freq": 1, "do_ckpt": False,
    "data.shuffle": True, "optim.lr": 1e-3, "ttt.state_passing": True,
}  # fmt: skip
SHAPES = {1: {"batch_size": 2, "num_microbatches": 2}, 2: {"batch_size": 2}, 4: {"batch_size": 1}}
"""Ranks -> four lanes, however they lie."""


@pytest.fixture(scope="module")
def exact(tmp_path_factory, world):
    """A base without float32 inside a float64 forward: moshi's RoPE would be."""
    folder = small_base(tmp_path_factory.mktemp("exact") / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"norm": "rms_norm", "positional_embedding": "none"})
    )
    return folder


def run(world, folder, ranks, double=False, **keys):
    keys = {"run_dir": str(folder), **RUN, **SHAPES[ranks], **keys}
    if ranks == 1:
        train(str(world.config), keys, double)
    else:
        on_ranks(ranks, train, str(world.config), keys, double)
    return [line["loss"] for line in lines(folder)]


def test_more_ranks_have_the_losses_of_one_in_float64(world, exact, tmp_path):
    """7 steps, two resets; the four ranks recompute what they need for the backward."""
    keys = {"moshi_paths.hf_repo_id": str(exact), "gradient_checkpointing": False}
    want = run(world, tmp_path / "1", 1, True, **keys)
    assert len(want) == 7
    assert want[-1] < want[0]
    for ranks in (2, 4):
        got = run(world, tmp_path / str(ranks), ranks, True, **keys)
        assert got == pytest.approx(want, rel=1e-9)
        keys["gradient_checkpointing"] = True


@pytest.mark.parametrize("family", [name for name in MEMORIES if name != "ttt_mlp"])
def test_two_ranks_have_the_losses_of_two_micro_batches_of_one(world, exact, tmp_path, family):
    """Every memory, states passed on: 1 rank x 2 micro-batches, 2 ranks x 1."""
    keys = {"moshi_paths.hf_repo_id": str(exact), "ttt.memory": family, "max_steps": 5}
    want, got = (run(world, tmp_path / str(ranks), ranks, True, **keys) for ranks in (1, 2))
    assert want[-1] < want[0]
    assert got == pytest.approx(want, rel=1e-9)


def test_more_ranks_have_the_losses_of_one_in_float32(world, tmp_path):
    """Through two linked segments a step; held-out recordings are shared out, their means agree."""
    keys = {"tbptt_segments": 2, "max_steps": 4, "do_eval": True, "eval_freq": 4}
    want = run(world, tmp_path / "1", 1, **keys)
    got = run(world, tmp_path / "4", 4, **keys)
    assert got[0] == pytest.approx(want[0], rel=1e-6)
    assert got[-1] == pytest.approx(want[-1], rel=1e-3)
    one, other = (lines(tmp_path / n, "held_out")[0] for n in "14")
    for kind in ("nll_text", "nll_codebook0", "nll_codebooks1_7"):
        assert other[kind] == pytest.approx(one[kind], rel=1e-3)


@pytest.fixture
def args(world):
    return load_args(world.config, {"optim.lr": 1e-3, "optim.ttt_lr": 1e-3})


def parts(count, ranks):
    """So many steps, a row for each of the ranks; only the first row has text."""
    found = []
    for step in range(count):
        rows = [batch(segment(2 * step + r, text=r == 0)) for r in range(ranks)]
        begins = torch.tensor([step == 0])
        found.append([replace(row, begins=begins) for row in rows])
    return found


@pytest.mark.parametrize(
    ("family", "projection"),
    [
        *((family, "own") for family in MEMORIES),
        ("ttt_mlp", "shared"),
        *(
            pytest.param(family, "shared", marks=pytest.mark.slow)
            for family in MEMORIES
            if family != "ttt_mlp"
        ),
    ],
)
def test_fast_weights_stay_float32_in_mixed_precision(args, family, projection):
    """bfloat16 forward and frozen weights; masters, W0, gate and states are float32."""
    config = {"memory": family, "projection": projection}
    batches = parts(2, 2)
    together = [[batch_of(step)] for step in batches]
    found = on_ranks(2, partial(steps, **config), batches, args, torch.bfloat16)
    (one,) = on_ranks(1, partial(steps, **config), together, args, torch.bfloat16)
    for rank in found:
        assert rank["masters"] == {"torch.float32"}
        fast = {k: v for k, v in rank["dtypes"].items() if ".fast." in k or k.endswith(".conv")}
        assert set(v for k, v in fast.items() if not k.endswith("pos")) == {"torch.float32"}
        owned = "torch.float32" if projection == "own" else None
        assert rank["seen"] == {"projection": owned, "attention": "torch.bfloat16"}
        assert rank["loss"] == found[0]["loss"]
    assert found[0]["loss"] == pytest.approx(one["loss"], rel=2e-2)
    for name, w0 in found[0]["w0"].items():  # two steps at 1e-3: below bfloat16's grid at 0.3
        assert w0 == found[1]["w0"][name]
        start = torch.tensor(w0)
        assert (start - start.bfloat16().float()).abs().max() > 1e-5


def batch_of(rows):
    """The rows of all ranks as one batch."""
    first = rows[0]
    return replace(
        first,
        sequence=torch.cat([b.sequence for b in rows]),
        text_mask=torch.cat([b.text_mask for b in rows]),
        begins=torch.cat([b.begins for b in rows]),
        names=tuple(n for b in rows for n in b.names),
        starts=tuple(n for b in rows for n in b.starts),
        frames=tuple(n for b in rows for n in b.frames),
    )


def test_a_rank_without_text_does_not_hang_and_a_bad_number_is_everyones(args):
    """The second rank never has text; its third step's loss is no number: no rank updates."""
    batches = parts(4, 2)
    for row in (row for step in batches for row in step):
        row.sequence[:, 0].clamp_(max=62)
    batches[2][1].sequence[0, 0, 5] = 63
    found = on_ranks(2, steps, batches, args, torch.float32, 63)
    assert found[0]["loss"][:2] == found[1]["loss"][:2]
    assert math.isfinite(found[0]["loss"][1])
    for rank in found:
        assert [why and why.split(" from")[0] for why in rank["bad"]] == [
            None, None, "loss is nan on recording5.wav", None,
        ]  # fmt: skip


def test_a_rank_with_nothing_to_score_does_not_hang_the_next_step(world, tmp_path):
    """One held-out recording for two ranks, scored after every step."""
    keys = {"max_steps": 3, "do_eval": True, "eval_freq": 1, "eval.eval_after_training": True}
    want = run(world, tmp_path / "1", 1, **keys)
    assert run(world, tmp_path / "2", 2, **keys) == pytest.approx(want, rel=1e-5)
    one, two = (lines(tmp_path / n, "held_out") for n in "12")
    assert [x["nll_codebook0"] for x in two] == pytest.approx(
        [x["nll_codebook0"] for x in one], rel=1e-4
    )
    one, two = (json.loads((tmp_path / n / "eval/results.json").read_text()) for n in "12")
    assert one["items"] == two["items"]
    for name, arm in one["length"]["arms"].items():
        found = two["length"]["arms"][name]["named"]["1x"]["mean"]
        assert found == pytest.approx(arm["named"]["1x"]["mean"], rel=1e-4)


def test_a_run_saved_on_two_ranks_goes_on_with_one_and_four(world, tmp_path):
    keys = {"max_steps": 6, "do_ckpt": True, "ckpt_freq": 3, "state_reset_interval": 0}
    want = run(world, tmp_path / "2", 2, **keys)
    shutil.rmtree(tmp_path / "2" / "checkpoints" / "checkpoint_000006")
    (tmp_path / "2" / "summary.txt").unlink()
    for ranks in (1, 4, 2):
        folder = tmp_path / f"on{ranks}"
        shutil.copytree(tmp_path / "2", folder)
        got = run(world, folder, ranks, resume=True, **keys)
        assert got[:3] == want[:3]  # still there
        assert got[3:] == pytest.approx(want[3:], rel=1e-5 if ranks != 2 else 0)
        assert [line["lanes_passed"] for line in lines(folder)][3] > 0
    with pytest.raises(UserError, match=r"4 lanes .* cannot be spread evenly over 3 ranks"):
        rows_of(load_args(world.config), World(0, 3), 4)


@pytest.mark.parametrize(
    "keys",
    [{}, {"lora.enable": False, "full_finetuning": True}, {"lora.ft_embed": True}],
    ids=["adapters", "full", "embeddings"],
)
def test_what_two_ranks_save_is_what_one_saves(world, exact, tmp_path, keys):
    """Whole, loaded by any one process; in float64, as Adam makes noise of tiny gradients."""
    keys = {"max_steps": 2, "do_ckpt": True, "moshi_paths.hf_repo_id": str(exact), **keys}
    run(world, tmp_path / "1", 1, True, **keys)
    run(world, tmp_path / "2", 2, True, **keys)
    one, two = (load(checkpoint(tmp_path / n)) for n in "12")
    assert {**one.about, "base": None} == {**two.about, "base": None}
    want, got = one.lm.state_dict(), two.lm.state_dict()
    assert want.keys() == got.keys()
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype
        assert torch.allclose(got[key], tensor, atol=1e-9), key


def test_lanes_are_kept_on_any_number_of_ranks(world):
    args = load_args(world.config, {"batch_size": 4, "num_microbatches": 2})
    assert rows_of(args, World(0, 2)) == (4, 2, 2)
    assert rows_of(args, World(0, 1), 16) == (4, 4, 1)
    assert rows_of(args, World(0, 8), 16) == (2, 1, 8)
    assert rows_of(args, World(0, 2), 6) == (1, 3, 2)


def test_a_rank_that_dies_ends_the_job(world, tmp_path):
    """Through torchrun, as a user has it: killed from outside, in the middle of training."""
    env = os.environ | {"NO_TORCH_COMPILE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    typed = ["--standalone", "--nproc-per-node", "2", "-m", "finetune.train", world.config]
    typed += ["--run_dir", tmp_path / "run", "--max_steps", 100000, "--batch_size", 1]
    typed += ["--do_ckpt", "false", "--log_freq", 1]
    job = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *map(str, typed)],
        cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        metrics, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 60
        while not (metrics.exists() and metrics.read_text()) and time.monotonic() < end:
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.1)
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(job.pid)], capture_output=True, text=True, check=True
        )
        os.kill(max(map(int, children.stdout.split())), signal.SIGKILL)
        said, _ = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode != 0
    assert "SIGKILL" in said
    assert "local_rank: 1" in said
