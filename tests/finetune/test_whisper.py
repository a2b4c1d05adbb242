"""The adapter to faster-whisper, as far as it can be seen without a model."""

import inspect

import pytest

from finetune.whisper import TRANSCRIBE, load_whisper
from moshi_ttt.errors import UserError

faster_whisper = pytest.importorskip("faster_whisper", reason="the extra `annotate`")


def test_its_transcribe_knows_what_it_is_told():
    known = inspect.signature(faster_whisper.WhisperModel.transcribe).parameters
    assert {"audio", "language", *TRANSCRIBE} <= set(known)
    assert {"word", "start", "end"} <= set(faster_whisper.transcribe.Word.__dataclass_fields__)
    assert "words" in faster_whisper.transcribe.Segment.__dataclass_fields__
    assert isinstance(faster_whisper.WhisperModel.supported_languages, property)


@pytest.mark.parametrize("model", ["large-v33", "/no/such/folder", "large-v3"])
def test_a_model_that_is_not_there(model, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=f"--model {model} on --device cpu cannot be loaded"):
        load_whisper(model, "en", "cpu")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(UserError, match="cannot be loaded"):
        load_whisper(str(tmp_path), "en", "cpu")
