"""What the tests of streams have in common."""

import numpy as np
import pytest
import soundfile
import torch

from moshi_ttt.engine import Engine
from moshi_ttt.frames import FRAME
from moshi_ttt.stream import main
from tests.small import small_hybrid, small_mimi, small_tokenizer

CARD = small_tokenizer().vocab_size()


def hybrid(**overrides):
    return small_hybrid(lm={"text_card": CARD}, **overrides)


def engine_for(lm=None, **options):
    return Engine(lm or hybrid(), small_mimi(), small_tokenizer(), **options)


def noise(frames, rows=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(frames, rows, 1, FRAME, generator=generator)


def run(engine, frames):
    """Voice [B, T * 1920], texts and tokens [B, 9, T]."""
    said = [(f.pcm.clone(), f.text, f.tokens.clone()) for f in map(engine.step, frames)]
    pcm, text, tokens = zip(*said, strict=True)
    return torch.cat(pcm, 1), list(text), torch.stack(tokens, 2)


def write(path, samples, rate):
    soundfile.write(path, samples, rate, subtype="FLOAT")
    return str(path)


def wave(seconds, rate, channels=1, seed=0):
    rng = np.random.default_rng(seed)
    return 0.1 * rng.standard_normal((int(seconds * rate), channels))


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as left:
        main(list(argv))
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == 1
    assert err.endswith("\n")
    return err.splitlines()[-1]
