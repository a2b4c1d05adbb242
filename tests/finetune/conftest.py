"""A text tokenizer as Moshi's is laid out, trained on the spot."""

import io

import pytest
import sentencepiece

import finetune.train
from tests.finetune import recordings
from tests.finetune.small_run import World
from tests.small import small_base


@pytest.fixture(scope="session")
def tokenizer():
    text = "one two three four five six seven eight nine ten good morning good night".split()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 4),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        minloglevel=9,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def seen(monkeypatch):
    """The model that the trainer built, and its weights before the first step."""
    out, build = {}, finetune.train.build_model

    def watched(*args):
        lm, done = build(*args)
        out["lm"], out["before"] = lm, {k: v.clone() for k, v in lm.state_dict().items()}
        return lm, done

    monkeypatch.setattr(finetune.train, "build_model", watched)
    return out


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return small_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def audio(tmp_path_factory):
    return recordings.make(tmp_path_factory.mktemp("audio"))


@pytest.fixture(scope="session")
def encoded(audio, base, tmp_path_factory):
    """The codes of all of `audio`, made in one go."""
    return recordings.encode(audio / "m.jsonl", tmp_path_factory.mktemp("out") / "codes", base)
