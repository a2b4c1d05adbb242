"""The tiny text tokenizer: sentencepiece on what the training recordings say."""

from __future__ import annotations

import io
import string

import sentencepiece

from .plan import CorpusSpec, plan_corpus
from .text import SMALL_TALK

VOCABULARY = 400


def corpus_text(spec: CorpusSpec) -> list[str]:
    """Phrases of the training recordings (no held-out one's) and the small talk."""
    train = (r.lexicon.phrases for r in plan_corpus(spec) if r.split == "train")
    return [*SMALL_TALK, *(phrase for phrases in train for phrase in phrases)]


def train_tokenizer(lines: list[str]) -> bytes:
    """A serialised model: unk 0, bos 1, eos 2, pad 3, and a line break as a symbol of its own.

    Its size may stay below VOCABULARY: `hard_vocab_limit` is off.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        model_type="bpe",
        normalization_rule_name="identity",  # the text is plain; the tables would be 240 kB
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        user_defined_symbols=["\n"],
        required_chars=string.ascii_letters + string.digits + "'.,?!-",  # real transcripts too
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
