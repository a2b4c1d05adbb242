"""Metrics: a line of JSON each, and wandb, which may be away but never stops a run."""

import json
import logging
import math
import os

import pytest
import wandb

from finetune.load_args import load_args
from finetune.metrics import Metrics
from moshi_ttt.errors import UserError


@pytest.fixture
def quiet(monkeypatch, tmp_path):
    """No WANDB_* of the environment, no key anywhere, a home of its own."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # it reads the environment once a process
    yield
    wandb.teardown()


def metrics(world, folder, **overrides):
    folder.mkdir()
    given = {k.replace("__", "."): v for k, v in overrides.items()}
    return Metrics(folder, load_args(world.config, given))


def test_a_line_each_and_no_number_is_null(world, tmp_path):
    out = metrics(world, tmp_path / "run")
    out.log("train", 3, {"loss": 1.5, "nll_text": math.nan, "grad_norm": math.inf})
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert line.pop("seconds") >= 0
    assert line == {"kind": "train", "step": 3, "loss": 1.5, "nll_text": None, "grad_norm": None}
    out.close()
    assert not (tmp_path / "run" / "wandb").exists()


def said(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "finetune.metrics"]


def mirrored(folder):
    """The offline run's file, which holds what was logged."""
    (file,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    return file.read_bytes()


def test_offline_needs_no_network_and_no_key(world, tmp_path, quiet, caplog):
    out = metrics(world, tmp_path / "run", wandb__project="p", wandb_offline=True)
    out.log("train", 1, {"loss": 1.5, "nll_text": math.nan})
    out.log("held_out", 1, {"nll_codebook0": 2.5})
    out.close()
    wandb.teardown()  # writes what is not written yet
    found = mirrored(tmp_path / "run")
    for name in (b"train/loss", b"held_out/nll_codebook0", b"num_microbatches"):
        assert name in found
    assert not said(caplog)


@pytest.mark.parametrize(
    "key", [None, "a" * 40, "short"], ids=["no key", "closed port", "no such key"]
)
def test_what_is_wrong_with_wandb_is_said_once(world, tmp_path, quiet, monkeypatch, caplog, key):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("finetune.metrics.TIMEOUT", 1.0)
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    with caplog.at_level(logging.WARNING, "finetune.metrics"):
        out = metrics(world, tmp_path / "run", wandb__project="p")
        out.log("train", 1, {"loss": 1.5})
        out.log("train", 2, {"loss": 1.25})
        out.close()
    (line,) = said(caplog)
    assert "wandb cannot be used" in line
    assert f"offline, `wandb sync {tmp_path / 'run'}/wandb/*` later" in line
    wandb.teardown()  # writes what is not written yet
    assert b"train/loss" in mirrored(tmp_path / "run")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_wandb_that_fails_later_is_left_out(world, tmp_path, quiet, caplog, monkeypatch):
    out = metrics(world, tmp_path / "run", wandb__project="p", wandb_offline=True)
    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING, "finetune.metrics"):

        def fails(*_, **__):
            raise BrokenPipeError("its process is gone")

        real = out._wandb
        broken.setattr(type(real), "log", fails)
        out.log("train", 1, {"loss": 1.5})
        out.log("train", 2, {"loss": 1.25})
    out.close()
    assert said(caplog) == ["wandb failed (its process is gone), the run goes on without it"]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    real.finish()


def test_the_environment_may_switch_wandb_off(world, tmp_path, quiet, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    out = metrics(world, tmp_path / "run", wandb__project="p")
    out.log("train", 1, {"loss": 1.5})
    out.close()
    assert not list((tmp_path / "run").glob("wandb/*run-*"))


def test_a_key_in_the_config_names_the_variable(world):
    with pytest.raises(UserError, match="WANDB_API_KEY"):
        load_args(world.config, {"wandb.key": "abc"})
