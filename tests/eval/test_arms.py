import json
import math
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import eval.arms
from eval.arms import (
    BASE,
    KEPT,
    OFF,
    RESET,
    SHUFFLED,
    TRAINED,
    WIDE,
    Arm,
    arms_of,
    lenders,
    open_arms,
    score_arm,
)
from eval.generalisation import generalise
from eval.keep import Keep
from eval.perplexity import score
from eval.scores import Item, evaluate
from eval.summary import summarise
from moshi_ttt.base import find_base, load_base
from moshi_ttt.checkpoint import save_checkpoint
from moshi_ttt.config import TTTConfig
from moshi_ttt.hybrid import splice
from moshi_ttt.states import attach_ttt_states, save_ttt_states
from moshi_ttt.tiny import build_base
from tests.eval.tiny_lm import CONTEXT, make_codes, make_lm


def make_items(count=3, frames=5 * CONTEXT):
    return [
        Item(f"r{i}", f"s{i}", make_codes(frames + i, seed=i)[0], text_known=i > 0)
        for i in range(count)
    ]


def compare(models, items, **how):
    """Summary of `{arm: model}`."""
    scores = {arm: score_arm(lm, arm, items, CONTEXT, **how) for arm, lm in models.items()}
    return summarise(scores, items, CONTEXT, training_frames=30)


@pytest.fixture(scope="module")
def lm():
    torch.set_num_threads(1)  # a module's fixtures come before the one of conftest.py
    return make_lm()


@pytest.fixture(scope="module")
def results(lm):
    models = {BASE: make_lm(None), KEPT: lm, RESET: lm, SHUFFLED: lm, OFF: lm}
    return compare(models, make_items(), frames_per_call=7)


def test_the_numbers_are_those_of_score(lm, results):
    item = make_items()[1]
    nll = score(lm, [item.codes])[0].values.numpy()
    window = slice(CONTEXT, 4 * CONTEXT)
    found = results["arms"]["kept"]["recordings"]["r1"]
    assert found["codebook0"]["1x-4x"] == pytest.approx(nll[1, window].mean(), abs=1e-8)
    assert found["codebooks1_7"]["1x-4x"] == pytest.approx(nll[2:, window].mean(), abs=1e-8)
    assert found["text"]["1x-4x"] == pytest.approx(nll[0, window].mean(), abs=1e-8)
    bins = results["bin_frames"]
    assert bins == CONTEXT // 2
    first = [score(lm, [i.codes])[0].values[1, :bins].mean() for i in make_items()]
    mean = results["arms"]["kept"]["curve"]["codebook0"]["mean"]
    assert mean[0] == pytest.approx(np.mean(first), abs=1e-8)


def test_text_without_transcript_is_nan_with_a_reason(results):
    arm = results["arms"]["kept"]
    assert math.isnan(arm["recordings"]["r0"]["text"]["1x-4x"])
    assert arm["ranges"]["text"]["1x-4x"]["n"] == 2
    without = compare({TRAINED: make_lm(None)}, [make_items()[0]])
    assert without["arms"]["trained"]["ranges"]["text"]["1x-4x"]["reason"] == "no transcript"


def test_a_recording_too_short_is_nan_with_a_reason(lm):
    found = compare({KEPT: lm}, make_items(frames=3 * CONTEXT))
    scalar = found["arms"]["kept"]["ranges"]["codebook0"]["1x-4x"]
    assert math.isnan(scalar["mean"])
    assert scalar["reason"] == "no recording reaches frame 32: the longest has 26"
    assert math.isfinite(found["arms"]["kept"]["ranges"]["codebook0"]["1x-2x"]["mean"])


def test_differences_are_paired(results):
    by_arm = {(d["arm"], d["minus"]): d for d in results["differences"]}
    assert set(by_arm) == {
        ("kept", "base"), ("kept", "reset"), ("kept", "shuffled"), ("kept", "off"),
        ("shuffled", "reset"),
    }  # fmt: skip
    kept, reset = (results["arms"][a]["recordings"] for a in ("kept", "reset"))
    wanted = np.mean([kept[r]["codebook0"]["1x-4x"] - reset[r]["codebook0"]["1x-4x"] for r in kept])
    found = by_arm["kept", "reset"]["ranges"]["codebook0"]["1x-4x"]
    assert found["mean"] == pytest.approx(wanted, abs=1e-12)
    assert found["low"] <= found["mean"] <= found["high"]
    first = by_arm["kept", "reset"]["ranges"]["codebook0"]["0-1x"]
    assert (first["mean"], first["low"], first["high"]) == pytest.approx((0, 0, 0), abs=1e-12)


