"""Checkpoints: to the bit back, loadable by stock moshi, and refusing what does not fit."""

import json
import shutil

import pytest
import sentencepiece
import torch
from moshi.models.loaders import CheckpointInfo, get_moshi_lm
from moshi.modules.lora import LoRALinear
from safetensors.torch import load_file, save_file

from moshi_ttt.base import file_hash, find_base, fingerprint, load_base
from moshi_ttt.checkpoint import full_state_dict, load, save_checkpoint
from moshi_ttt.config import TTTConfig
from moshi_ttt.errors import UserError
from moshi_ttt.hybrid import HybridLMModel, splice
from moshi_ttt.lora import add_lora, load_lora, lora_layers
from tests.small import LM_KWARGS, randomise_memories, small_lm, small_mimi
from tests.test_hybrid import codes_for


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    from moshi.models.loaders import _lm_kwargs

    folder = tmp_path_factory.mktemp("base")
    lm = small_lm()
    save_file(lm.state_dict(), folder / "model.safetensors")
    save_file(small_mimi().state_dict(), folder / "mimi.safetensors")
    text = folder / "text.txt"
    text.write_text("\n".join(f"word{i} and {i * 7} more" for i in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tok"), vocab_size=64, hard_vocab_limit=False,
        unk_id=0, bos_id=1, eos_id=2, pad_id=3, minloglevel=2,
    )  # fmt: skip
    config = {**_lm_kwargs, **LM_KWARGS} | {
        "moshi_name": "model.safetensors",
        "mimi_name": "mimi.safetensors",
        "tokenizer_name": "tok.model",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def base(base_folder):
    return find_base(base_folder)


def trained(base, *, lora=True, ttt=True, dtype=torch.float32, **config):
    """A model whose every adapter has moved away from no change at all."""
    lm = load_base(base, dtype=dtype)
    if lora:
        add_lora(lm, 4, 2.0)
        for layer in lora_layers(lm).values():
            torch.nn.init.normal_(layer.lora_B.weight, std=0.05)
    if ttt:
        splice(lm, TTTConfig(**({"layers": "all", "chunk_size": 5, "num_heads": 2} | config)))
        randomise_memories(lm)
        for layer in lm.transformer.layers:
            layer.seq_modeling_block.memory.cast_projections(dtype)
    return lm.eval()


def logits(lm):
    with torch.no_grad():
        out = lm(codes_for(lm, 2, 25))
    return torch.cat([out.text_logits.flatten(), out.logits[out.mask].flatten()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "what",
    [
        {},
        {"lora": False},
        {"ttt": False},
        {"memory": "ttt_linear", "placement": "after_attention", "decay": 0.0},
        {"memory": "lact", "projection": "shared"},
        {"memory": "lact", "stacked": 2, "residual": True, "momentum": False, "head_dim": 8},
        {"memory": "atlas", "polynomial": "outer", "projection": "shared"},
        {"memory": "atlas", "deep": False, "window": 1, "polynomial": "none"},
    ],
    ids=["lora+memory", "memory", "lora", "linear", "lact", "stacked", "atlas", "titans"],
)
def test_a_loaded_model_is_the_saved_one_to_the_bit(base, tmp_path, dtype, what):
    lm = trained(base, dtype=dtype, **what)
    folder = save_checkpoint(lm, tmp_path / "checkpoint_000500", base, extra={"step": 500})
    files = {p.name for p in folder.iterdir()}
    lora, ttt = what.get("lora", True), what.get("ttt", True)
    wanted = {"config.json", "ttt.json"}
    wanted |= {"lora.safetensors"} if lora else set()
    wanted |= {"ttt.safetensors"} if ttt else set()
    assert files == wanted
    assert json.loads((folder / "config.json").read_text())["lora"] is lora
    got = load(tmp_path / "checkpoint_000500")
    assert isinstance(got.lm, HybridLMModel) == ttt
    assert got.lm.dtype == dtype
    assert got.about["step"] == 500
    want = logits(lm)
    assert want.isfinite().all()
    assert torch.equal(logits(got.lm), want)
    assert not torch.equal(logits(load_base(base, dtype=dtype)), want)


def test_w0_stays_float32_in_a_bfloat16_checkpoint(base, tmp_path):
    folder = save_checkpoint(trained(base, dtype=torch.bfloat16), tmp_path / "c", base)
    tensors = load_file(folder / "ttt.safetensors")
    assert {str(t.dtype) for k, t in tensors.items() if "proj" in k} == {"torch.bfloat16"}
    assert {str(t.dtype) for k, t in tensors.items() if "proj" not in k} == {"torch.float32"}


def test_stock_moshi_loads_the_lora_file_and_config(base, tmp_path):
    lm = trained(base, ttt=False)
    folder = save_checkpoint(lm, tmp_path / "c", base)
    info = CheckpointInfo.from_hf_repo(
        "not/used", config_path=folder / "config.json", lora_weights=folder / "lora.safetensors"
    )
    stock = info.get_moshi(dtype=torch.float32, fuse_lora=False)
    assert torch.equal(logits(stock.eval()), logits(lm))
    fused = info.get_moshi(dtype=torch.float32, fuse_lora=True)
    assert not any(isinstance(m, LoRALinear) for m in fused.modules())
    assert (logits(fused.eval()) - logits(lm)).abs().max() < 1e-4


@pytest.mark.parametrize("ttt", [True, False])
def test_merged_and_full_checkpoints(base, tmp_path, ttt):
    lm = trained(base, ttt=ttt)
    folder = save_checkpoint(lm, tmp_path / "c", base, full=True)
    assert (folder / "consolidated.safetensors").is_file()
    assert not (folder / "lora.safetensors").exists()
    assert (folder / "ttt.safetensors").exists() == ttt
    got = load(folder)
    assert (logits(got.lm) - logits(lm)).abs().max() < 1e-4
    if not ttt:
        stock = get_moshi_lm(
            folder / "consolidated.safetensors", base.lm_config, dtype=torch.float32
        )
        assert torch.equal(logits(stock.eval()), logits(got.lm))
    full = load_base(base, dtype=torch.float32)
    torch.nn.init.normal_(full.text_linear.weight)
    saved = save_checkpoint(full, tmp_path / "full", base, full=True)
    assert torch.equal(logits(load(saved).lm), logits(full))
    assert set(full_state_dict(full)) == set(full.state_dict())


def test_refusals_name_what_is_wrong(base_folder, base, tmp_path):
    folder = save_checkpoint(trained(base), tmp_path / "c", base)

    def damaged(name, change):
        out = tmp_path / name
        shutil.copytree(folder, out)
        change(out)
        return out

    other = tmp_path / "other"
    shutil.copytree(base_folder, other)
    weights = load_file(other / "model.safetensors")
    weights["text_linear.weight"][3, 3] += 1
    save_file(weights, other / "model.safetensors")
    with pytest.raises(UserError, match="fingerprints differ"):
        load(folder, base=other)

    def chunk(out):
        about = json.loads((out / "ttt.json").read_text())
        about["ttt"]["chunk_size"] = 7
        (out / "ttt.json").write_text(json.dumps(about))

    with pytest.raises(UserError, match="chunk_size"):
        load(damaged("chunk", chunk))
    with pytest.raises(UserError, match="chunk_size 5, not 16"):
        load(folder, ttt=TTTConfig(layers="all", num_heads=2))

    def older(out):
        about = json.loads((out / "ttt.json").read_text())
        del about["ttt"]["write_every"], about["ttt"]["writing"]
        (out / "ttt.json").write_text(json.dumps(about))

    assert load(damaged("older", older)).ttt == load(folder).ttt
    with pytest.raises(UserError, match="write_every 1, not 2"):
        load(folder, ttt=TTTConfig(layers="all", chunk_size=5, num_heads=2, write_every=2))

    def edit(file, change):
        def apply(out):
            tensors = load_file(out / file)
            change(tensors)
            save_file(tensors, out / file)

        return apply

    key = "transformer.layers.0.seq_modeling_block.memory.W1"
    lacks = damaged("lacks", edit("ttt.safetensors", lambda t: t.pop(key)))
    with pytest.raises(UserError, match=f"lacks {key}"):
        load(lacks)
    surplus = {"surplus.x": torch.zeros(1)}
    extra = damaged("extra", edit("ttt.safetensors", lambda t: t.update(surplus)))
    with pytest.raises(UserError, match=r"has surplus\.x"):
        load(extra)
    first = "depformer_in.0.lora_A.weight"
    lora = damaged("lora", edit("lora.safetensors", lambda t: t.pop(first)))
    with pytest.raises(UserError, match=r"lacks .*lora_A"):
        load(lora)
    with pytest.raises(UserError, match="format 9"):
        load(damaged("format", lambda out: (out / "ttt.json").write_text('{"format": 9}')))
    with pytest.raises(UserError, match="not a checkpoint"):
        load(tmp_path)
    with pytest.raises(UserError, match="not JSON"):
        load(damaged("json", lambda out: (out / "ttt.json").write_text("{")))

    quantised = tmp_path / "quantised"
    shutil.copytree(base_folder, quantised)
    weights = load_file(base_folder / "model.safetensors")
    save_file(weights | {"text_linear.weight_scb": torch.zeros(1)}, quantised / "model.safetensors")
    with pytest.raises(UserError, match="quantised"):
        load_base(find_base(quantised))


def test_a_runs_folder_is_no_checkpoint_and_the_newest_in_it_is_named(tmp_path):
    inside = tmp_path / "run" / "checkpoints"
    for step in (2, 10):
        (inside / f"checkpoint_{step:06}").mkdir(parents=True)
    for given in (inside, inside.parent):
        with pytest.raises(UserError, match=r"run.* is not a checkpoint: it has no ttt.json; did "
                           r"you mean .*run/checkpoints/checkpoint_000010\?"):  # fmt: skip
            load(given)
    with pytest.raises(UserError, match=r"not a checkpoint: .* there is no such folder"):
        load(tmp_path / "none")


def test_verify_base_reads_all_of_it(base_folder, tmp_path):
    """A change between the sampled places: the fingerprint misses it, the whole hash does not."""
    mine = tmp_path / "base"
    shutil.copytree(base_folder, mine)
    big = {"a": torch.zeros(100_000)}
    save_file(big, tmp_path / "big.safetensors")
    before = fingerprint(tmp_path / "big.safetensors"), file_hash(tmp_path / "big.safetensors")
    big["a"][20_000] = 1
    save_file(big, tmp_path / "big.safetensors")
    assert fingerprint(tmp_path / "big.safetensors") == before[0]
    assert file_hash(tmp_path / "big.safetensors") != before[1]
    folder = save_checkpoint(trained(find_base(mine)), tmp_path / "c", find_base(mine))
    load(folder, verify_base=True)
    about = json.loads((folder / "ttt.json").read_text())
    about["base"]["sha256"] = "0" * 64
    (folder / "ttt.json").write_text(json.dumps(about))
    load(folder)
    with pytest.raises(UserError, match="whole file's hash"):
        load(folder, verify_base=True)


def test_an_interrupted_save_leaves_the_older_checkpoint(base, tmp_path, monkeypatch):
    target = tmp_path / "c"
    save_checkpoint(trained(base), target, base, extra={"step": 1})

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moshi_ttt.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(trained(base), target, base, extra={"step": 2})
    assert json.loads((target / "consolidated" / "ttt.json").read_text())["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_lora_of_another_rank_or_model_is_refused(base, tmp_path):
    folder = save_checkpoint(trained(base, ttt=False), tmp_path / "c", base)
    with pytest.raises(UserError, match=r"size mismatch|shape"):
        load_lora(load_base(base, dtype=torch.float32), folder / "lora.safetensors", 8, 2.0)
    with pytest.raises(UserError, match="does not exist"):
        load_lora(load_base(base), tmp_path / "nothing.safetensors", 4, 2.0)


def test_bases_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        find_base(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"moshi_name": "missing.safetensors"}')
    with pytest.raises(UserError, match=r"missing\.safetensors does not exist"):
        find_base(tmp_path)
    with pytest.raises(UserError, match="hub cannot be reached"):
        find_base("nobody/no-such-model")


def test_pickles_are_not_read(base_folder, tmp_path):
    mine = tmp_path / "base"
    shutil.copytree(base_folder, mine)
    torch.save({}, mine / "model.pt")
    config = json.loads((mine / "config.json").read_text())
    (mine / "config.json").write_text(json.dumps(config | {"moshi_name": "model.pt"}))
    with pytest.raises(UserError, match=r"model\.pt is not a \.safetensors"):
        find_base(mine)
