"""No evaluation changes another, nor training; none is lost by an error."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from eval.arms import KEPT, OFF, RESET, SHUFFLED, score_arm
from eval.keep import Keep
from eval.scores import KINDS, Item, evaluate
from finetune.loss import LossWeights, TeacherForced
from finetune.optim import Group, MasterAdamW
from finetune.step import train_step
from moshi_ttt.hybrid import carry_kv
from moshi_ttt.lanes import attach_lanes, lanes_of
from moshi_ttt.states import ttt_blocks
from tests.eval.tiny_lm import CONTEXT, make_lm, make_recordings
from tests.eval.untouched import assert_untouched, facts, in_training
from tests.finetune.test_loss import batch, segment
from tests.small import small_hybrid

ARMS = (KEPT, RESET, SHUFFLED, OFF)
LENGTHS = (29, 17, 34, 25, 17, 9)


def make_items(*lengths, seed=1):
    """One a speaker, but for the last two; every other one with a transcript."""
    recordings = make_recordings(*(lengths or LENGTHS), seed=seed)
    last = len(recordings) - 2
    return [
        Item(f"r{i}", f"s{min(i, last)}", codes, text_known=i % 2 > 0)
        for i, codes in enumerate(recordings)
    ]


def assert_equal(mine, theirs, bound=0.0):
    """Scores, item by item, in nats; also how far each item is scored."""
    for one, other in zip(mine.found, theirs.found, strict=True):
        assert one.broken == other.broken
        for kind in KINDS:
            np.testing.assert_allclose(
                one.nll[kind], other.nll[kind], rtol=0, atol=bound, equal_nan=True
            )


@pytest.fixture(scope="module")
def lm():
    torch.set_num_threads(1)  # a module's fixtures come before the one of conftest.py
    return make_lm()


# -- order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_the_order_of_items_changes_no_number(lm, arm):
    """One at a time bit for bit; several at a time each order has other rows beside each other."""
    items = make_items()
    wanted = score_arm(lm, arm, items, CONTEXT, frames_per_call=15)
    assert all(np.isfinite(found.nll["codebook0"]).sum() > 5 for found in wanted.found)
    backwards, mixed = [5, 4, 3, 2, 1, 0], [2, 0, 5, 1, 3, 4]
    for order, rows, bound in ((backwards, 1, 0.0), (mixed, 1, 0.0), (mixed, 4, 1e-8)):
        moved = [items[i] for i in order]
        found = score_arm(lm, arm, moved, CONTEXT, rows=rows, frames_per_call=15)
        back = replace(found, found=[found.found[order.index(i)] for i in range(len(items))])
        assert_equal(back, wanted, bound)
        assert back.missing == wanted.missing


def test_an_item_is_scored_the_same_whatever_else_is_scored(lm):
    items = make_items()
    all_of_them = evaluate(lm, items)
    for i, item in enumerate(items):
        alone = evaluate(lm, [item])
        assert_equal(alone, replace(all_of_them, found=[all_of_them.found[i]]))


# -- training --------------------------------------------------------------------------------------


def train(evaluates, *, checkpointing=False):
    """Three steps of two micro-batches of two lanes, read on; what they gave, to the bit."""
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002 (the global one is what is meant)
    lm = small_hybrid(lm={"context": CONTEXT})
    lm.transformer.checkpointing = checkpointing
    carry_kv(lm)
    attach_lanes(lm.train(), 2, 2)
    optimizer = MasterAdamW([Group("all", 1e-2, 0.1, list(lm.parameters()))], (0.9, 0.95))
    given, items = [], make_items(30, 25, 12, 20)
    for step in range(3):
        cuts = [batch(*(segment(10 * step + 2 * slot + row) for row in (0, 1))) for slot in (0, 1)]
        cuts = [replace(cut, begins=torch.full((2,), step == 0)) for cut in cuts]
        result = train_step(TeacherForced(lm), [cuts], optimizer, LossWeights(), max_norm=1.0)
        assert result.bad is None
        given += [result.loss, result.grad_norm, result.state_norms, torch.rand(1)]
        if evaluates:
            for arm in ARMS:
                scores = score_arm(lm, arm, items, CONTEXT, rows=3, frames_per_call=20)
                assert np.isfinite(scores.nll["codebook0"][0][:-1]).all()
    given += [t for held in lanes_of(lm).values() for t in held.tensors().values()]
    given += [*lm.state_dict().values(), lm.training, np.random.random()]  # noqa: NPY002
    given += [t for p in optimizer.adamw.state.values() for t in p.values()]
    return given


@pytest.mark.parametrize("checkpointing", [False, True])
def test_evaluation_between_steps_leaves_training_bit_identical(checkpointing):
    """Held-out items in four arms, three rows: losses, weights, lanes, optimizer, generators."""
    with_it = train(True, checkpointing=checkpointing)
    without = train(False, checkpointing=checkpointing)
    for one, other in zip(with_it, without, strict=True):
        assert torch.equal(one, other) if torch.is_tensor(one) else one == other


@pytest.mark.parametrize("checkpointing", [False, True])
def test_evaluation_between_a_forward_and_its_backward(checkpointing):
    found = []
    for evaluates in (False, True):
        lm = small_hybrid(lm={"context": CONTEXT})
        lm.transformer.checkpointing = checkpointing
        carry_kv(lm)
        attach_lanes(lm.train(), 2)
        part = batch(segment(0), segment(1))
        for _ in range(2):
            text, audio = TeacherForced(lm)(part.sequence)[:2]
            loss = text.nan_to_num().square().mean() + audio.nan_to_num().square().mean()
        if evaluates:
            for arm in ARMS:
                score_arm(lm, arm, make_items(30, 25, 40), CONTEXT, rows=3)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in lm.parameters() if p.grad is not None)])
    assert len(found[0]) > 40
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# -- errors, and what is kept ----------------------------------------------------------------------


class FullDisk(Keep):
    """Has room for two recordings."""

    def put(self, name, found):
        if len(list(self.folder.glob("*.safetensors"))) == 2:
            raise OSError(28, "No space left on device")
        super().put(name, found)


class Stop:
    """Raises at the given call."""

    def __init__(self, at, error):
        self.calls, self.at, self.error = 0, at, error

    def __call__(self, *args):
        self.calls += 1
        if self.calls == self.at:
            raise self.error


@pytest.mark.parametrize(
    ("where", "arm", "at", "rows"),
    [
        ("model", KEPT, 8, 1),
        ("progress", SHUFFLED, 12, 3),
        ("done", RESET, 0, 3),
        ("progress", OFF, 8, 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("model", KEPT, 8, 3),
                ("progress", SHUFFLED, 12, 1),
                ("done", RESET, 0, 1),
                ("progress", OFF, 8, 3),
            )
        ),
    ],
)
def test_after_an_error_nothing_has_changed_and_it_goes_on(tmp_path, where, arm, at, rows):
    """What was scored is kept and not scored again; the rest comes out as without the error."""
    lm, items = in_training(), make_items()
    how = {"frames_per_call": 7}
    undisturbed = score_arm(lm, arm, items, CONTEXT, **how)
    before = facts(lm)
    keep, more, errors = Keep(tmp_path, {"a": 1}), {}, (KeyboardInterrupt, RuntimeError, OSError)
    stop = Stop(at, KeyboardInterrupt() if where == "progress" else RuntimeError("device lost"))
    hook = nullcontext()
    if where == "done":
        keep = FullDisk(tmp_path, {"a": 1})
    elif where == "progress":
        more["progress"] = stop
    else:
        hook = lm.linears[0].register_forward_pre_hook(lambda *_: stop())
    with hook, pytest.raises(errors):
        score_arm(lm, arm, items, CONTEXT, rows=rows, keep=keep, **how, **more)
    assert_untouched(before, facts(lm))
    files = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")}
    assert 0 < len(files) < len(items)
    assert all(block.memory.lr_scale == 1.0 for block in ttt_blocks(lm).values())

    counted = Stop(0, None)
    with lm.linears[0].register_forward_pre_hook(lambda *_: counted()):
        found = score_arm(lm, arm, items, CONTEXT, keep=Keep(tmp_path, {"a": 1}), **how)
        first = counted.calls
        again = score_arm(lm, arm, items, CONTEXT, keep=Keep(tmp_path, {"a": 1}), **how)
    assert counted.calls == first > 0
    assert_equal(found, undisturbed, 0.0 if rows == 1 else 1e-8)
    assert_equal(again, found)
    assert {file: file.stat().st_mtime_ns for file in files} == files
    assert len(list(tmp_path.iterdir())) == len(items)
    assert_untouched(before, facts(lm))


@pytest.mark.parametrize("left", [0, 5, 0.5, 0.99])
def test_a_file_that_is_cut_short_is_scored_again(lm, tmp_path, left):
    items, keep = make_items(20, 30, 9), Keep(tmp_path, {})
    wanted = evaluate(lm, items, keep=keep)
    contents = {file: file.read_bytes() for file in tmp_path.iterdir()}
    torn = sorted(contents)[1]
    torn.write_bytes(contents[torn][: int(left if left > 1 else left * len(contents[torn]))])
    progress = []
    assert_equal(evaluate(lm, items, keep=keep, progress=progress.append), wanted)
    assert sum(progress) == 59
    assert_equal(evaluate(lm, items, keep=Keep(tmp_path, {})), wanted)
    assert len(torn.read_bytes()) > 0.9 * len(contents[torn])
    assert contents.keys() == set(tmp_path.iterdir())


def test_a_file_with_another_byte_is_scored_again(lm, tmp_path):
    items, keep = make_items(20), Keep(tmp_path, {})
    wanted = evaluate(lm, items, keep=keep)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[-9] ^= 1  # in the last numbers
    file.write_bytes(content)
    found = evaluate(lm, items, keep=keep)
    assert found.kept == 0
    assert_equal(found, wanted)


def test_no_scores_are_found_under_other_settings(tmp_path, lm):
    """Nor of another recording, other text, another history."""
    (item, other) = make_items(20, 20)
    keep = Keep(tmp_path, {"weights": "x", "rows": 1})
    evaluate(lm, [item], keep=keep, reset_every=8, history=[other])
    evaluate(lm, [item], keep=keep)
    assert len(list(tmp_path.iterdir())) == 2
    assert keep.get(f"{item.digest} None") is not None
    assert Keep(tmp_path, {"rows": 1, "weights": "x"}).get(f"{item.digest} None") is not None
    for settings in ({"weights": "y", "rows": 1}, {"weights": "x", "rows": 2}, {"weights": "x"}):
        assert Keep(tmp_path, settings).get(f"{item.digest} None") is None
    changed = item.codes.clone()
    changed[9, 3] += 1
    for like in (
        replace(item, codes=item.codes[:, :-1]),
        replace(item, codes=changed),
        replace(item, text_known=not item.text_known),
        other,
    ):
        assert keep.get(f"{like.digest} None") is None
    assert replace(item, name="renamed", speaker="x").digest == item.digest


def test_nothing_to_score_is_no_call(lm, tmp_path):
    assert evaluate(lm, []).found == []
    items, keep = make_items(20, 9), Keep(tmp_path, {})
    wanted = evaluate(lm, items, keep=keep)
    with lm.streaming(1):  # a call would refuse a model that is streaming
        assert_equal(evaluate(lm, items, keep=keep), wanted)
