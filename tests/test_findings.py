"""What is wrong is said in one sentence with layer, head and value; what is right is not."""

import math

import pytest
import torch

from moshi_ttt.findings import RECENT, History, find, findings, table
from moshi_ttt.monitor import CallMonitor, Reading
from moshi_ttt.states import ttt_blocks
from tests.small import small_hybrid
from tests.test_hybrid import codes_for

NAN = math.nan
GOOD = {
    "loss_before": [2.0, 3.0], "loss_after": [1.9, 2.8], "update": [0.01, 0.02],
    "state": [1.1, 1.2], "moved": [0.3, 0.4], "momentum": [0.5, 0.5], "eta": [0.1, 0.1],
    "m": [0.5, 0.6], "w": [0.4, 0.5], "lr": [1e-3, 1e-3], "ns_min": [0.95, 0.9],
    "ns_max": [1.05, 1.1], "gate_mean": 0.01, "gate_abs": 0.1, "gate_std": 0.1, "gate_min": -0.2,
    "gate_max": 0.2, "gate_full": 0.0, "attention": 0.5, "memory": 0.1,
}  # fmt: skip
PLAIN = GOOD | {"momentum": [NAN, NAN], "ns_min": [NAN, NAN], "ns_max": [NAN, NAN]}


def history(count=2 * RECENT, **series):
    """So many readings; what is given is a value, or a function of the place from 0 to 1."""
    out = []
    for i in range(count):
        now = {k: v(i / max(1, count - 1)) if callable(v) else v for k, v in series.items()}
        good = GOOD | now
        out.append(Reading(100 * i, {"transformer.layers.3": good, "transformer.layers.7": PLAIN}))
    return out


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("count", [1, 2 * RECENT])
def test_nothing_is_found_where_nothing_is_wrong(training, count):
    assert findings(history(count), training=training) == []
    assert findings([], training=training) == []


