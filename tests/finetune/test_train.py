"""The trainer from config to metrics, on a small base and a few seconds of sound."""

import json
import math
import shutil

import pytest
import torch

from finetune import after
from finetune.args import EvalArgs
from finetune.optim import MasterAdamW
from moshi_ttt.base import find_base
from moshi_ttt.checkpoint import load
from moshi_ttt.errors import UserError
from moshi_ttt.lanes import lanes_of
from moshi_ttt.states import ttt_blocks
from tests.finetune.small_run import LORA_ONLY, checkpoint, lines, logits, weights

# -- evaluation leaves no trace --------------------------------------------------------------------

EVAL = {"do_eval": True, "eval_freq": 1, "max_steps": 3, "data__shuffle": True}


@pytest.mark.parametrize("mode", [{}, LORA_ONLY, {"gradient_checkpointing": True}],
                         ids=["memory", "lora", "checkpointing"])  # fmt: skip
def test_evaluation_during_training_changes_nothing(world, tmp_path, monkeypatch, mode):
    lanes = []
    during = after.Evaluation.during

    def watched(self, model, metrics, step):
        def held():
            return {n: x.tensors() for n, x in lanes_of(model.lm).items()}

        before, rng = held(), torch.get_rng_state()
        during(self, model, metrics, step)
        for name, tensors in held().items():
            assert all(torch.equal(t, before[name][k]) for k, t in tensors.items())
        assert torch.equal(rng, torch.get_rng_state())
        assert model.training
        assert model.lm.training
        lanes.append(len(before))

    monkeypatch.setattr(after.Evaluation, "during", watched)
    off = world.run(tmp_path / "off", **EVAL | mode | {"do_eval": False})
    assert not lanes
    panel = {"eval__librilight_data": str(world / "panel.jsonl")}
    on = world.run(tmp_path / "on", drawn=True, **EVAL | mode | panel)
    assert (on / "curves.png").is_file()
    assert lanes == [0 if mode is LORA_ONLY else 2] * 3
    want, got = weights(off), weights(on)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[k], got[k]) for k in want)
    start = world.run(tmp_path / "start", **EVAL | mode | {"do_eval": False, "max_steps": 2})
    assert not all(torch.equal(want[k], v) for k, v in weights(start).items())
    assert [line["step"] for line in lines(on, "held_out")] == [1, 2, 3]
    assert [line["step"] for line in lines(on, "librilight")] == [1, 2, 3]
    found = [line["nll_codebook0"] for line in lines(on, "held_out")]
    assert len(set(found)) == 3  # the model that is scored is the one that trains
    assert all(line["nll_text"] is None for line in lines(on, "librilight"))
    assert all(line["nll_text"] > 0 for line in lines(on, "held_out"))
    without = {"seconds", "tokens_per_second", "peak_memory"}
    for one, two in zip(lines(off), lines(on), strict=True):
        assert {k: one[k] for k in one.keys() - without} == {
            k: two[k] for k in two.keys() - without
        }


def test_without_a_frequency_held_out_data_are_scored_at_the_end(world, tmp_path):
    run = world.run(tmp_path / "run", do_eval=True, eval_freq=0)
    assert [line["step"] for line in lines(run, "held_out")] == [2]


def test_what_is_scored_is_what_is_saved(world, tmp_path, monkeypatch):
    """The inner learning rate is still warming up when these two steps end."""
    found = []
    final = after.Evaluation.final

    def watched(self, model, *args):
        found.append((logits(model.lm), logits(load(checkpoint(tmp_path / "run")).lm)))
        return final(self, model, *args)

    monkeypatch.setattr(after.Evaluation, "final", watched)
    assert EvalArgs().eval_after_training
    overrides = {"optim__pct_start": 0.9, "eval__eval_after_training": True, "max_steps": 3}
    run = world.run(tmp_path / "run", drawn=True, **overrides)
    assert torch.equal(*found[0])
    arms = {k for line in lines(run, "final") for k in line}
    assert {"base", "kept", "reset"} <= {k.split("_")[0] for k in arms}
    results = json.loads((run / "eval/results.json").read_text())
    assert results["length"]["segment_frames"] == results["training_frames"]
    assert len(results["length"]["lengths"]) + len(results["length"]["skipped"]) == 20
    (length,) = lines(run, "length")
    assert length["kept_ppl_1x"] == results["length"]["arms"]["kept"]["named"]["1x"]["mean"]
    assert (run / "eval/run_length.png").is_file()
    assert (run / "curves.png").is_file()
    assert f"report: {run}/eval/report.html" in (run / "summary.txt").read_text()


