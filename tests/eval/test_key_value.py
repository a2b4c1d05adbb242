"""Synthetic recall: the measure against an oracle, and a memory that has learnt the task."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from eval.key_value import CHANCE, KEYS, VALUES, key_value, measure, recalled
from eval.modes import writing_off
from moshi_ttt.config import TTTConfig
from moshi_ttt.hybrid import splice
from moshi_ttt.states import ttt_blocks
from tests.small import small_lm

CONTEXT, PAIRS, DELAY = 8, 2, 16


def test_pairs_noise_and_the_pairs_again():
    lm = small_lm()
    task = key_value(lm, 5, 12, pairs=3, seed=1)
    assert task.codes.shape == (5, 17, 6 + 12 + 6)
    heard = task.codes[:, 1]
    assert (heard[:, 6:18] >= KEYS + VALUES).all()
    for row, queries in zip(heard, task.queries, strict=True):
        first = dict(row[:6].view(3, 2).tolist())
        assert len(first) == 3
        assert max(first) < KEYS <= min(first.values())
        assert {k: v for k, v in row[18:].view(3, 2).tolist()} == first
        assert queries.tolist() == [19, 21, 23]
    assert (task.codes[:, 0] == lm.text_padding_token_id).all()
    assert (task.codes[:, 2:] == 0).all()
    assert torch.equal(key_value(lm, 5, 12, pairs=3, seed=1).codes, task.codes)
    assert not torch.equal(key_value(lm, 5, 12, pairs=3, seed=2).codes, task.codes)


def test_tasks_that_cannot_be_drawn():
    with pytest.raises(ValueError, match="pairs must be 1 to 8, got 9"):
        key_value(small_lm(), 1, 4, pairs=9)
    with pytest.raises(ValueError, match="a card of more than 16 is needed, got 16"):
        key_value(small_lm(card=16), 1, 4)


def oracle(task, span):
    """NLL of one who looks up what came after a key, at most `span` frames ago."""
    nll = torch.zeros(task.codes.shape[0], task.codes.shape[-1])
    for row, heard in enumerate(task.codes[:, 1].tolist()):
        for t in range(1, len(heard)):
            before = range(max(1, t - span), t)
            known = any(heard[s - 1] == heard[t - 1] and heard[s] == heard[t] for s in before)
            nll[row, t] = -math.log(0.9) if known else CHANCE
    return nll


def test_the_measure_against_an_oracle():
    task = key_value(small_lm(), 6, DELAY, pairs=PAIRS)
    with_memory = measure(task, oracle(task, 100))
    assert with_memory.nll == pytest.approx(-math.log(0.9))
    assert (with_memory.delay, with_memory.accuracy) == (DELAY, 1.0)
    without = measure(task, oracle(task, CONTEXT))
    assert (without.nll, without.accuracy) == (pytest.approx(math.log(8)), 0.0)
    half = torch.where(torch.arange(6)[:, None] < 3, oracle(task, 100), oracle(task, CONTEXT))
    assert measure(task, half).accuracy == 0.5


def narrow_lm():
    """One layer, so that nothing older than the window is seen at all, and few streams."""
    return small_lm(context=CONTEXT, num_layers=1, card=32, n_q=2, dep_q=2, delays=[0, 0, 0])


def train(lm, steps):
    optimiser = torch.optim.AdamW(lm.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 20) * (1 - step / steps)
        task = key_value(lm, 32, DELAY + step % 8, pairs=PAIRS, seed=1000 + step)
        logits = lm(task.codes).logits[:, 0]
        asked = logits.gather(1, task.queries[..., None].expand(-1, -1, logits.shape[-1]))
        loss = F.cross_entropy(
            asked.flatten(0, 1), task.codes[:, 1].gather(1, task.queries).view(-1)
        )
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimiser.step()
    return lm.eval()


@pytest.fixture(scope="module")
def trained():
    """A model with a memory that has learnt to recall over 16 to 23 frames of noise."""
    torch.set_num_threads(1)
    lm = narrow_lm()
    config = TTTConfig(memory="ttt_linear", layers="all", chunk_size=4, num_heads=1)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        splice(lm, config)
        for block in ttt_blocks(lm).values():
            block.gate.fill_(0.5)
    return train(lm, 120)


def test_a_trained_memory_recalls_beyond_its_window(trained):
    tasks = [key_value(trained, 32, delay, pairs=PAIRS, seed=1) for delay in (16, 48)]
    before = copy.deepcopy(trained.state_dict())
    for kept in recalled(trained, tasks, rows=32):
        assert kept.nll < 0.5
        assert kept.accuracy > 0.8
    for reset in recalled(trained, tasks, rows=32, reset_every=CONTEXT):
        assert reset.nll > CHANCE
        assert reset.accuracy < 0.35
    with writing_off(trained):
        for off in recalled(trained, tasks, rows=32):
            assert off.nll > CHANCE
            assert off.accuracy < 0.35
    assert all(torch.equal(before[key], value) for key, value in trained.state_dict().items())


def test_without_a_memory_there_is_chance_only():
    lm = train(narrow_lm(), 60)
    (beyond,) = recalled(lm, [key_value(lm, 32, DELAY, pairs=PAIRS)], rows=32)
    assert beyond.nll == pytest.approx(CHANCE, abs=0.1)
    assert beyond.accuracy == 0
