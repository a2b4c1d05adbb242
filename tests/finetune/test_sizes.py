"""Models of a named size: random weights, trained on codes, with neither base nor Mimi at hand."""

import json
import shutil
import socket
from dataclasses import replace

import pytest
import torch
import yaml
from moshi.models.loaders import CheckpointInfo, _lm_kwargs, get_moshi_lm

from eval.librilight import main as librilight
from finetune.data.manifest import read_manifest
from finetune.load_args import load_args
from finetune.memory_use import planned
from finetune.model import UNTRAINED, codec_needed, find_base_of
from finetune.sizes import SIZES
from finetune.train import train
from moshi_ttt.base import find_base, fingerprint, load_base
from moshi_ttt.checkpoint import load
from moshi_ttt.errors import UserError
from moshi_ttt.tiny.model import ASSETS
from tests.finetune.recordings import encode, make, write_manifest
from tests.finetune.small_run import checkpoint, lines, logits, weights

NAMED = {"125m": 125e6, "350m": 350e6, "760m": 760e6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, base):
    """Codes without transcripts, codes with them, and a config; `base` is only their Mimi's."""
    root = tmp_path_factory.mktemp("sizes")
    (root / "audio").mkdir()
    make(root / "audio")
    encode(root / "audio" / "m.jsonl", root / "words", base)
    for transcript in (root / "audio").glob("*.json"):
        transcript.unlink()
    encode(root / "audio" / "m.jsonl", root / "codes", base)
    values = {
        "run_dir": "run",
        "moshi_paths": {"size": "tiny"},
        "data": {"train_data": str(root / "codes/codes.jsonl")},
        "full_finetuning": True,
        "ttt": {"memory": "ttt_linear", "layers": "all", "chunk_size": 4, "num_heads": 2},
        "duration_sec": 0.8,
        "batch_size": 2,
        "max_steps": 2,
        "eval": {"eval_after_training": False},
        "optim": {"lr": 1e-3, "schedule": "cosine"},
    }
    (root / "c.yaml").write_text(yaml.safe_dump(values))
    return root


@pytest.fixture
def away(tmp_path, monkeypatch):
    """A working folder of its own, and no network."""

    def refused(*_, **__):
        raise AssertionError("the network was tried")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    return tmp_path


def run(folder, run_dir, **overrides):
    keys = {k.replace("__", "."): v for k, v in overrides.items()}
    train(str(folder / "c.yaml"), **{"run_dir": str(run_dir), **keys})
    return run_dir


@pytest.mark.parametrize("name", NAMED)
def test_a_size_has_about_as_many_parameters_as_its_name_says(folder, name):
    args = load_args(folder / "c.yaml", {"moshi_paths.size": name, "ttt": "none"})
    lm, _ = planned(SIZES[name], args, 4)
    assert sum(p.numel() for p in lm.parameters()) == pytest.approx(NAMED[name], rel=0.03)


def test_sizes_have_moshis_streams(folder):
    for name, size in SIZES.items():
        assert set(size) == set(_lm_kwargs)
        for key in ("n_q", "dep_q", "delays", "norm", "gating", "existing_text_padding_id"):
            assert size[key] == _lm_kwargs[key], (name, key)
        if name != "tiny":
            for key in ("card", "text_card", "context"):
                assert size[key] == _lm_kwargs[key], (name, key)
    mimi = json.loads((ASSETS / "mimi_config.json").read_text())
    assert SIZES["tiny"]["card"] == mimi["quantizer"]["bins"]


def test_trained_scored_saved_and_loaded_without_base_mimi_or_network(folder, away):
    codes = str(folder / "codes/codes.jsonl")
    out = run(folder, away / "run", data__eval_data=codes, do_eval=True, eval_freq=1)
    assert [line["step"] for line in lines(out)] == [1, 2]
    assert all(line["nll_text"] is None for line in lines(out))
    scored = lines(out, "held_out")
    assert [line["step"] for line in scored] == [1, 2]
    untrained = torch.tensor(64.0).log()
    assert abs(scored[0]["nll_codebook0"] - untrained) < 1

    shutil.rmtree(UNTRAINED)  # a checkpoint is all one needs
    moved = away / "elsewhere"
    shutil.copytree(checkpoint(out), moved)
    loaded = load(moved)
    assert loaded.ttt is not None
    assert {k for k in weights(out) if "seq_modeling_block" not in k} == set(
        get_moshi_lm(None, dict(SIZES["tiny"]), "meta", torch.float32).state_dict()
    )
    assert loaded.about["full"]
    assert loaded.about["base"]["stock"] == fingerprint(loaded.base.info.moshi_weights)
    began = load_base(loaded.base, dtype=torch.float32)
    assert not torch.equal(logits(loaded.lm), logits(began))
    with pytest.raises(UserError, match=r"base .*/base has no Mimi, .* codes .*mimi\.safetensors"):
        loaded.base.info.get_mimi()

    more = ["--min-minutes", "0.001", "--arms", "base,kept", "--out", str(away / "eval")]
    librilight(["--checkpoint", str(moved), "--data", codes, "--device", "cpu", *more])
    results = json.loads((away / "eval/results.json").read_text())
    assert set(results["arms"]) == {"base", "kept"}
    manifest = str(folder / "audio/m.jsonl")
    with pytest.raises(UserError, match=r"m\.jsonl:\d: this is audio, and base .* has no Mimi"):
        librilight(["--checkpoint", str(moved), "--data", manifest, "--device", "cpu", *more[:4]])