def test_a_panel_that_is_too_short_or_not_there(world, tmp_path):
    key = {"do_eval": True, "eval__librilight_data": str(world / "eval.jsonl")}
    message = r"eval\.librilight_data .* four attention windows, 6\.4 s; the longest .* 5\.0 s"
    with pytest.raises(UserError, match=message):
        world.run(tmp_path / "run", **key)
    with pytest.raises(UserError, match=r"eval\.librilight_data: nowhere"):
        world.run(tmp_path / "run", **key | {"eval__librilight_data": "nowhere"})
    assert not (tmp_path / "run").exists()


# -- the run itself --------------------------------------------------------------------------------


def test_a_held_out_recording_that_is_there_twice_is_refused_before_training(world, tmp_path):
    twice = world.folder / "twice.jsonl"
    twice.write_text((world.folder / "eval.jsonl").read_text() + "\n")
    twice.write_text(twice.read_text() * 2)
    with pytest.raises(UserError, match=r"twice.jsonl:2: data.eval_data has .*held_out.wav twice"):
        world.run(tmp_path / "run", data__eval_data=str(twice), eval__eval_after_training=True)
    assert not (tmp_path / "run").exists()


def test_an_nll_that_is_no_number_at_the_end_loses_nothing_else(world, tmp_path, monkeypatch):
    score = after.score_arm

    def broken(lm, arm, *args, **how):
        with torch.no_grad():
            if arm.name == "reset":
                next(iter(ttt_blocks(lm).values())).gate.fill_(float("nan"))
        return score(lm, arm, *args, **how)

    monkeypatch.setattr(after, "score_arm", broken)
    with pytest.raises(UserError, match=r"after training \(the rest is in .*report.html\): .*NLL"):
        world.run(tmp_path / "run", eval__eval_after_training=True)
    results = json.loads((tmp_path / "run/eval/results.json").read_text())
    means = {n: a["ranges"]["codebook0"]["0-1x"]["mean"] for n, a in results["arms"].items()}
    assert means["reset"] is None
    assert means["base"] > 0
    assert means["kept"] > 0
    assert (tmp_path / "run/checkpoints/checkpoint_000002/consolidated/ttt.json").is_file()


def test_metrics_and_what_is_said(world, tmp_path, capsys):
    run = world.run(tmp_path / "run", max_steps=4, log_freq=2, num_microbatches=2)
    found = lines(run)
    assert [line["step"] for line in found] == [2, 4]
    names = {
        "kind", "step", "seconds", "loss", "nll_text", "nll_codebook0", "nll_codebooks1_7",
        "grad_norm", "lr", "tokens_per_second", "peak_memory", "gate_mean", "gate_abs_mean",
        "gate_std", "state_norm", "state_moved", "audio_hours", "lanes_begun", "lanes_passed",
        "skipped",
    }  # fmt: skip
    for line in found:
        assert line.keys() == names
        assert all(math.isfinite(v) for k, v in line.items() if k != "kind")
        assert line["state_moved"] > 1e-3
        assert line["gate_std"] > 0
        assert line["peak_memory"] > 1e8
        assert line["tokens_per_second"] > 0
        mean = line["nll_codebook0"] + 7 * line["nll_codebooks1_7"]
        assert 0 < line["loss"] - mean / 8 < 2 * line["nll_text"]
        assert line["lanes_begun"] + line["lanes_passed"] == 4  # 2 slots of 2 rows
        assert line["skipped"] == 0
    # recordings of 50 and 28 frames in segments of 15, four lanes: steps of 60, 56, 60, 38 frames
    assert [line["lanes_begun"] for line in found] == [0, 0]
    assert found[-1]["audio_hours"] * 3600 * 12.5 == pytest.approx(214)
    said = capsys.readouterr().out
    assert "ttt_mlp in layers [0, 1]" in said
    assert "lora " in said
    assert str(run) in said
    summary = (run / "summary.txt").read_text()
    assert summary in said
    assert str(checkpoint(run)) in summary


