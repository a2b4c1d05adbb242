"""Configs: moshi-finetune's are accepted, ours are, and each mistake names file, line and value."""

from dataclasses import fields, replace

import fire
import pytest
import yaml

from finetune.args import (
    DataArgs,
    EvalArgs,
    LoraArgs,
    ModelPaths,
    OptimArgs,
    TrainArgs,
    WandbArgs,
)
from finetune.load_args import load_args
from moshi_ttt.config import TTTConfig
from moshi_ttt.errors import UserError
from tests.finetune.small_run import ROOT

PEER = """\
# every key of moshi-finetune
data:
  eval_data: ''
  shuffle: true
  train_data: 'data/daily.jsonl:0.7,data/phone.jsonl:0.3'
moshi_paths:
  hf_repo_id: "kyutai/moshiko-pytorch-bf16"
  mimi_path: null
  moshi_path:
  tokenizer_path: null
  config_path: null
full_finetuning: false
lora:
  enable: true
  rank: 128
  scaling: 2.
  ft_embed: false
first_codebook_weight_multiplier: 100.
text_padding_weight: .5
duration_sec: 100
batch_size: 16
num_microbatches: 1
max_steps: 2000
max_norm: 1.0
gradient_checkpointing: true
optim:
  lr: 2e-6
  weight_decay: 0.1
  pct_start: 0.05
seed: 0
log_freq: 1
eval_freq: 100
do_eval: false
do_ckpt: true
ckpt_freq: 100
num_ckpt_keep: 3
save_adapters: true
param_dtype: bfloat16
overwrite_run_dir: false
run_dir: "runs/daily"
wandb:
  project: ""
  run_name: null
  offline: true
  key: ""
"""

OURS = """\
data: {train_data: a.jsonl}
run_dir: runs/x
lora:
  enable: true
ttt:
  layers: every:2
  chunk_size: 8
"""


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return path

    return write


def test_moshi_finetunes_keys_keep_their_meaning(config):
    args = load_args(config(PEER))
    assert args == TrainArgs(
        data=DataArgs(train_data="data/daily.jsonl:0.7,data/phone.jsonl:0.3", shuffle=True),
        run_dir="runs/daily",
        lora=LoraArgs(enable=True, rank=128, scaling=2.0),
        first_codebook_weight_multiplier=100.0,
        duration_sec=100.0,
        batch_size=16,
        max_steps=2000,
        optim=OptimArgs(lr=2e-6),
        eval_freq=100,
        ckpt_freq=100,
        wandb=WandbArgs(offline=True),
    )
    assert isinstance(args.optim.lr, float)
    assert args.ttt is None
    assert args.optim.schedule == "onecycle"


def test_what_is_saved_is_read_back(config):
    args = load_args(config(OURS), {"optim.betas": [0.8, 0.9], "ttt.layers": [1, 3]})
    assert args.ttt is not None
    assert args.ttt.layers == (1, 3)
    assert load_args(config(yaml.safe_dump(args.to_dict()))) == args
    peer = load_args(config(PEER))
    assert load_args(config(yaml.safe_dump(peer.to_dict()))) == peer


@pytest.mark.parametrize(
    ("text", "ttt"),
    [
        ("ttt: null", None),
        ("ttt: false", None),
        ("ttt: {}", TTTConfig()),
        ("ttt: true", TTTConfig()),
        ("ttt: {memory: ttt_linear, layers: [0, 2]}", TTTConfig("ttt_linear", (0, 2))),
        ("ttt: {writing: off, write_every: 4}", TTTConfig(writing=False, write_every=4)),
        ("ttt: {writing: on}", TTTConfig()),
    ],
)
def test_the_memory_block(config, text, ttt):
    body = "data: {train_data: a.jsonl}\nrun_dir: r\nlora: {enable: true}\n"
    assert load_args(config(body + text)).ttt == ttt


def test_the_four_kinds_of_training(config):
    head = "data: {train_data: a.jsonl}\nrun_dir: r\n"
    both = load_args(config(head + "lora: {enable: true}\nttt: {}"))
    assert both.lora.enable
    assert both.ttt
    assert load_args(config(head + "lora: {enable: true}")).ttt is None
    assert not load_args(config(head + "lora: null\nttt: {}")).lora.enable
    full = load_args(config(head + "full_finetuning: true\nttt: {}"))
    assert full.full_finetuning
    assert full.ttt