def test_stock_moshi_takes_its_own_mimi_and_tokenizer_for_such_a_checkpoint(folder, away):
    out = checkpoint(run(folder, away / "run", ttt="none", max_steps=1))
    config = json.loads((out / "config.json").read_text())
    assert not {"mimi_name", "tokenizer_name"} & set(config)
    info = CheckpointInfo.from_hf_repo(
        "none", moshi_weights=out / "consolidated.safetensors", config_path=out / "config.json",
        mimi_weights=ASSETS / "mimi.safetensors", tokenizer=ASSETS / "tokenizer.model",
    )  # fmt: skip
    stock = info.get_moshi(dtype=torch.float32)
    assert torch.equal(logits(stock), logits(load(out).lm))


def test_a_run_goes_on_where_it_was(folder, away):
    straight = run(folder, away / "straight", max_steps=3, ckpt_freq=2, num_ckpt_keep=None)
    shutil.copytree(straight, away / "cut")
    shutil.rmtree(away / "cut/checkpoints/checkpoint_000003")
    (away / "cut/summary.txt").unlink()
    run(folder, away / "cut", max_steps=3, ckpt_freq=2, num_ckpt_keep=None, resume=True)
    theirs = weights(straight)
    assert all(torch.equal(value, theirs[key]) for key, value in weights(away / "cut").items())
    with pytest.raises(UserError, match="another config"):
        run(folder, away / "cut", max_steps=3, ckpt_freq=2, num_ckpt_keep=None, seed=1, resume=True)


def test_the_seed_makes_the_weights(folder, away):
    args = load_args(folder / "c.yaml")
    one, again = find_base_of(args), find_base_of(args)
    other = find_base_of(replace(args, seed=1))
    assert one.name == again.name
    assert fingerprint(one.info.moshi_weights) != fingerprint(other.info.moshi_weights)
    before = torch.get_rng_state()
    lms = [load_base(b, dtype=torch.float32) for b in (one, again, other)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(logits(lms[0]), logits(lms[1]))
    assert not torch.equal(logits(lms[0]), logits(lms[2]))
    wide = load_base(one, wider=4, dtype=torch.float32)
    assert wide.context == 4 * lms[0].context


def test_words_need_a_tokenizer_and_audio_a_mimi(folder, away):
    words = str(folder / "words/codes.jsonl")
    with pytest.raises(UserError, match=r"transcript \('\w+'\) needs a tokenizer.*tokenizer_path"):
        run(folder, away / "run", data__train_data=words)
    tokenizer = str(ASSETS / "tokenizer.model")
    out = run(folder, away / "run", data__train_data=words, moshi_paths__tokenizer_path=tokenizer)
    assert any(line["nll_text"] is not None for line in lines(out))
    found = find_base(checkpoint(out) / "base").info.get_text_tokenizer()
    assert len(found) == SIZES["tiny"]["text_card"]
    audio = str(folder / "audio/m.jsonl")
    with pytest.raises(UserError, match=r"m\.jsonl:1: this is audio.* moshi_paths\.mimi_path"):
        run(folder, away / "audio", data__train_data=audio)
    with pytest.raises(UserError, match=r"64 codes a codebook, but the model knows 2048"):
        run(folder, away / "audio", moshi_paths__size="125m")
    assert not (away / "audio").exists()


def test_codes_of_another_codec_are_refused(folder, away):
    lines = [json.loads(line) for line in (folder / "codes/codes.jsonl").read_text().splitlines()]
    others = [line | {"codec": "0" * 40, "shard": str(folder / "codes" / line["shard"])}
              for line in lines]  # fmt: skip
    other = read_manifest(write_manifest(away / "other.jsonl", others))
    args = load_args(folder / "c.yaml")
    from finetune.data.manifest import Source, read_sources

    base = find_base_of(args, read_sources(args.data.train_data))
    assert not codec_needed(base, read_sources(args.data.train_data))
    with pytest.raises(UserError, match=r"other\.jsonl:1: its codes are of another codec \(0000"):
        codec_needed(base, [Source(away / "other.jsonl", 1.0, tuple(other))])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"moshi_paths.size": "3m"}, r"size must be one of tiny, 125m, .*got '3m'"),
        ({"moshi_paths.hf_repo_id": "a/b"}, r"hf_repo_id is 'a/b', but size is 'tiny'"),
        (
            {"moshi_paths.hf_repo_id": "kyutai/moshiko-pytorch-bf16"},
            r"hf_repo_id is 'kyutai/moshiko-pytorch-bf16', but size is 'tiny'",
        ),
        ({"moshi_paths.moshi_path": "x"}, r"moshi_path is 'x', but size is 'tiny'"),
        ({"full_finetuning": False}, r"full_finetuning is false, but moshi_paths.size is 'tiny'"),
        ({"lora.enable": True}, r"full_finetuning and lora.enable contradict each other"),
    ],
)
def test_what_contradicts_a_size(folder, values, message):
    with pytest.raises(UserError, match=message):
        load_args(folder / "c.yaml", values)


def test_a_run_with_a_size_is_read_back(folder, tmp_path):
    args = load_args(folder / "c.yaml")
    (tmp_path / "back.yaml").write_text(yaml.safe_dump(args.to_dict()))
    assert load_args(tmp_path / "back.yaml") == args
