"""Bytes that a run needs, said before anything is fetched; and hubs that do not answer."""

import json
import socket
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch

from finetune.corpora import daily_talk
from finetune.load_args import load_args
from finetune.memory_use import check_fits, estimate, need_of, planned
from finetune.model import build_model, find_base_of
from finetune.optim import parameter_groups
from finetune.train import train
from finetune.world import Rows
from moshi_ttt.errors import UserError
from tests.finetune.small_run import ROOT


@pytest.fixture
def no_network(monkeypatch):
    """Every attempt to reach something is noted and refused."""
    tried = []

    def refused(*args, **_):
        tried.append(args)
        raise OSError("the network is blocked by this test")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    return tried


SEVEN_B = [
    {"moshi_paths.hf_repo_id": "kyutai/moshiko-pytorch-bf16"},
    {"moshi_paths.hf_repo_id": "kyutai/moshika-pytorch-bf16", "ttt": "none"},
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
@pytest.mark.parametrize("values", SEVEN_B)
def test_the_7b_without_a_gpu_is_refused_before_any_download(world, tmp_path, no_network, values):
    values = {"data.corpus": "kyutai/DailyTalkContiguous"} | values
    message = (
        r"a model of \d+\.\d G parameters needs a CUDA GPU with about [\d,]+ bytes \(\d+ GiB\)"
    )
    with pytest.raises(UserError, match=message) as caught:
        train(str(world.config), run_dir=str(tmp_path / "run"), **values)
    assert "\n" not in str(caught.value)
    assert not no_network
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
@pytest.mark.skipif(not (ROOT / "configs/7b.yaml").exists(), reason="no configs/7b.yaml")
def test_the_7bs_own_config_too(tmp_path, no_network):
    with pytest.raises(UserError, match=r"needs a CUDA GPU with about .* bytes"):
        train(str(ROOT / "configs/7b.yaml"), run_dir=str(tmp_path / "run"))
    assert not no_network
    assert not list(tmp_path.iterdir())


def test_the_7bs_parameters_are_counted(world):
    """7.69 G in the published base; LoRA of rank 128 as moshi-finetune counts it."""
    args = load_args(world.config, {"lora.rank": 128, "ttt": "none"})
    need = estimate(None, args, 2)
    assert need.parameters - need.trainable == pytest.approx(7.69e9, rel=0.01)
    assert need.weights == 2 * need.parameters
    trained = need.gradients + need.masters + need.moments
    assert trained == need.trainable * (2 + 4 + 8)
    assert need.lanes == 0
    memory = estimate(None, load_args(world.config, {"lora.rank": 128}), 2)
    assert memory.trainable > need.trainable
    assert memory.weights > 2 * memory.parameters  # W0 and gates stay in float32
    assert memory.lanes > 0


def total(world, **values):
    return estimate(None, load_args(world.config, values), 2).total


def test_what_makes_a_run_larger_or_smaller(world):
    """Of the 7B; every one of these is some hundred megabytes, at least."""
    least = {"batch_size": 1, "duration_sec": 80, "ttt.layers": "every:4", "ttt.chunk_size": 50}
    run = total(world, **least)
    for more in (
        {"batch_size": 2}, {"duration_sec": 160}, {"lora.rank": 64}, {"ttt.layers": "every:2"},
        {"tbptt_segments": 2}, {"num_microbatches": 2}, {"carry_kv": True},
    ):  # fmt: skip
        assert total(world, **{**least, **more}) > run + 10**8, more
    for less in ({"gradient_checkpointing": True}, {"ttt": "none"}, {"ttt.memory": "ttt_linear"}):
        assert total(world, **{**least, **less}) < run - 10**8, less


def test_ranks_share_what_is_at_rest_and_nothing_else(world):
    args = load_args(world.config, {"lora.rank": 128, "gradient_checkpointing": True})
    lm, kv = planned(None, args, 2)
    one, eight = (need_of(lm, kv, args, Rows(4, 1, ranks)) for ranks in (1, 8))
    assert eight.parameters == one.parameters
    frozen = 2 * (one.parameters - one.trainable)
    assert eight.weights == pytest.approx((frozen + 4 * one.trainable) / 8, rel=1e-6)
    assert eight.gradients == pytest.approx(4 * one.trainable / 8, rel=1e-6)
    assert eight.moments == pytest.approx(one.moments / 8, rel=1e-6)
    assert eight.masters == 0  # what is sharded is its own
    assert (eight.lanes, eight.activations) == (one.lanes, one.activations)
    layer = sum(p.nbytes for p in lm.transformer.layers[-1].parameters())
    assert eight.gathered > 2 * layer
    assert one.gathered == 0
    assert eight.total < one.total


def test_a_run_that_fits_on_all_ranks_only(world, monkeypatch):
    """All of the 7B in float32 moments and gradients: 8 GPUs of 80 GB, not one."""
    args = load_args(
        world.config,
        {"lora.enable": False, "full_finetuning": True, "ttt": "none", "param_dtype": "bfloat16"},
    )
    gpu = SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    cuda = torch.device("cuda")
    with pytest.raises(UserError, match=r"about [\d,]+ bytes .* the GPU has 80,000,000,000"):
        check_fits(None, args, cuda)
    assert check_fits(None, args, cuda, Rows(2, 1, 8)).total < 80 * 10**9
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
    check_fits(None, args, cuda)
    with pytest.raises(UserError, match=r"on each of 8 GPUs, the GPU has"):
        check_fits(None, args, cuda, Rows(4000, 1, 8))


def test_a_run_that_is_too_large_for_this_machine(world):
    args = load_args(world.config, {"batch_size": 10**7})
    with pytest.raises(UserError, match=r"needs about [\d,]+ bytes .*, the machine has [\d,]+"):
        check_fits(find_base_of(args).lm_config, args, torch.device("cpu"))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"ttt": "none"},
        {"lora.enable": False},
        {"lora.ft_embed": True},
        {"lora.enable": False, "full_finetuning": True},
        {"ttt.memory": "ttt_linear", "ttt.placement": "after_attention"},
    ],
)
def test_the_count_is_that_of_the_model(world, values):
    args = load_args(world.config, values)
    base, cpu = find_base_of(args), torch.device("cpu")
    need = check_fits(base.lm_config, args, cpu)
    lm, spliced = build_model(base, args, cpu)
    groups = parameter_groups(lm, args)
    assert need.parameters == sum(p.numel() for p in lm.parameters())
    assert need.trainable == sum(p.numel() for g in groups for p in g.params)
    assert (spliced is None) == (args.ttt is None)