def test_overrides(config):
    path = config(OURS)
    args = load_args(
        path,
        {
            "max_steps": 7,
            "optim.lr": "3e-4",
            "ttt.layers": "every:4",
            "wandb.project": "p",
            "wandb_offline": True,
            "do_ckpt": "false",
            "run_dir": 2024,
            "duration_sec": 2,
            "num_ckpt_keep": "null",
            "batch_size": 4.0,
        },
    )
    assert args.max_steps == 7
    assert args.optim.lr == 3e-4
    assert args.ttt == TTTConfig(layers="every:4", chunk_size=8)
    assert args.wandb == WandbArgs(project="p", offline=True)
    assert not args.do_ckpt
    assert args.run_dir == "2024"
    assert args.duration_sec == 2.0
    assert args.num_ckpt_keep is None
    assert args.batch_size == 4


@pytest.mark.parametrize("layers", [(0, 2), [0, 2], "[0, 2]"])
def test_layers_from_the_command_line(config, layers):
    args = load_args(config(OURS), {"ttt.layers": layers})
    assert args.ttt
    assert args.ttt.layers == (0, 2)


def test_a_section_is_switched_off_or_made(config):
    assert load_args(config(OURS), {"ttt": "false"}).ttt is None
    off = OURS.replace("ttt:\n  layers: every:2\n  chunk_size: 8\n", "ttt: null\n")
    assert load_args(config(off), {"ttt.chunk_size": 4}).ttt == TTTConfig(chunk_size=4)
    assert load_args(config(off), {"ttt.writing": "off"}).ttt == TTTConfig(writing=False)


