"""Each way of training: exactly its parameters change, its files are written, they load again."""

import json
import math

import pytest
import torch
from moshi.models.loaders import CheckpointInfo
from safetensors.torch import load_file, save_file
from torch import nn

from moshi_ttt.base import load_base
from moshi_ttt.checkpoint import load
from moshi_ttt.errors import UserError
from moshi_ttt.hybrid import HybridLMModel
from tests.finetune.small_run import LORA_ONLY, MEMORY_ONLY, checkpoint, lines, logits, weights

FULL = {"lora__enable": False, "full_finetuning": True}


def changed(seen):
    after = seen["lm"].state_dict()
    return {k for k, v in seen["before"].items() if not torch.equal(v, after[k])}


def is_memory(key):
    return ".seq_modeling_block." in key


def is_lora(key):
    return ".lora_A." in key or ".lora_B." in key


def embeddings(lm):
    return {f"{n}.weight" for n, m in lm.named_modules() if isinstance(m, nn.Embedding)}


def is_base(key):
    return not is_memory(key) and not is_lora(key)


MODES = {
    "lora+memory": ({}, {"lora", "ttt"}),
    "lora": (LORA_ONLY, {"lora"}),
    "memory": (MEMORY_ONLY, {"ttt"}),
    "embeddings": ({"lora__ft_embed": True}, {"lora", "ttt"}),
    "merged": ({"save_adapters": False}, {"consolidated", "ttt"}),
    "merged lora": ({**LORA_ONLY, "save_adapters": False}, {"consolidated"}),
    "full": ({**FULL, **LORA_ONLY}, {"consolidated"}),
    "full+memory": (FULL, {"consolidated", "ttt"}),
    "linear": ({"ttt__memory": "ttt_linear", "ttt__placement": "after_attention"}, {"lora", "ttt"}),
}


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_trains_and_saves_what_it_says(world, tmp_path, seen, mode):
    overrides, files = MODES[mode]
    run = world.run(tmp_path / "run", **overrides)
    lm, moved = seen["lm"], changed(seen)
    keys = set(seen["before"])
    frozen = {k for k in keys if is_base(k)}
    if mode == "embeddings":
        frozen -= embeddings(lm)
        assert len(embeddings(lm) & moved) > 20
    if mode.startswith("full"):
        frozen = set()
    assert not moved & frozen
    # what a first step cannot reach (A of LoRA, a memory behind a gate of 0) the second does
    assert keys - frozen - moved == set()
    assert {k for k in moved if is_memory(k)} or "ttt" not in files
    assert {k for k in moved if is_lora(k)} or mode.startswith(("memory", "full"))

    folder = checkpoint(run)
    wanted = {f"{f}.safetensors" for f in files} | {"config.json", "ttt.json"}
    assert {p.name for p in folder.iterdir()} == wanted
    about = json.loads((folder / "ttt.json").read_text())
    assert about["step"] == 2
    assert about["segment_frames"] == 15
    got = load(folder)
    assert isinstance(got.lm, HybridLMModel) == ("ttt" in files)
    difference = (logits(got.lm) - logits(lm)).abs().max()
    assert difference < 1e-4 if mode.startswith("merged") else difference == 0
    assert not torch.equal(logits(got.lm), logits(load_base(got.base, dtype=torch.float32)))


@pytest.mark.parametrize("manifest", ["stereo", "mono"])
@pytest.mark.parametrize("side", ["moshi", "user"])
def test_stereo_and_mono_with_words_and_without(world, tmp_path, manifest, side):
    data = {"data__train_data": str(world / f"{manifest}.jsonl"), "data__mono_side": side}
    run = world.run(tmp_path / "run", drawn=side == "user", **data)
    assert (run / "curves.png").is_file() == (side == "user")
    found = lines(run)
    assert len(found) == 2
    for line in found:
        assert math.isfinite(line["loss"])
        assert math.isfinite(line["nll_codebook0"])
        assert (line["nll_text"] is None) == (manifest == "mono")
    assert all(t.isfinite().all() for t in weights(run).values())


def test_from_a_lora_file_of_moshi_finetune(world, tmp_path, seen):
    """Its files: A and B of every Linear in bfloat16, under moshi's names, and a config.json."""
    first = world.run(tmp_path / "first", **LORA_ONLY)
    theirs = {
        k: v.to(torch.bfloat16)
        for k, v in load_file(checkpoint(first) / "lora.safetensors").items()
    }
    save_file(theirs, tmp_path / "lora.safetensors")
    world.run(tmp_path / "second", lora__path=str(tmp_path / "lora.safetensors"))
    for key, value in theirs.items():
        assert torch.equal(seen["before"][key], value.float()), key
    assert any(is_lora(k) for k in changed(seen))
    with pytest.raises(UserError, match=r"lora\.path .*nowhere.* does not exist"):
        world.run(tmp_path / "third", lora__path=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"lora\.path is .* but lora\.enable is false"):
        world.run(tmp_path / "third", lora__path="x", **MEMORY_ONLY)
    (tmp_path / "junk").write_text("junk")
    with pytest.raises(UserError, match=r"lora\.path .*junk cannot be read"):
        world.run(tmp_path / "third", lora__path=str(tmp_path / "junk"))
    assert not (tmp_path / "third").exists()


def test_stock_moshi_loads_what_was_trained(world, tmp_path, seen):
    folder = checkpoint(world.run(tmp_path / "run", **LORA_ONLY))
    info = CheckpointInfo.from_hf_repo(
        "not/used", config_path=folder / "config.json", lora_weights=folder / "lora.safetensors"
    )
    stock = info.get_moshi(dtype=torch.float32, fuse_lora=False)
    assert torch.equal(logits(stock), logits(seen["lm"]))


def test_checkpoints_by_frequency_the_newest_are_kept(world, tmp_path):
    run = world.run(tmp_path / "a", max_steps=5, ckpt_freq=1, num_ckpt_keep=2)
    there = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert there == ["checkpoint_000004", "checkpoint_000005"]
    run = world.run(tmp_path / "b", max_steps=5, ckpt_freq=2, num_ckpt_keep="none")
    there = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert there == ["checkpoint_000002", "checkpoint_000004", "checkpoint_000005"]
    run = world.run(tmp_path / "c", do_ckpt=False)
    assert not (run / "checkpoints").exists()
    assert "checkpoint:" not in (run / "summary.txt").read_text()
