import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from eval.arms import evaluate_arms, score_arms
from eval.perplexity import score
from eval.scores import Item, evaluate
from moshi_ttt.states import attach_ttt_states, save_ttt_states
from tests.eval.tiny_lm import CONTEXT, make_codes, make_lm


def make_items(count=3, frames=5 * CONTEXT):
    return [
        Item(f"r{i}", f"s{i}", make_codes(frames + i, seed=i)[0], text_known=i > 0)
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def lm():
    torch.set_num_threads(1)  # a module's fixtures come before the one of conftest.py
    return make_lm()


@pytest.fixture(scope="module")
def results(lm):
    return evaluate_arms(lm, make_lm(None), make_items(), training_frames=30, frames_per_call=7)


def test_the_numbers_are_those_of_score(lm, results):
    item = make_items()[1]
    nll = score(lm, item.codes[None]).values[0].numpy()
    window = slice(CONTEXT, 4 * CONTEXT)
    found = results["arms"]["kept"]["recordings"]["r1"]
    assert found["codebook0"]["1x-4x"] == pytest.approx(nll[1, window].mean(), abs=1e-8)
    assert found["codebooks1_7"]["1x-4x"] == pytest.approx(nll[2:, window].mean(), abs=1e-8)
    assert found["text"]["1x-4x"] == pytest.approx(nll[0, window].mean(), abs=1e-8)
    bins = results["bin_frames"]
    assert bins == CONTEXT // 2
    first = [score(lm, i.codes[None]).values[0, 1, :bins].mean() for i in make_items()]
    mean = results["arms"]["kept"]["curve"]["codebook0"]["mean"]
    assert mean[0] == pytest.approx(np.mean(first), abs=1e-8)


def test_text_without_transcript_is_nan_with_a_reason(results):
    arm = results["arms"]["kept"]
    assert math.isnan(arm["recordings"]["r0"]["text"]["1x-4x"])
    assert arm["ranges"]["text"]["1x-4x"]["n"] == 2
    without = evaluate_arms(make_lm(None), None, [make_items()[0]])
    assert without["arms"]["trained"]["ranges"]["text"]["1x-4x"]["reason"] == "no transcript"


def test_a_recording_too_short_is_nan_with_a_reason(lm):
    found = evaluate_arms(lm, None, make_items(frames=3 * CONTEXT))
    scalar = found["arms"]["kept"]["ranges"]["codebook0"]["1x-4x"]
    assert math.isnan(scalar["mean"])
    assert scalar["reason"] == "no recording reaches frame 32: the longest has 26"
    assert math.isfinite(found["arms"]["kept"]["ranges"]["codebook0"]["1x-2x"]["mean"])


def test_differences_are_paired(results):
    by_arm = {d["minus"]: d for d in results["differences"]}
    assert set(by_arm) == {"base", "reset", "off"}
    kept, reset = (results["arms"][a]["recordings"] for a in ("kept", "reset"))
    wanted = np.mean([kept[r]["codebook0"]["1x-4x"] - reset[r]["codebook0"]["1x-4x"] for r in kept])
    found = by_arm["reset"]["ranges"]["codebook0"]["1x-4x"]
    assert found["mean"] == pytest.approx(wanted, abs=1e-12)
    assert found["low"] <= found["mean"] <= found["high"]
    first = by_arm["reset"]["ranges"]["codebook0"]["0-1x"]
    assert (first["mean"], first["low"], first["high"]) == pytest.approx((0, 0, 0), abs=1e-12)


def test_the_order_of_items_changes_no_number(lm):
    items = make_items()
    one = score_arms(lm, items, CONTEXT)
    other = score_arms(lm, items[::-1], CONTEXT)
    for arm, scores in one.items():
        for kind, rows in scores.nll.items():
            for row, same in zip(rows, other[arm].nll[kind][::-1], strict=True):
                np.testing.assert_array_equal(row, same)


def test_a_model_in_training_is_left_as_it_was(lm):
    training = make_lm()
    attach_ttt_states(training, 2)
    training.train()
    training(make_codes(9, batch=2, holes=False))
    rng, before = torch.get_rng_state(), save_ttt_states(training)
    weights = [p.clone() for p in training.parameters()]
    evaluate_arms(training, None, make_items(1))
    assert training.training
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(weights, training.parameters(), strict=True))
    after = save_ttt_states(training)
    for name, saved in before.items():
        assert saved["lanes"]["fast.pos"].tolist() == [9, 9]
        for key, tensor in saved["lanes"].items():
            assert torch.equal(tensor, after[name]["lanes"][key]), key


def test_a_model_without_memory_has_one_arm():
    stock = make_lm(None)
    found = evaluate_arms(stock, stock, make_items(1))
    assert list(found["arms"]) == ["base", "trained"]
    assert found["differences"][0]["minus"] == "base"
    assert found["differences"][0]["ranges"]["codebook0"]["1x-4x"]["mean"] == 0.0


def test_state_norms_and_times(results):
    arm = results["arms"]["kept"]
    assert set(arm["ms_per_frame"]) == {"p50", "p95", "p99"}
    assert all(value > 0.01 for value in arm["state_moved"]["r0"].values())
    assert all(value == 0 for value in results["arms"]["off"]["state_moved"]["r0"].values())
    assert results["arms"]["base"]["state_norm"]["r0"] == {}


def test_wrong_items(lm):
    with pytest.raises(ValueError, match="of different names"):
        evaluate_arms(lm, None, [])
    twice = [replace(item, name="same") for item in make_items(2, frames=CONTEXT)]
    with pytest.raises(ValueError, match="of different names"):
        evaluate_arms(lm, None, twice)


def test_a_broken_model_is_named_with_its_item():
    broken = make_lm(None)
    with torch.no_grad():
        broken.text_linear.weight[:] = float("nan")
    with pytest.raises(FloatingPointError, match="r0: the NLL of row 0, codebook 0"):
        evaluate(broken, make_items(1))