UNKNOWN = [
    ("max_step: 3", {}, "c.yaml:8: unknown key 'max_step' (value 3); did you mean 'max_steps'?"),
    ("lr: 1", {}, "c.yaml:8: unknown key 'lr' (value 1); did you mean 'optim.lr'?"),
    (
        "eval:\n  max_item: 2",
        {},
        "c.yaml:9: unknown key 'eval.max_item' (value 2); did you mean 'e",
    ),
    ("", {"ttt.layer": 1}, "--ttt.layer: unknown key 'ttt.layer' (value 1); did you mean 'ttt.la"),
    ("", {"wandb_ofline": True}, "--wandb_ofline: unknown key 'wandb_ofline' (value True); known"),
    ("", {"otpim.lr": 1}, "unknown key 'otpim' (value {'lr': 1}); did you mean 'optim'?"),
]
TYPES = [
    ("max_steps: many", {}, "c.yaml:8: max_steps must be a whole number, got 'many'"),
    ("max_steps: 1.5", {}, "c.yaml:8: max_steps must be a whole number, got 1.5"),
    ("max_steps: true", {}, "c.yaml:8: max_steps must be a whole number, got True"),
    ("max_steps: null", {}, "c.yaml:8: max_steps must be a whole number, got None"),
    ("duration_sec: .nan", {}, "c.yaml:8: duration_sec must be a number, got nan"),
    ("duration_sec: [1]", {}, "c.yaml:8: duration_sec must be a number, got [1]"),
    ("do_ckpt: 3", {}, "c.yaml:8: do_ckpt must be true or false, got 3"),
    ("optim: 3", {}, "c.yaml:8: optim must be a section of keys, got 3"),
    ("optim:\n  betas: 0.9", {}, "c.yaml:9: optim.betas must be a list, got 0.9"),
    ("optim:\n  betas: [0.9]", {}, "c.yaml:9: optim.betas must be a list of 2, got [0.9]"),
    ("num_ckpt_keep: x", {}, "num_ckpt_keep must be a whole number or null, got 'x'"),
    ("", {"run_dir": True}, "--run_dir: run_dir must be text, got True"),
    ("", {"run_dir": 1.5}, "--run_dir: run_dir must be text, got 1.5"),
    ("", {"ttt.layers": 3}, "--ttt.layers: ttt.layers must be a list or text, got 3"),
    ("", {"ttt": 3}, "--ttt: ttt must be a section of keys or null, got 3"),
]
RANGES = [
    ("max_steps: 0", {}, "c.yaml:8: max_steps must be at least 1, got 0"),
    ("seed: -1", {}, "c.yaml:8: seed must be at least 0, got -1"),
    ("batch_size: 0", {}, "c.yaml:8: batch_size must be at least 1, got 0"),
    ("num_microbatches: 0", {}, "c.yaml:8: num_microbatches must be at least 1, got 0"),
    ("log_freq: 0", {}, "c.yaml:8: log_freq must be at least 1, got 0"),
    ("num_ckpt_keep: 0", {}, "c.yaml:8: num_ckpt_keep must be at least 1, got 0"),
    ("duration_sec: 0", {}, "c.yaml:8: duration_sec must be positive, got 0"),
    ("max_norm: -1", {}, "c.yaml:8: max_norm must be positive, got -1"),
    ("text_padding_weight: -1", {}, "c.yaml:8: text_padding_weight must be at least 0, got -1"),
    ("first_codebook_weight_multiplier: 0", {}, "multiplier must be positive, got 0"),
    ("param_dtype: int8", {}, "c.yaml:8: param_dtype must be one of bfloat16, float32, got 'int8'"),
    ("optim:\n  lr: -2e-6", {}, "c.yaml:9: optim.lr must be positive, got -2e-06"),
    ("optim: {gate_lr: 0}", {}, "c.yaml:8: optim.gate_lr must be positive, got 0"),
    ("optim: {weight_decay: -1}", {}, "c.yaml:8: optim.weight_decay must be at least 0, got -1"),
    ("optim: {pct_start: 1}", {}, "c.yaml:8: optim.pct_start must be below 1, got 1"),
    ("optim: {betas: [0.9, 1.0]}", {}, "c.yaml:8: optim.betas must each be in [0, 1), got [0.9, 1"),
    ("optim: {schedule: step}", {}, "c.yaml:8: optim.schedule must be one of onecycle, cosine, go"),
    ("eval: {max_items: 0}", {}, "c.yaml:8: eval.max_items must be at least 1, got 0"),
    ("eval: {frames_per_call: 0}", {}, "c.yaml:8: eval.frames_per_call must be at least 1, got 0"),
    ("", {"lora.rank": 0}, "--lora.rank: lora.rank must be at least 1, got 0"),
    ("", {"lora.scaling": 0}, "--lora.scaling: lora.scaling must be positive, got 0"),
    ("", {"ttt.chunk_size": 0}, "--ttt.chunk_size: ttt.chunk_size must be a whole number of at"),
    ("", {"ttt.write_every": 0}, "--ttt.write_every: ttt.write_every must be a whole number of at"),
    ("", {"ttt.writing": 3}, "--ttt.writing: ttt.writing must be true or false, got 3"),
    ("", {"ttt.memory": "rnn"}, "--ttt.memory: ttt.memory 'rnn' is unknown"),
    ("", {"data.mono_side": "left"}, "data.mono_side must be one of moshi, user, got 'left'"),
    ("", {"data.encode_workers": 0}, "data.encode_workers must be at least 1, got 0"),
    ("", {"data.train_data": " "}, "--data.train_data: data.train_data is empty"),
    ("", {"data.codes_cache": ""}, "--data.codes_cache: data.codes_cache is empty"),
    ("", {"run_dir": ""}, "--run_dir: run_dir is empty"),
]
TOGETHER = [
    ("full_finetuning: true", {}, "c.yaml:8: full_finetuning and lora.enable contradict"),
    ("", {"ttt": None, "lora.enable": False}, "nothing to train"),
    (
        "",
        {"lora.enable": False, "lora.ft_embed": True},
        "--lora.ft_embed: lora.ft_embed needs lora",
    ),
    ("do_eval: true", {}, "c.yaml:8: do_eval is true, but data.eval_data and eval.librilight_data"),
    (
        "moshi_paths:\n  hf_repo_id: null\n  moshi_path: m",
        {},
        "c.yaml:9: moshi_paths.hf_repo_id is",
    ),
]