def test_the_order_of_items_changes_no_number(lm):
    items = make_items()
    for arm in (KEPT, RESET, SHUFFLED, OFF):
        one, other = (score_arm(lm, arm, some, CONTEXT) for some in (items, items[::-1]))
        for kind, rows in one.nll.items():
            for row, same in zip(rows, other.nll[kind][::-1], strict=True):
                np.testing.assert_array_equal(row, same)


def test_a_history_is_lent_by_the_next_longer_recording_of_another_speaker():
    def item(name, speaker, frames):
        return Item(name, speaker, torch.zeros(17, frames, dtype=torch.int64))

    a, b, c, d = item("a", "1", 30), item("b", "1", 40), item("c", "2", 50), item("d", "3", 90)
    assert [i.name for i in lenders([a, b, c, d])] == ["c", "c", "d", "c"]
    assert [i.name for i in lenders([d, b, a, c])] == ["c", "c", "c", "d"]
    same = [item("x", "1", 30), item("y", "2", 30), item("z", "3", 30)]
    found = lenders(same)
    assert all(mine.speaker != other.speaker for mine, other in zip(same, found, strict=True))
    assert len({other.name for other in found}) == 3  # each lends once
    assert lenders([a, b])[0] is a  # nobody else speaks


def test_shuffled_history_is_another_recordings_and_ends_with_it(lm):
    short, long = make_items(2, frames=3 * CONTEXT)
    long = replace(long, codes=make_codes(6 * CONTEXT, seed=9)[0])
    scores = score_arm(lm, SHUFFLED, [short, long], CONTEXT, frames_per_call=5)
    assert [len(x) for x in scores.nll["codebook0"]] == [3 * CONTEXT, 4 * CONTEXT]
    assert scores.missing == "no other recording is long enough to lend a history"
    kept = score_arm(lm, KEPT, [short, long], CONTEXT)
    reset = score_arm(lm, RESET, [short, long], CONTEXT)
    first = slice(0, CONTEXT)
    for arm in (kept, reset):
        for one, other in zip(scores.nll["codebook0"], arm.nll["codebook0"], strict=True):
            np.testing.assert_allclose(one[first], other[first], atol=1e-8)
            gap = np.abs(one[CONTEXT:] - other[CONTEXT : len(one)])
            assert gap.max() > 1e-3
    found = summarise({KEPT: kept, SHUFFLED: scores}, [short, long], CONTEXT)
    beyond = found["arms"]["shuffled"]["ranges"]["codebook0"]["4x-end"]
    assert (beyond["n"], beyond["reason"]) == (0, scores.missing)
    by_arm = {d["minus"]: d for d in found["differences"]}
    assert math.isnan(by_arm["shuffled"]["ranges"]["codebook0"]["4x-end"]["mean"])


def test_a_model_in_training_is_left_as_it_was(lm):
    training = make_lm()
    attach_ttt_states(training, 2)
    training.train()
    training(make_codes(9, batch=2, holes=False))
    rng, before = torch.get_rng_state(), save_ttt_states(training)
    weights = [p.clone() for p in training.parameters()]
    compare({arm: training for arm in (KEPT, RESET, SHUFFLED, OFF)}, make_items(2), rows=2)
    assert training.training
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(weights, training.parameters(), strict=True))
    after = save_ttt_states(training)
    for name, saved in before.items():
        assert saved["lanes"]["fast.pos"].tolist() == [9, 9]
        for key, tensor in saved["lanes"].items():
            assert torch.equal(tensor, after[name]["lanes"][key]), key


def test_a_memory_that_is_never_written_has_no_modes():
    written = TTTConfig(layers="all")
    assert [arm.name for arm in arms_of(None, written)] == ["kept", "reset", "shuffled", "off"]
    (alone,) = arms_of(Path("x"), TTTConfig(layers="all", writing=False))
    assert (alone.name, alone.letter, alone.checkpoint) == ("trained", "d", Path("x"))
    assert [arm.label for arm in arms_of(None, None)] == ["trained model (no memory)"]


def test_a_model_without_memory_has_one_arm():
    stock = make_lm(None)
    found = compare({BASE: stock, TRAINED: stock}, make_items(1))
    assert found["differences"][0]["minus"] == "base"
    assert found["differences"][0]["ranges"]["codebook0"]["1x-4x"]["mean"] == 0.0


def test_state_norms_and_times(results):
    arm = results["arms"]["kept"]
    assert set(arm["ms_per_frame"]) == {"p50", "p95", "p99"}
    assert all(value > 0.01 for value in arm["state_moved"]["r0"].values())
    assert all(value == 0 for value in results["arms"]["off"]["state_moved"]["r0"].values())
    assert results["arms"]["base"]["state_norm"] == {}


