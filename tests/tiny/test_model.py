"""The tiny base goes through moshi's own loader and streams in time."""

import json
import time

import pytest
import torch
from moshi.models import LMGen
from moshi.models.loaders import CheckpointInfo
from safetensors.torch import load_file

from moshi_ttt.tiny import CorpusSpec, build_base, checkpoint_info, ensure
from moshi_ttt.tiny.measure import frame_milliseconds
from moshi_ttt.tiny.model import ASSETS
from moshi_ttt.tiny.tokenizer import corpus_text, train_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_base(tmp_path_factory.mktemp("base"), seed=3)


def test_it_loads_through_moshis_loader_from_its_config_alone(base):
    info = CheckpointInfo.from_hf_repo("nobody/nothing", config_path=base / "config.json")
    lm = info.get_moshi(dtype=torch.float32)
    saved = load_file(base / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in lm.state_dict().items())
    assert (lm.n_q, lm.dep_q, lm.context, len(lm.delays)) == (16, 8, 50, 17)
    mimi = info.get_mimi()
    assert (mimi.frame_rate, mimi.sample_rate, mimi.num_codebooks) == (12.5, 24_000, 8)
    assert lm.card == mimi.cardinality
    tokenizer = info.get_text_tokenizer()
    assert tokenizer.vocab_size() == lm.text_card
    assert tokenizer.decode(tokenizer.encode("call bolavi 42")) == "call bolavi 42"


def test_the_folder_may_move(base, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in base.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    config = json.loads((moved / "config.json").read_text())
    assert config["moshi_name"] == f"file://{base}/model.safetensors"
    assert checkpoint_info(moved).moshi_weights == moved / "model.safetensors"
    checkpoint_info(moved).get_moshi(dtype=torch.float32)


def test_the_seed_decides_the_weights(base, tmp_path):
    before = torch.random.get_rng_state()
    again = build_base(tmp_path / "a", seed=3)
    other = build_base(tmp_path / "b", seed=4)
    assert torch.equal(before, torch.random.get_rng_state())
    same = (base / "model.safetensors").read_bytes()
    assert (again / "model.safetensors").read_bytes() == same
    assert (other / "model.safetensors").read_bytes() != same


def test_it_streams(base):
    info = checkpoint_info(base)
    mimi, lm = info.get_mimi(), info.get_moshi(dtype=torch.float32)
    lm_gen = LMGen(lm, use_sampling=False)
    out = []
    with torch.no_grad(), mimi.streaming(1), lm_gen.streaming(1):
        for _ in range(60):
            tokens = lm_gen.step(mimi.encode(torch.zeros(1, 1, 1920)))
            if tokens is not None:
                assert tokens.shape == (1, 17 - 8, 1)
                out.append(mimi.decode(tokens[:, 1:]))
    pcm = torch.cat(out, -1)
    assert pcm.shape[-1] >= 58 * 1920
    assert bool(torch.isfinite(pcm).all())


def test_a_frame_takes_at_most_40_ms(base):
    # Processor time: on a busy machine the clock on the wall measures the other processes.
    taken = frame_milliseconds(checkpoint_info(base), clock=time.process_time)
    assert taken[95] <= 40


def test_the_shipped_tokenizer_is_the_one_the_script_makes():
    spec = CorpusSpec()
    assert train_tokenizer(corpus_text(spec)) == (ASSETS / "tokenizer.model").read_bytes()


def test_ensure_makes_it_all_once(tmp_path):
    spec = CorpusSpec(
        hours=0.005,
        train_seconds=(15, 15),
        heldout_readings=1,
        heldout_seconds=15,
        eval_readings=1,
        eval_dialogues=0,
        eval_seconds=15,
    )
    paths = ensure(tmp_path, spec, workers=1)
    assert paths.train.exists()
    stamp = (paths.base / "model.safetensors").stat().st_mtime_ns
    assert ensure(tmp_path, spec, workers=1) == paths
    assert (paths.base / "model.safetensors").stat().st_mtime_ns == stamp
