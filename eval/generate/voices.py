"""What streams of a model say, on disk as it comes."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

import soundfile

from eval.tables import FRAME_SECONDS
from moshi_ttt.audio import SAMPLE_RATE
from moshi_ttt.engine import Frame
from moshi_ttt.files import written_whole


class Voices:
    """The voice (24 kHz, 16 bit) and the text of every stream.

    A wav is whole whenever it is flushed, a flac only once it is closed: so a voice becomes a flac
    when it is finished, and a run that is killed leaves a wav.

    Args:
        stem: stream n is `stem-n.wav`, in the end `stem-n.flac`, and `stem-n.txt`.
        streams: how many.
    """

    def __init__(self, stem: Path, streams: int) -> None:
        stem.parent.mkdir(parents=True, exist_ok=True)
        names = [f"{stem.name}-{n + 1}" for n in range(streams)]
        self._paths = [stem.with_name(f"{name}.wav") for name in names]
        self._wavs: list[soundfile.SoundFile] = []
        self._texts: list[TextIO] = []
        self._files = ExitStack()

    def __enter__(self) -> Voices:
        """Make the files, over what an earlier run left."""
        with ExitStack() as stack:
            for path in self._paths:
                wav = soundfile.SoundFile(path, "w", SAMPLE_RATE, 1, "PCM_16", format="WAV")
                self._wavs.append(stack.enter_context(wav))
                text = path.with_suffix(".txt").open("w", encoding="utf-8")
                self._texts.append(stack.enter_context(text))
            self._files = stack.pop_all()
        self._mark(0)
        return self

    def __exit__(self, *_: object) -> None:
        """Close them, whatever happened."""
        self._files.close()

    def write(self, said: Frame) -> None:
        """Add one frame."""
        for wav, text, pcm, piece in zip(
            self._wavs, self._texts, said.pcm.numpy(), said.text, strict=True
        ):
            wav.write(pcm)
            text.write(piece)

    def flush(self, frames: int) -> None:
        """See that all is on disk, and begin a line of text with the time after `frames`."""
        self._mark(frames)
        for file in (*self._wavs, *self._texts):
            file.flush()

    def _mark(self, frames: int) -> None:
        seconds = frames * FRAME_SECONDS
        for text in self._texts:
            start = "\n" if frames else ""
            text.write(f"{start}[{int(seconds // 60):02d}:{seconds % 60:05.2f}]")

    def finish(self) -> list[str]:
        """Once they are closed: turn the voices into flac; all files' names, in their folder's."""
        for path in self._paths:
            with soundfile.SoundFile(path) as wav, written_whole(path.with_suffix(".flac")) as flac:
                with soundfile.SoundFile(flac, "w", SAMPLE_RATE, 1, "PCM_16", format="FLAC") as out:
                    for block in wav.blocks(60 * SAMPLE_RATE, dtype="int16"):
                        out.write(block)
            path.unlink()
        return [
            str(Path(path.parent.name) / path.with_suffix(kind).name)
            for path in self._paths
            for kind in (".flac", ".txt")
        ]