def test_wrong_items_and_modes(lm):
    with pytest.raises(ValueError, match="of different names"):
        summarise({}, [], CONTEXT)
    twice = [replace(item, name="same") for item in make_items(2, frames=CONTEXT)]
    with pytest.raises(ValueError, match="of different names"):
        compare({KEPT: lm}, twice)
    with pytest.raises(ValueError, match=r"mode must be one of .* got 'on'"):
        Arm("x", "x", mode="on")


def test_what_is_no_number_is_nan_with_a_reason_and_never_in_a_mean():
    broken, lm = make_lm(None), make_lm(None)
    with torch.no_grad():
        broken.emb[0].weight[7] = float("nan")  # whoever hears code 7
    items = [replace(i, codes=i.codes.clamp(max=6) if i.name != "r1" else i.codes)
             for i in make_items()]  # fmt: skip
    scores = evaluate(broken, items)
    with pytest.raises(FloatingPointError, match="r1: the NLL of codebook"):
        scores.refuse_broken(items)
    assert [bool(found.broken) for found in scores.found] == [False, True, False]
    assert np.isnan(scores.found[1].nll["codebook0"]).all()
    found = summarise({BASE: evaluate(lm, items), TRAINED: scores}, items, CONTEXT)
    arm = found["arms"]["trained"]
    assert list(arm["broken"]) == ["r1"]
    assert arm["ranges"]["codebook0"]["1x-4x"]["n"] == 2
    others = [arm["recordings"][r]["codebook0"]["1x-4x"] for r in ("r0", "r2")]
    assert arm["ranges"]["codebook0"]["1x-4x"]["mean"] == pytest.approx(np.mean(others))
    assert found["differences"][0]["ranges"]["codebook0"]["1x-4x"]["n"] == 2
    worse = evaluate(broken, [items[1]])
    found = summarise({BASE: worse}, [items[1]], CONTEXT)
    reason = "the NLL is no number"
    assert found["arms"]["base"]["ranges"]["codebook0"]["1x-4x"]["reason"] == reason
    length = generalise({BASE: worse}, [items[1]], CONTEXT)
    assert length["arms"]["base"]["named"]["1x"]["reason"] == reason


def test_kept_scores_are_used_and_are_the_same(lm, tmp_path: Path):
    items = make_items()
    keep = Keep(tmp_path / "nll", {"mode": "kept"})
    seen: list[int] = []
    first = score_arm(lm, KEPT, items, CONTEXT, keep=keep, progress=seen.append)
    assert sum(seen) == sum(item.frames for item in items)
    assert len(list((tmp_path / "nll").iterdir())) == 3
    again = score_arm(make_lm(seed=5), KEPT, items, CONTEXT, keep=keep)  # not scored: another lm
    for one, other in zip(first.found, again.found, strict=True):
        for kind, values in one.nll.items():
            np.testing.assert_array_equal(values, other.nll[kind])
        assert one.state_moved == other.state_moved
        assert one.ms_per_frame == other.ms_per_frame
    other = Keep(tmp_path / "nll", {"mode": "reset"})
    assert other.get(f"{items[0].digest} None") is None
    file = keep.file(f"{items[0].digest} None")
    assert keep.get(f"{items[0].digest} None") is not None
    file.write_bytes(file.read_bytes()[:50])
    assert keep.get(f"{items[0].digest} None") is None


def test_results_are_plain_values(results):
    assert json.loads(json.dumps(results))["window_frames"] == CONTEXT


def test_the_weights_of_one_model_are_in_memory_at_a_time(tmp_path, monkeypatch):
    base = find_base(build_base(tmp_path / "base", dim=32, layers=1, context=CONTEXT))
    lm = load_base(base, dtype=torch.float32)
    splice(lm, TTTConfig(layers="all", chunk_size=4))
    save_checkpoint(lm, tmp_path / "c", base)
    held: list[weakref.ref[torch.Tensor]] = []
    names = []

    def alone(load):
        def loaded(*args, **how):
            assert not any(tensor() is not None for tensor in held)
            return load(*args, **how)

        return loaded

    for name in ("load", "load_base"):
        monkeypatch.setattr(f"eval.arms.{name}", alone(getattr(eval.arms, name)))
    ours = [replace(arm, checkpoint=tmp_path / "c") for arm in (KEPT, OFF)]
    for arm, model in open_arms([BASE, *ours, WIDE], base, dtype=torch.float32):
        score_arm(model, arm, make_items(1, frames=CONTEXT), CONTEXT)
        held += [weakref.ref(tensor) for tensor in model.parameters()]
        names.append(arm.name)
    assert names == ["base", "kept", "off", "wide"]
    assert len(held) > 40