@pytest.mark.parametrize(("text", "overrides", "message"), UNKNOWN + TYPES + RANGES + TOGETHER)
def test_a_mistake_names_place_key_and_value(config, text, overrides, message):
    path = config(OURS + text)
    with pytest.raises(UserError) as error:
        load_args(path, overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    if not overrides:
        assert str(path) in str(error.value)


def test_another_memory_on_the_command_line_is_told_what_to_take_out():
    lact, tiny = ROOT / "configs/tiny_lact.yaml", ROOT / "configs/tiny.yaml"
    with pytest.raises(UserError) as refused:
        load_args(lact, {"ttt.memory": "ttt_mlp"})
    said = str(refused.value)
    assert "ttt.momentum is no option of ttt_mlp, got True, nor muon, low_rank, stacked: " in said
    assert "set to null what ttt_mlp lacks (it has base_lr, decay, conv_width, write_every" in said
    with pytest.raises(
        UserError, match=r"tiny.yaml:\d+: ttt.decay is no option of lact, got 0.005: "
    ):
        load_args(tiny, {"ttt.memory": "lact"})
    assert load_args(tiny, {"ttt.memory": "lact", "ttt.decay": None}).ttt.memory == "lact"


def test_a_key_of_wandb_is_refused_and_not_repeated(config):
    with pytest.raises(UserError, match="WANDB_API_KEY") as error:
        load_args(config(OURS + "wandb:\n  project: p\n  key: s3cret"))
    assert "c.yaml:10: wandb.key" in str(error.value)
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run_dir: x", "c.yaml: the key 'data' is missing"),
        ("data: {train_data: a}", "c.yaml: the key 'run_dir' is missing"),
        ("seed: 1\nrun_dir: x\nseed: 2", "c.yaml:3: the key 'seed' stands here a second time"),
        ("a: [1\nb: 2", "c.yaml:2: not yaml"),
        ("- a\n- b", "c.yaml:1: a config is a mapping"),
        ("", "c.yaml:1: a config is a mapping"),
    ],
)
def test_a_file_that_is_no_config(config, text, message):
    with pytest.raises(UserError) as error:
        load_args(config(text))
    assert message in str(error.value)


def test_no_such_file_and_not_text(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: no such config file"):
        load_args(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(UserError, match=r"b\.yaml: not text in UTF-8"):
        load_args(tmp_path / "b.yaml")


def test_checks_hold_without_a_file():
    args = TrainArgs(data=DataArgs("a"), run_dir="r", ttt=TTTConfig())
    with pytest.raises(UserError, match="batch_size"):
        replace(args, batch_size=0)


def test_every_key_is_documented():
    for cls in (ModelPaths, LoraArgs, DataArgs, OptimArgs, WandbArgs, EvalArgs):
        for field in fields(cls):
            assert f"{field.name}:" in (cls.__doc__ or "")


def test_through_fire(config):
    path = config(OURS)

    def load(*words):
        found = []
        fire.Fire(lambda config, **keys: found.append(load_args(config, keys)), [str(path), *words])
        return found[0]

    got = load(
        "--ttt.layers=every:4",
        "--optim.lr",
        "2e-6",
        "--max_steps",
        "100",
        "--data.train_data",
        "data/a.jsonl:0.7,b.jsonl",
        "--do_ckpt=false",
        "--wandb_offline",
    )
    assert got.ttt == TTTConfig(layers="every:4", chunk_size=8)
    assert got.optim.lr == 2e-6
    assert got.max_steps == 100
    assert got.data.train_data == "data/a.jsonl:0.7,b.jsonl"
    assert not got.do_ckpt
    assert got.wandb.offline
    assert load("--ttt.layers", "[0,2]").ttt.layers == (0, 2)
    assert load("--ttt.layers", "1,3").ttt.layers == (1, 3)
    with pytest.raises(UserError, match="--max_step: unknown key"):
        load("--max_step", "3")


@pytest.mark.parametrize("word", ["none", "'none'"])
def test_none_is_a_polynomial_and_not_null(config, word):
    text = f"{OURS}  memory: atlas\n  polynomial: {word}\n"
    assert load_args(config(text)).ttt.polynomial == "none"
    given = {"ttt.memory": "atlas", "ttt.polynomial": "none"}
    assert load_args(config(OURS), given).ttt.polynomial == "none"
    unsaid = f"{OURS}  memory: atlas\n  polynomial: null\n"
    assert load_args(config(unsaid)).ttt.polynomial == "elementwise"
