"""The shipped base: what the config makes of an untrained one does as well."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moshi.models.loaders import get_moshi_lm

from eval.panel import make_items, read_panel
from eval.scores import evaluate
from finetune.data.codes import CodesCache
from moshi_ttt.base import find_base, load_base
from moshi_ttt.tiny.model import BASE_WEIGHTS, build_base

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_config_makes_a_base_that_does_as_well(tmp_path):
    """Runs `finetune.train configs/tiny_base.yaml`; 10 minutes, with the speech it makes."""
    subprocess.run(
        [sys.executable, "-m", "finetune.train", str(ROOT / "configs/tiny_base.yaml")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
    )
    made = tmp_path / "runs/tiny_base/checkpoints/checkpoint_000450/consolidated"
    base = find_base(build_base(tmp_path / "base", weights=BASE_WEIGHTS))
    cache = CodesCache(tmp_path / "data/codes", base.info.get_mimi())
    panel = read_panel(tmp_path / "data/tiny_base/speech/eval.jsonl")
    items = make_items(panel, cache, base.info.get_text_tokenizer())
    nll = []
    for lm in (
        load_base(base, dtype=torch.float32),
        get_moshi_lm(made / "consolidated.safetensors", base.lm_config, dtype=torch.float32).eval(),
    ):
        found = evaluate(lm, items).nll["codebook0"]
        nll.append(sum(float(torch.tensor(x).nanmean()) for x in found) / len(found))
    shipped, remade = nll
    assert remade < shipped + 0.05