def test_a_run_is_its_seed(world, tmp_path):
    one, two = (world.run(tmp_path / n, seed=s) for n, s in (("a", 3), ("b", 3)))
    other = world.run(tmp_path / "c", seed=4)
    want = weights(one)
    assert all(torch.equal(v, want[k]) for k, v in weights(two).items())
    assert not all(torch.equal(v, want[k]) for k, v in weights(other).items())


def test_gradient_checkpointing_trains_the_same(world, tmp_path):
    found = [
        weights(world.run(tmp_path / str(on), gradient_checkpointing=on)) for on in (False, True)
    ]
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        assert (found[1][key] - value).abs().max() < 1e-5, key


def test_a_rate_that_is_too_high_saves_nothing(world, tmp_path, monkeypatch):
    """Step 1 is fine, its update is not: the next losses say so, or the check before saving."""
    wild = {"optim__lr": 1e30, "optim__schedule": "cosine", "ckpt_freq": 2}
    message = (
        "step 1: weights are not finite|step 3: loss is nan on .*2 steps in a row were skipped"
    )
    with pytest.raises(UserError, match=message):
        world.run(tmp_path / "a", max_steps=9, max_skipped_steps=2, **wild | {"ckpt_freq": 0})
    with pytest.raises(UserError, match=r"step 1, held_out: .*held_out\.wav.*: lower"):
        world.run(tmp_path / "b", max_steps=2, **wild | {"do_eval": True, "eval_freq": 1})
    real_step = MasterAdamW.step

    def overflows(self, max_norm):
        norm = real_step(self, max_norm)
        self.pairs[0][0].data[0] = math.inf
        return norm

    monkeypatch.setattr(MasterAdamW, "step", overflows)
    with pytest.raises(UserError, match="step 1: weights are not finite, not saved"):
        world.run(tmp_path / "c", max_steps=1)
    there = [p.name for p in (tmp_path / "a" / "checkpoints").iterdir()]
    assert there == ["checkpoint_000001"]  # finite, if of no use
    for name in "bc":
        assert not list((tmp_path / name / "checkpoints").iterdir())
        assert not (tmp_path / name / "summary.txt").exists()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.safetensors", "model.safetensors.* cannot be read"),
        ("mimi.safetensors", "Mimi .*mimi.safetensors.* cannot be read"),
        ("tokenizer.model", "tokenizer .*tokenizer.model.* cannot be read"),
        ("config.json", "config.json is not JSON"),
        ("mimi_config.json", "Mimi's config is not JSON"),
    ],
)
def test_a_broken_file_of_the_base_is_named(world, tmp_path, file, message):
    shutil.copytree(world.base, tmp_path / "base")
    (tmp_path / "base" / file).write_text("junk")
    with pytest.raises(UserError, match=message):
        world.run(tmp_path / "run", moshi_paths__hf_repo_id=str(tmp_path / "base"))
    assert not (tmp_path / "run").exists()


def test_a_base_that_describes_no_moshi(world, tmp_path):
    shutil.copytree(world.base, tmp_path / "base")
    config = json.loads((world.base / "config.json").read_text())
    key = {"moshi_paths__hf_repo_id": str(tmp_path / "base")}
    for change in ({"frobnicate": 1}, {"dim": "wide"}):
        (tmp_path / "base" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match="does not describe a Moshi"):
            world.run(tmp_path / "run", **key)
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"context": None}))
    with pytest.raises(UserError, match="no window"):
        world.run(tmp_path / "run", **key, do_eval=True)
    world.run(tmp_path / "run", **key)  # needs none where nothing is scored
    assert find_base(tmp_path / "base").lm_config["context"] is None
