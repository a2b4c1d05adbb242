"""The embedded corpus: dialogues and readings spoken by espeak-ng, with exact alignments.

Every phrase is an utterance of its own, synthesised once a recording and voice, and put down
again, sample for sample, wherever it returns; it always starts on the grid of 80 ms frames, with
digital silence (2 to 4 frames) before it and in the channel of whoever listens. So a phrase that
returns has nearly the same codes each time, as a familiar voice has for a better codec. That is a
choice: real speech never repeats itself so exactly, and gains measured here are larger than there.

Layout under the root:

    SPLIT.jsonl                                 {"path": relative, "duration": seconds}; splits are
                                                train, base, eval, heldout
    train/ base/ eval/                          STEM.wav, 24 kHz, mono or stereo (left Moshi, right
                                                user), and STEM.json with "alignments"
    librilight/small/SPEAKER/BOOK/STEM.flac     held-out readings, 16 kHz mono, and STEM.json with
                                                Libri-Light's keys and "alignments"
    corpus.json                                 the spec's digest; "complete" is written last
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import torch
import torchaudio
from tqdm import tqdm

from .mel import FRAME
from .plan import CorpusSpec, Line, Recording, plan_corpus, script
from .voice import NARROW_RATE, SAMPLE_RATE, Clip, speak

SPLITS = ("train", "base", "eval", "heldout")
SPEAKERS = ("SPEAKER_MAIN", "SPEAKER_OTHER")
Alignment = list[Any]
"""`[word, [start, end], speaker]`, seconds from the recording's first sample."""


def utterances(recording: Recording) -> Iterator[tuple[Line, Clip, int, int]]:
    """Yield every (line, clip, first frame, frames) that fits the recording, in order of time."""
    clips: dict[tuple[int, str], Clip] = {}
    cursor = 0
    for line in script(recording):
        key = (line.speaker, line.text)
        if key not in clips:
            clips[key] = speak(line.text, recording.voices[line.speaker])
        cursor += line.pause
        frames = -(-len(clips[key].pcm) // FRAME)
        if cursor + frames > recording.frames:
            return
        yield line, clips[key], cursor, frames
        cursor += frames


def render(recording: Recording) -> tuple[npt.NDArray[np.float32], list[Alignment]]:
    """Speak a recording.

    Returns:
        pcm float32 `[C, frames * 1920]` at 24 kHz (C is 1 for a reading; 2 for a dialogue, left
        Moshi), and its alignments in order of time.
    """
    pcm = np.zeros((len(recording.voices), recording.frames * FRAME), np.float32)
    aligned: list[Alignment] = []
    for line, clip, first, _ in utterances(recording):
        begin = first * FRAME
        pcm[line.speaker, begin : begin + len(clip.pcm)] = clip.pcm
        offset = begin / SAMPLE_RATE
        aligned += [
            [word, [round(offset + a, 4), round(offset + b, 4)], SPEAKERS[line.speaker]]
            for word, a, b in clip.words
        ]
    return pcm, aligned


def _replace(path: Path, write: Any) -> None:
    """Write `path` whole or not at all: `write` gets a file beside it that is then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}.draft{path.suffix}")
    write(draft)
    os.replace(draft, path)


def _write_json(path: Path, value: Any) -> None:
    _replace(path, lambda draft: draft.write_text(json.dumps(value) + "\n"))


def _audio_path(recording: Recording) -> Path:
    """Where a recording lies, relative to the root."""
    if recording.split == "heldout":
        number = recording.stem.rsplit("_", 1)[1]
        speaker, book = f"9{number}", f"reading_{number}"
        return Path("librilight", "small", speaker, book, f"{recording.stem}.flac")
    return Path(recording.split, f"{recording.stem}.wav")


def _spoken(aligned: list[Alignment]) -> list[list[float]]:
    """Libri-Light's `voice_activity`: stretches of words less than 0.1 s apart."""
    stretches: list[list[float]] = []
    for _, (start, end), _ in aligned:
        if stretches and start - stretches[-1][1] < 0.1:
            stretches[-1][1] = end
        else:
            stretches.append([start, end])
    return stretches


def write_recording(recording: Recording, root: str) -> float:
    """Speak a recording into its files unless they are there; the json comes last.

    Returns:
        Its length in seconds.
    """
    path = Path(root) / _audio_path(recording)
    seconds = recording.frames * FRAME / SAMPLE_RATE
    if path.with_suffix(".json").exists():
        return seconds
    torch.set_num_threads(1)
    pcm, aligned = render(recording)
    meta: dict[str, Any] = {"alignments": aligned}
    rate = SAMPLE_RATE
    if recording.split == "heldout":
        rate = NARROW_RATE
        pcm = torchaudio.functional.resample(torch.from_numpy(pcm), SAMPLE_RATE, rate).numpy()
        meta |= {
            "speaker": path.parent.parent.name,
            "book_meta": {"id": path.parent.name, "title": recording.stem, "language": "English"},
            "snr": 60.0,
            "voice_activity": _spoken(aligned),
        }
    _replace(path, lambda draft: soundfile.write(draft, pcm.T, rate, subtype="PCM_16"))
    _write_json(path.with_suffix(".json"), meta)
    return seconds


def _write_all(plan: list[Recording], root: Path, workers: int) -> Iterator[float]:
    if workers == 1:
        yield from (write_recording(recording, str(root)) for recording in plan)
        return
    # Spawned, not forked: torch has started threads by now.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(write_recording, plan, [str(root)] * len(plan), chunksize=2)


def make_corpus(
    root: str | Path, spec: CorpusSpec | None = None, workers: int = 2
) -> dict[str, Path]:
    """Speak the corpus under `root`, or find it there.

    Args:
        root: folder, made if missing.
        spec: how much; the default is what `make finetune` trains on.
        workers: processes.

    Returns:
        `train`, `base`, `eval`, `heldout`: manifests; `librilight`: the held-out readings' root.

    Raises:
        ValueError: `root` holds a corpus of another spec or version.
    """
    root, spec = Path(root), spec or CorpusSpec()
    marker, digest = root / "corpus.json", spec.digest()
    found = {split: root / f"{split}.jsonl" for split in SPLITS}
    found["librilight"] = root / "librilight"
    if marker.exists():
        state = json.loads(marker.read_text())
        if state["digest"] != digest:
            raise ValueError(
                f"{root} holds another corpus ({state['digest']}, wanted {digest}): "
                "move it away or choose another folder"
            )
        if state["complete"]:
            return found
    plan = plan_corpus(spec)
    _write_json(marker, {"digest": digest, "complete": False})
    total = sum(recording.frames for recording in plan) * FRAME / SAMPLE_RATE / 60
    form = "{l_bar}{bar}| {n:.0f}/{total:.0f} min of speech [{elapsed}<{remaining}]"
    with tqdm(total=total + 1e-6, desc="speaking", bar_format=form, mininterval=1) as bar:
        for seconds in _write_all(plan, root, workers):
            bar.update(seconds / 60)
    for split in SPLITS:
        lines = [
            json.dumps({"path": str(_audio_path(r)), "duration": r.frames * FRAME / SAMPLE_RATE})
            for r in plan
            if r.split == split
        ]
        text = "".join(line + "\n" for line in lines)
        _replace(found[split], lambda draft, text=text: draft.write_text(text))
    _write_json(marker, {"digest": digest, "complete": True})
    return found
