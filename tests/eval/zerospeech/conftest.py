import os

import pytest
import torch

from eval.zerospeech.sets import Pair
from finetune.data.codes import CodesCache
from moshi_ttt.base import find_base, load_base
from moshi_ttt.checkpoint import save_checkpoint
from moshi_ttt.config import TTTConfig
from moshi_ttt.hybrid import splice
from moshi_ttt.lora import add_lora
from tests.eval.zerospeech.made import lexical, sound, stories, syntactic
from tests.small import randomise_memories, small_base, small_mimi


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a base, two checkpoints of it, one of another base, and all four sets."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("work")
    base = find_base(small_base(folder / "base"))
    for name, seed in (("lora", None), ("memory", 1)):
        lm = load_base(base, dtype=torch.float32)
        add_lora(lm, 2, 2.0)
        if seed is not None:
            splice(lm, TTTConfig(layers="all", chunk_size=4, num_heads=2))
            randomise_memories(lm, seed=seed)
        save_checkpoint(lm, folder / f"runs/{name}/checkpoints/checkpoint_000010", base)
    os.utime(folder / "runs/memory/checkpoints/checkpoint_000010/consolidated/ttt.json")
    other = find_base(small_base(folder / "other", seed=1))
    lm = load_base(other, dtype=torch.float32)
    add_lora(lm, 2, 2.0)
    save_checkpoint(lm, folder / "elsewhere", other)
    lexical(folder / "zs")
    syntactic(folder / "zs")
    stories(folder / "stories/tSC")
    stories(folder / "stories/sSC")
    return folder


@pytest.fixture
def work(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Five clips of different lengths, a memory that has learnt nothing yet, and a cache."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(6):
        sound(folder / f"{i}.wav", i, 0.16 + 0.2 * (i % 4))
    pairs = [Pair(str(i), "", folder / f"{i}.wav", folder / f"{i + 1}.wav") for i in range(0, 6, 2)]
    return pairs, CodesCache(folder / "codes", small_mimi())
