"""What a configuration refuses, and what it takes from an earlier version."""

import pytest

from moshi_ttt.config import FAMILIES, TTTConfig

EARLIER = {
    "layers": "every:4", "placement": "parallel", "num_heads": None, "chunk_size": 16,
    "write_every": 1, "writing": True, "decay": 1e-3, "conv_width": 4, "hidden_mult": 4,
    "persistent_states": True, "state_passing": True, "detach_memory_output": False,
}  # fmt: skip
"""As it was written before families had options of their own."""


@pytest.mark.parametrize(("memory", "base_lr"), [("ttt_linear", 1.0), ("ttt_mlp", 0.1)])
def test_what_an_earlier_version_wrote_is_the_same_memory(memory, base_lr):
    found = TTTConfig.from_dict({"memory": memory, "base_lr": base_lr, **EARLIER})
    assert found == TTTConfig(memory=memory)


def test_a_width_that_a_linear_memory_does_not_have_is_refused():
    with pytest.raises(ValueError, match="hidden_mult is no option of ttt_linear, got 8"):
        TTTConfig.from_dict({"memory": "ttt_linear", "hidden_mult": 8})
    with pytest.raises(ValueError, match="hidden_mult is no option of ttt_linear, got 4"):
        TTTConfig(memory="ttt_linear", hidden_mult=4)
    with pytest.raises(ValueError, match="hidden_mult is 8, but deep is false"):
        TTTConfig(memory="atlas", deep=False, hidden_mult=8)


@pytest.mark.parametrize("memory", FAMILIES)
def test_to_dict_and_back(memory):
    deep = [True, False] if "deep" in FAMILIES[memory] else [None]
    for config in (TTTConfig(memory=memory, deep=x) for x in deep):
        assert TTTConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("name", ["writing", "persistent_states", "state_passing"])
def test_a_switch_is_true_or_false(name):
    with pytest.raises(ValueError, match=f"{name} must be true or false, got 'no'"):
        TTTConfig(**{name: "no"})
