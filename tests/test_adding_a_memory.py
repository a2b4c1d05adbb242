"""docs/adding-a-memory.md is run: its files are written, its family registered and put to use."""

import ast
import importlib
import itertools
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

import moshi_ttt.memory
import moshi_ttt.ops
import tests.contract
from finetune.load_args import load_args
from moshi_ttt.checkpoint import load
from moshi_ttt.config import FAMILIES, TTTConfig
from moshi_ttt.states import attach_ttt_states, restore_ttt_states, save_ttt_states, ttt_blocks
from tests.contract import test_calls, test_forms, test_gradients
from tests.finetune.small_run import World, checkpoint, lines, logits
from tests.small import small_hybrid
from tests.test_hybrid import codes_for, hidden_in_pieces

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/adding-a-memory.md").read_text()
BLOCKS = dict(re.findall(r"`([\w/.]+)`[^`]*:\n\n```(?:python|yaml)\n(.*?)```", PAGE, re.DOTALL))
"""File -> its code on the page."""
PACKAGES = (moshi_ttt.ops, moshi_ttt.memory, tests.contract)
FAMILY = ast.literal_eval(BLOCKS.pop("moshi_ttt/config.py"))


@pytest.fixture(scope="module", autouse=True)
def delta(tmp_path_factory):
    """The page followed, and undone afterwards: files where Python finds them, a line each."""
    folder = tmp_path_factory.mktemp("page")
    for name, text in BLOCKS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        for package in PACKAGES:
            place = folder / package.__name__.replace(".", "/")
            patch.setattr(package, "__path__", [*package.__path__, str(place)])
        memory = importlib.import_module("moshi_ttt.memory.delta").Delta
        rules = importlib.import_module("tests.contract.delta")
        patch.setitem(FAMILIES, "delta", FAMILY["delta"])
        patch.setitem(moshi_ttt.memory.MEMORIES, "delta", memory)
        patch.setitem(tests.contract.RULES, "delta", rules)
        yield tests.contract.Memory("delta")
    for package in PACKAGES:
        del sys.modules[f"{package.__name__}.delta"], package.delta


def general():
    """What the contract asks of every memory: each of its tests, with each of its arguments."""
    every = tests.contract.MEMORIES_UNDER_TEST
    for name, test in (vars(test_forms) | vars(test_gradients) | vars(test_calls)).items():
        marks = [m.args[:2] for m in getattr(test, "pytestmark", ()) if m.name == "parametrize"]
        if not name.startswith("test_") or ("memory", every) not in marks:
            continue
        rest = [(names, values) for names, values in marks if names != "memory"]
        for given in itertools.product(*(values for _, values in rest)):
            arguments = {}
            for (names, _), value in zip(rest, given, strict=True):
                names = names.split(",") if isinstance(names, str) else names
                values = value if len(names) > 1 else [value]
                arguments |= dict(zip(map(str.strip, names), values, strict=True))
            yield pytest.param(test, arguments, id=f"{name}-{list(arguments.values())}")


@pytest.mark.parametrize(("test", "arguments"), list(general()))
def test_the_contract_of_every_memory(delta, test, arguments):
    test(memory=delta, **arguments)


def test_most_of_the_contract_is_general():
    assert len({param.values[0] for param in general()}) >= 15


def test_the_contract_sees_a_broken_equation(delta):
    assert len(delta.breaks) >= 2
    for break_it in delta.breaks:
        with pytest.MonkeyPatch.context() as patch:
            test_forms.test_the_contract_sees_a_broken_equation(delta, break_it, patch)


@pytest.mark.parametrize("placement", ["parallel", "after_attention"])
@pytest.mark.parametrize("projection", ["own", "shared"])
def test_a_stream_of_the_spliced_model_is_its_forward(placement, projection):
    how = {"memory": "delta", "placement": placement, "projection": projection}
    lm = small_hybrid(lm={"norm": "rms_norm"}, **how).double()
    codes = codes_for(lm, 2, 50)
    with torch.no_grad():
        whole = lm.forward_text(codes)[0]
        for block in ttt_blocks(lm).values():
            assert block.memory.lr_weight.abs().min() > 0
        off = small_hybrid(lm={"norm": "rms_norm"}, **how, writing=False).double()
        assert (off.forward_text(codes)[0] - whole).abs().max() > 1e-3
    for pieces in ([1] * 50, [7, 1, 1, 21, 20]):
        assert (hidden_in_pieces(lm, codes, pieces) - whole).abs().max() < 1e-8


def test_states_are_saved_and_restored():
    lm = small_hybrid(memory="delta")
    first, second = (codes_for(lm, 2, 13, seed) for seed in range(2))
    attach_ttt_states(lm, 2)
    with torch.no_grad():
        lm(first)
        saved = save_ttt_states(lm)
        for name, block in ttt_blocks(lm).items():
            moved = saved[name]["lanes"]["fast.W"] - block.memory.W
            assert moved.abs().max() > 1e-3
            assert saved[name]["lanes"]["fast.pos"].unique().tolist() == [13]
        wanted, left_out = (lm(second).text_logits for _ in range(2))
        restore_ttt_states(lm, saved)
        assert torch.equal(lm(second).text_logits, wanted)
    assert not torch.equal(left_out, wanted)


def test_a_run_of_two_steps_and_its_checkpoint(tmp_path):
    world = World(tmp_path)
    ttt = {"memory": "delta", "layers": "all", "chunk_size": 4, "num_heads": 2}
    run = world.run(tmp_path / "run", ttt=ttt, max_steps=2)
    assert [line["step"] for line in lines(run)] == [1, 2]
    assert all(line["state_moved"] > 1e-3 for line in lines(run))
    fresh, trained = (load(checkpoint(run)).lm for _ in range(2))
    assert torch.equal(logits(fresh), logits(trained))
    for block in ttt_blocks(trained).values():
        assert block.gate.abs().max() > 0
        assert block.config == TTTConfig(**ttt)
        block.gate.data.zero_()
    assert not torch.equal(logits(fresh), logits(trained))


def test_the_config_of_the_page_is_one(tmp_path):
    text = BLOCKS["configs/tiny_delta.yaml"]
    whole = yaml.safe_load((ROOT / "configs/tiny.yaml").read_text()) | yaml.safe_load(text)
    (tmp_path / "tiny_delta.yaml").write_text(yaml.safe_dump(whole))
    args = load_args(tmp_path / "tiny_delta.yaml")
    assert args.ttt == TTTConfig("delta", "all", num_heads=1)


def test_every_file_that_the_page_names_is_there():
    for name in re.findall(r"`((?:moshi_ttt|tests|configs)/[\w/.]+|pyproject\.toml)`", PAGE):
        path = name.replace("NAME", "delta")
        assert path in BLOCKS or (ROOT / path).exists(), name
