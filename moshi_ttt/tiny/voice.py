"""espeak-ng by ctypes: text in, samples and exact word times out.

The library and its voices come in the PyPI package `espeakng-loader`; nothing is downloaded and
no system package is needed. espeak-ng keeps its state in globals: one process speaks one
utterance at a time.
"""

from __future__ import annotations

import _ctypes
import ctypes
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import espeakng_loader
import numpy as np
import numpy.typing as npt
import torch
import torchaudio

SAMPLE_RATE = 24_000
"""Hz, Mimi's."""
NARROW_RATE = 16_000
"""Hz, Libri-Light's; nothing in the corpus lies above half of it."""
_SYNCHRONOUS = 2
_EVENT_END, _EVENT_WORD = 0, 1
_CHARS_UTF8 = 1
_RATE, _VOLUME, _PITCH = 1, 2, 3
_NO_EXIT = 0x8000
_AUDIBLE = 0.004
_HELDOUT_VOICES = 60


class _EventId(ctypes.Union):
    _fields_ = (
        ("number", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("string", ctypes.c_char * 8),
    )


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


@dataclass(frozen=True)
class Voice:
    """One speaker.

    Attributes:
        language: an espeak-ng language, which is its accent here (`"en-us"`, `"it"`).
        variant: one of espeak-ng's voice variants (`"f2"`).
        pitch: 0 to 99, espeak-ng's scale.
        rate: words a minute.
    """

    language: str
    variant: str
    pitch: int
    rate: int

    @property
    def name(self) -> str:
        """A file-name-safe name, different for different voices."""
        return f"{self.language}_{self.variant}_{self.pitch}_{self.rate}"


@dataclass(frozen=True)
class Clip:
    """One utterance.

    Attributes:
        pcm: float32 `[samples]` at 24 kHz in -1 to 1, without silence at its ends.
        words: (word, start, end) in seconds from the clip's first sample, in order.
    """

    pcm: npt.NDArray[np.float32]
    words: tuple[tuple[str, float, float], ...]


@contextmanager
def _fresh_library() -> Iterator[tuple[ctypes.CDLL, int]]:
    """A newly loaded espeak-ng and its sample rate in Hz, unloaded at the end.

    The pitch flutter and the noise of espeak-ng run on from one utterance to the next in static
    variables that neither a seed nor a restart puts back. Loading the library anew does, in 1 ms.
    """
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    try:
        rate = library.espeak_Initialize(
            _SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), _NO_EXIT
        )
        if rate <= 0:
            raise RuntimeError(f"espeak-ng did not start (code {rate})")
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        yield library, rate
        library.espeak_Terminate()
    finally:
        _ctypes.dlclose(library._handle)


@lru_cache
def _resampler(source: int, target: int) -> torchaudio.transforms.Resample:
    """The resampler between two rates, with its filter computed once."""
    return torchaudio.transforms.Resample(source, target)


def speak(text: str, voice: Voice) -> Clip:
    """Speak `text`, the same samples every time for the same text and voice.

    Args:
        text: words separated by single spaces; each becomes one entry of the clip's words.
        voice: who says it.

    Raises:
        ValueError: espeak-ng has no such voice, or nothing audible came out.
        RuntimeError: espeak-ng refused.
    """
    pieces: list[npt.NDArray[np.int16]] = []
    starts: dict[int, int] = {}

    @_Callback
    def receive(samples: Any, count: int, events: Any) -> int:
        if samples and count:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        i = 0
        while events[i].type != _EVENT_END:
            if events[i].type == _EVENT_WORD:
                starts.setdefault(events[i].text_position - 1, events[i].sample)
            i += 1
        return 0

    with _fresh_library() as (library, rate):
        if library.espeak_SetVoiceByName(f"{voice.language}+{voice.variant}".encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice.language}+{voice.variant}")
        for parameter, value in ((_RATE, voice.rate), (_VOLUME, 100), (_PITCH, voice.pitch)):
            library.espeak_SetParameter(parameter, value, 0)
        library.espeak_SetSynthCallback(receive)
        raw = text.encode()
        status = library.espeak_Synth(raw, len(raw) + 1, 0, 1, 0, _CHARS_UTF8, None, None)
        if status != 0 or not pieces:
            raise RuntimeError(f"espeak-ng could not speak {text!r} (code {status})")
    return _clip(np.concatenate(pieces), rate, text, starts)


def _clip(samples: npt.NDArray[np.int16], rate: int, text: str, starts: dict[int, int]) -> Clip:
    """Trim, resample and level the samples; make word intervals of the word starts."""
    loud = np.flatnonzero(np.abs(samples) > _AUDIBLE * 32768)
    if not len(loud):
        raise ValueError(f"nothing audible in {text!r}")
    first, last = int(loud[0]), int(loud[-1]) + 1
    trimmed = torch.from_numpy(samples[first:last].astype(np.float32) / 32768)
    # By way of 16 kHz: then a recording sounds the same whether it is read from the corpus' wav or
    # from Libri-Light's 16 kHz flac.
    pcm = _resampler(NARROW_RATE, SAMPLE_RATE)(_resampler(rate, NARROW_RATE)(trimmed)).numpy()
    pcm = pcm * np.float32(0.09 / np.sqrt(np.mean(pcm**2)))
    pcm = np.clip(pcm, -0.99, 0.99)
    words, begins, position = text.split(" "), [], 0
    for word in words:
        begins.append(starts.get(position))
        position += len(word) + 1
    length = (last - first) / rate
    # espeak-ng reads some words as one with their neighbour; such a word shares its start.
    times = []
    for begin in begins:
        known = None if begin is None else min(max((begin - first) / rate, 0.0), length)
        times.append(known if known is not None else (times[-1] if times else 0.0))
    ends = [*times[1:], length]
    return Clip(
        pcm,
        tuple(
            (word, round(a, 4), round(max(a, b), 4))
            for word, a, b in zip(words, times, ends, strict=True)
        ),
    )


_LANGUAGES = (
    "en-us en en-gb-scotland en-gb-x-rp en-gb-x-gbclan en-gb-x-gbcwmd en-029 en-us-nyc "
    "es it de fr pt nl sv da pl ro fi hu cs tr id sw eo la hr"
).split()
_VARIANTS = "m1 m2 m3 m4 m5 m6 m7 m8 f1 f2 f3 f4 f5 Andy Annie belinda steph linda rob zac".split()


def voices(split: str, count: int | None) -> list[Voice]:
    """The first `count` voices of a split (None: all of them).

    A pair of accent and variant belongs to one split only, and the held-out ones come first in
    the shuffled list, so a larger training corpus never takes a held-out voice.

    Args:
        split: `"train"` or `"heldout"`.
        count: how many, at most 60 held-out ones.

    Raises:
        ValueError: no such split, or more voices than there are.
    """
    pairs = [(language, variant) for language in _LANGUAGES for variant in _VARIANTS]
    rng = random.Random(20_240_913)
    rng.shuffle(pairs)
    spoken = [Voice(a, b, rng.randint(25, 75), rng.randint(165, 205)) for a, b in pairs]
    if split not in ("train", "heldout"):
        raise ValueError(f"split {split!r} is neither 'train' nor 'heldout'")
    found = spoken[:_HELDOUT_VOICES] if split == "heldout" else spoken[_HELDOUT_VOICES:]
    if count is not None and count > len(found):
        raise ValueError(f"there are {len(found)} voices in {split}, not {count}")
    return found[:count]
