"""Every file under configs/: it loads, its memory can be built, and what it needs is known."""

import pytest
import torch
import yaml

from finetune.load_args import load_args
from finetune.memory_use import check_fits, estimate, planned
from finetune.sizes import SIZES
from moshi_ttt.block import HybridSeqModelingBlock
from moshi_ttt.config import FAMILIES
from moshi_ttt.errors import UserError
from tests.finetune.small_run import ROOT

CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.yaml"))}
MEMORIES = ["ttt_linear", "lact", "atlas", "titans"]
"""Beside ttt_mlp, which is tiny.yaml's and 7b.yaml's."""


def lm_config(args):
    """None is the 7B's."""
    name = args.moshi_paths.hf_repo_id or ""
    return SIZES[args.moshi_paths.size or "tiny"] if not name.startswith("kyutai/") else None


@pytest.mark.parametrize("name", CONFIGS)
def test_it_loads_and_its_need_is_known(name):
    args = load_args(CONFIGS[name])
    assert args.run_dir == f"runs/{name}"
    width = 2 if args.param_dtype == "bfloat16" else 4
    need = estimate(lm_config(args), args, width)
    assert 0 < need.trainable <= need.parameters
    assert need.total < 80 * 10**9
    assert (need.trainable == need.parameters) == args.full_finetuning


def test_what_is_too_large_for_a_cpu_is_refused_in_a_line():
    for name in ("7b_lact", "7b_atlas"):
        args = load_args(CONFIGS[name])
        with pytest.raises(UserError, match=r"needs a CUDA GPU with about .* bytes") as refused:
            check_fits(lm_config(args), args, torch.device("cpu"))
        assert "\n" not in str(refused.value)


def trainable(path):
    args = load_args(path)
    return estimate(lm_config(args), args, 4).trainable


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("default", ["tiny", "7b"])
def test_a_memorys_file_is_the_default_but_for_its_memory(default, memory):
    values = {n: yaml.safe_load(CONFIGS[n].read_text()) for n in (default, f"{default}_{memory}")}
    memories = [v.pop("ttt") for v in values.values()]
    assert [v.pop("run_dir") for v in values.values()] == [f"runs/{n}" for n in values]
    ranks = [v["lora"].pop("rank") for v in values.values()]
    assert values[default] == values[f"{default}_{memory}"]
    if default == "7b":
        assert ranks[0] == ranks[1]
    else:  # LoRA's rank makes up for what a memory has less
        a, b = (trainable(CONFIGS[n]) for n in (default, f"{default}_{memory}"))
        assert abs(a - b) < 0.02 * a
    for key in ("layers", "placement"):
        assert memories[0][key] == memories[1][key]
    assert memories[1]["memory"] == ("atlas" if memory == "titans" else memory)
    if default == "tiny":
        mine = load_args(CONFIGS[f"tiny_{memory}"]).ttt
        assert (mine.num_heads, mine.options["conv_width"]) == (1, 4)


def test_every_family_has_a_file_for_the_tiny_model_and_for_the_7b():
    for default in ("tiny", "7b"):
        files = [n for n in CONFIGS if n.startswith(default)]
        memories = [load_args(CONFIGS[n]).ttt for n in files]
        assert {m.memory for m in memories if m is not None} == set(FAMILIES)


def test_titans_is_an_atlas_that_sees_one_frame_as_it_is():
    for default in ("tiny", "7b"):
        options = load_args(CONFIGS[f"{default}_titans"]).ttt.options
        assert (options["window"], options["polynomial"], options["muon"]) == (1, "none", False)


def test_a_lacts_chunk_is_within_the_attention_window_and_read_in_its_segment():
    for name, path in CONFIGS.items():
        args = load_args(path)
        if args.ttt is not None:
            context = (lm_config(args) or {"context": 3000})["context"]
            assert args.ttt.chunk_size <= context, name
            assert 2 * args.ttt.chunk_size <= 12.5 * args.duration_sec, name


def test_lact_816m_is_the_model_that_was_asked_for():
    args = load_args(CONFIGS["lact_816m"])
    lm, _ = planned(lm_config(args), args, 2)
    assert (len(lm.transformer.layers), lm.dim) == (24, 1536)
    blocks = [m for m in lm.modules() if isinstance(m, HybridSeqModelingBlock)]
    assert len(blocks) == 24
    options = args.ttt.options
    assert [options[k] for k in ("low_rank", "stacked", "momentum", "muon")] == [32, 2, True, True]
    assert {(b.memory.num_heads, b.memory.head_dim) for b in blocks} == {(4, 384)}
    assert sum(p.numel() for p in lm.parameters()) == pytest.approx(816e6, rel=0.005)
    assert args.gradient_checkpointing
    assert args.full_finetuning