@pytest.fixture
def unreachable(monkeypatch, tmp_path):
    """A hub at a closed port, and an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("time.sleep", lambda _: None)  # between its six attempts, 23 s in all


def test_a_small_base_on_a_hub_that_is_away(world, tmp_path, unreachable):
    message = r"hf_repo_id 'nobody/small-moshi': the Hugging Face hub cannot be reached"
    with pytest.raises(UserError, match=message) as caught:
        world.run(tmp_path / "run", moshi_paths__hf_repo_id="nobody/small-moshi")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="hf_repo_id 'a b/c'"):
        world.run(tmp_path / "run", moshi_paths__hf_repo_id="a b/c")


def test_a_local_folder_with_one_slash_is_not_on_the_hub(world, tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(world.folder.parent)
    name = f"{world.folder.name}/base"
    world.run(tmp_path / "run", moshi_paths__hf_repo_id=name, max_steps=1)
    assert not no_network


def test_a_remote_base_that_is_too_big_is_refused_by_its_config(world, tmp_path, no_network):
    """With config_path at hand, its size is known without the hub."""
    config = json.loads((world.base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dim": 4096, "num_layers": 40}))
    with pytest.raises(UserError, match=r"needs a CUDA GPU|this run needs about"):
        world.run(
            tmp_path / "run",
            moshi_paths__hf_repo_id="nobody/large-moshi",
            moshi_paths__config_path=str(tmp_path / "config.json"),
        )
    assert not no_network


# -- the corpus ------------------------------------------------------------------------------------


def test_daily_talk_says_that_the_hub_is_away(tmp_path, monkeypatch, unreachable):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="DailyTalkContiguous: the Hugging Face hub cannot be"):
        daily_talk.prepare()
    assert not daily_talk.FOLDER.exists()


def test_daily_talk_that_is_there_needs_no_hub(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    daily_talk.FOLDER.mkdir(parents=True)
    (daily_talk.FOLDER / ".complete").touch()
    daily_talk.prepare()
    assert not no_network


def test_too_little_disk_for_a_corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    daily_talk._check_space(1000)
    with pytest.raises(UserError, match=r"has 1,[0,]+ bytes.* the disk has [\d,]+ left"):
        daily_talk._check_space(10**18)