WRONG = {
    "closed": ({"gate_abs": 2e-4}, "layer 3: the gate is closed, mean |tanh(gate)| = 0.0002: "
               "nothing is heard"),
    "full": ({"gate_full": 0.75}, "layer 3: the gate is saturated, 75 % of the channels have "
             "|tanh(gate)| > 0.99: it can hardly learn any more"),
    "m at 1": ({"m": [0.5, 0.999]}, "layer 3: the momentum gate m is stuck at 1 in head 1 (0.999)"),
    "w at 0": ({"w": [1e-3, 0.5]}, "layer 3: the write gate w is stuck at 0 in head 0 (0.001)"),
    "explodes": ({"state": [1.0, 1e308]}, "layer 3: the state explodes, ||W|| / ||W0|| in head 1 "
                 "(1e+308)"),
    "dead": ({"moved": [0.0, 0.0], "update": [0.0, 0.0]},
             "layer 3: the state never moves, ||W - W0|| / ||W0|| in all heads, worst head 0 (0)"),
    "loss": ({"loss_after": [2.5, 2.8]}, "layer 3: the write does not lower the inner loss "
             "(before minus after) in head 0 (-0.5)"),
    "newton-schulz": ({"ns_min": [0.2, 0.9]}, "layer 3: Newton-Schulz has not converged, a "
                      "singular value away from 1 in head 0 (0.2)"),
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", list(WRONG))
def test_each_is_found_and_named(kind, training):
    values, sentence = WRONG[kind]
    (found,) = find(history(**values), training=training)
    assert found.text == sentence
    assert found.key == f"{kind} transformer.layers.3"


def test_a_state_that_grows_and_one_that_levels_off():
    def straight(t):
        return [1.0, 1 + 9 * t]

    def levels(t):
        return [1.0, 1 + 9 * (1 - math.exp(-6 * t))]

    (line,) = findings(history(state=straight))
    assert line == (
        "layer 3: the state grows without levelling, ||W|| last over first in head 1 (10)"
    )
    assert findings(history(state=levels)) == []
    assert findings(history(RECENT, state=straight)) == []  # too early to say
    assert findings(history(state=straight), training=True) == []  # lanes come and go


def test_gates_start_closed_in_training():
    closed = {"gate_abs": 0.0}
    assert findings(history(RECENT - 1, **closed), training=True) == []
    assert len(findings(history(RECENT, **closed), training=True)) == 1
    assert len(findings(history(1, **closed))) == 1


def test_a_memory_that_forgets_nothing_is_no_fault_and_one_that_forgets_all_is():
    assert findings(history(alpha=[0.9999, 1.0])) == []
    assert findings(history(alpha=[0.001, 0.5])) == [
        "layer 3: the keep gate alpha is stuck at 0 in head 0 (0.001)"
    ]


def test_a_start_that_was_wrong_is_forgiven():
    late = history(3 * RECENT, w=lambda t: [0.5 if t > 0.5 else 0.0, 0.5])
    assert findings(late[:RECENT])
    assert findings(late) == []


def test_readings_without_a_write_say_nothing():
    none = {name: [NAN, NAN] for name, v in GOOD.items() if isinstance(v, list)}
    assert findings(history(**none)) == []
    assert findings(history(update=[NAN, NAN], loss_after=[NAN, NAN], moved=[0.0, 0.0])) == []


def test_a_long_history_is_thinned_but_keeps_its_ends():
    kept = History()
    for i in range(5000):
        kept.add(Reading(i, {}))
    places = [r.at for r in kept.readings]
    assert len(places) <= 256
    assert places == sorted(places)
    assert places[0] == 0
    assert places[-RECENT:] == list(range(5000 - RECENT, 5000))


def test_a_table_leaves_out_what_is_not_there():
    head, one, two = table(history(1)[0]).splitlines()
    assert "inner loss" in head
    assert "momentum" in head
    assert one.split()[:4] == ["layer", "3", "2.5", "2.35"]
    (plain,) = [r._replace(layers={"layers.7": PLAIN}) for r in history(1)]
    assert "momentum" not in table(plain)
    assert len({len(line) for line in (head, one, two)}) == 1


# -- real models, driven there --------------------------------------------------------------------


def readings_of(lm, calls=2):
    """Of a stream in calls of 12 frames."""
    looking, out = CallMonitor(lm), []
    with torch.no_grad(), lm.streaming(1), looking.watching():
        for i in range(calls):
            looking.arm()
            lm.forward_text(codes_for(lm, 1, 12))
            out.append(looking.reading(12 * i))
    return out


def kinds(lm, calls=2):
    """What is found in the first layer."""
    keys = [found.key.split() for found in find(readings_of(lm, calls))]
    return {" ".join(kind) for *kind, layer in keys if layer.endswith("layers.0")}


def first_memory(lm):
    return next(iter(ttt_blocks(lm).values()))


def test_small_models_have_nothing_wrong():
    for family in ("ttt_linear", "lact"):
        assert kinds(small_hybrid(memory=family)) == set()


@torch.no_grad()
@pytest.mark.parametrize(("value", "kind"), [(0.0, "closed"), (5.0, "full")])
def test_a_real_gate_driven_there(value, kind):
    lm = small_hybrid(memory="ttt_linear")
    first_memory(lm).gate.fill_(value)
    assert kinds(lm) == {kind}


@torch.no_grad()
def test_a_real_state_that_explodes():
    lm = small_hybrid(memory="ttt_linear", base_lr=1e6)
    assert "explodes" in kinds(lm)


@torch.no_grad()
def test_a_real_state_that_is_dead():
    lm = small_hybrid(memory="ttt_linear", base_lr=1e-12)
    assert kinds(lm) >= {"dead"}


@torch.no_grad()
def test_a_real_write_that_is_uphill():
    lm = small_hybrid(memory="ttt_linear")
    first_memory(lm).memory.lr_scale = -1.0
    memory = first_memory(lm).memory
    memory.writes = lambda: True
    assert "loss" in kinds(lm)


@torch.no_grad()
@pytest.mark.parametrize(("row", "value", "kind"), [(3, 20.0, "m at 1"), (4, -20.0, "w at 0")])
def test_real_gates_that_are_stuck(row, value, kind):
    lm = small_hybrid(memory="lact")
    memory = first_memory(lm).memory
    memory.lr_weight.view(6, 2, -1)[row] = 0
    memory.lr_bias.view(6, 2)[row] = value
    assert kind in kinds(lm)


@torch.no_grad()
def test_a_real_momentum_too_small_for_newton_schulz():
    lm = small_hybrid(memory="lact")
    first_memory(lm).memory.lr_bias.view(6, 2)[:3] = -40.0
    assert "newton-schulz" in kinds(lm)
