"""faster-whisper as a recogniser: samples to words with their times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moshi_ttt.errors import UserError

SAMPLE_RATE = 16_000
"""Hz, of what a recogniser hears."""

Recogniser = Callable[[NDArray[np.float32]], Iterable[tuple[str, float, float]]]
"""Samples `[N]` of one voice at 16 kHz to (word, start, end), in seconds."""

TRANSCRIBE: dict[str, Any] = {
    "word_timestamps": True,
    # Whisper makes up words where nobody speaks, and half of a channel of a dialogue is that
    "vad_filter": True,
    # a channel's turns lie far apart: a mistake in one would lead the next astray
    "condition_on_previous_text": False,
}
"""What `WhisperModel.transcribe` is told besides the language."""


def load_whisper(model: str, language: str | None, device: str) -> Recogniser:
    """Load a model, fetching it where it is not here yet.

    Args:
        model: size (`large-v3`), repository of the Hugging Face hub, or folder, in CTranslate2's
            form.
        language: code (`en`); None finds out for each channel.
        device: `cuda`, `cpu`, or `auto` for the first if there is one.

    Raises:
        UserError: faster-whisper is not installed; the model cannot be fetched or read; a device
            that is not there; a language that the model does not know.
    """
    try:
        from faster_whisper import WhisperModel  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"transcripts need faster-whisper ({error}): pip install 'moshi-ttt[annotate]'"
        ) from error
    try:
        whisper = WhisperModel(model, device=device)
    except (ValueError, OSError, RuntimeError) as error:
        # the hub's message goes on for paragraphs
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--model {model} on --device {device} cannot be loaded: {reason} (a size, a "
            "repository of the Hugging Face hub, or a folder in CTranslate2's form is wanted)"
        ) from error
    if language is not None and language not in whisper.supported_languages:
        known = ", ".join(sorted(whisper.supported_languages))
        raise UserError(f"--language {language}: the model {model} knows {known}")

    def recognise(pcm: NDArray[np.float32]) -> Iterator[tuple[str, float, float]]:
        try:
            segments, _ = whisper.transcribe(pcm, language=language, **TRANSCRIBE)
            for segment in segments:
                for word in segment.words or ():
                    yield word.word, float(word.start), float(word.end)
        except RuntimeError as error:  # the device's memory, most likely
            raise UserError(f"faster-whisper failed: {error}") from error

    return recognise
