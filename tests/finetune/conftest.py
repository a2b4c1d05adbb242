"""A text tokenizer as Moshi's is laid out, trained on the spot."""

import io

import pytest
import sentencepiece

from tests.finetune.small_run import World


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
