"""One recording: audio files that follow each other, or codes that are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.data.interleaver import FRAME_RATE
from finetune.data.stored import StoredCodes
from finetune.data.transcript import Word, read_beside, read_words
from moshi_ttt.audio import audio_info
from moshi_ttt.errors import UserError


@dataclass(frozen=True)
class AudioFile:
    """An audio file, its header checked.

    Attributes:
        path: where it is.
        duration: seconds, from the header.
    """

    path: Path
    duration: float


@dataclass(frozen=True)
class Recording:
    """One line of a manifest: audio files that follow each other, or their codes.

    Attributes:
        name: the audio, for messages.
        duration: seconds, of all files.
        channels: 1 or 2 (left Moshi, right user).
        where: `manifest:line`, for messages.
        files: the audio; none where codes are stored.
        stored: where the codes are; None where there is audio.
        speaker: who is heard, if that is known.
    """

    name: str
    duration: float
    channels: int
    where: str
    files: tuple[AudioFile, ...] = ()
    stored: StoredCodes | None = None
    speaker: str | None = None

    def words(self, file_frames: Sequence[int]) -> list[Word] | None:
        """All words, in seconds from the recording's start; None if there is no transcript.

        Args:
            file_frames: frames of the codes of each file: a file's words are shifted by those
                before it.

        Raises:
            UserError: a broken transcript, or only some of the files have one.
        """
        if self.stored is not None:
            return self.stored.words(sum(file_frames) / FRAME_RATE)
        found = [read_words(f.path, f.duration) for f in self.files]
        check_transcripts(self.files, [words is not None for words in found])
        if found[0] is None or len(found) == 1:
            return found[0]
        shifted: list[Word] = []
        before = 0
        for words, frames in zip(found, file_frames, strict=True):
            shift = before / FRAME_RATE
            shifted += [w._replace(start=w.start + shift, end=w.end + shift) for w in words or ()]
            before += frames
        # a word may end, and so begin, a little after its file
        return sorted(shifted, key=lambda w: w.start)


def open_audio(paths: Sequence[Path], where: str, speaker: str | None = None) -> Recording:
    """Read the headers and transcripts of files that are one recording.

    Args:
        paths: in order.
        where: for messages about the recording.
        speaker: None takes the `speaker` of the json beside the first file.

    Raises:
        UserError: a file or transcript is broken, their channels differ, or only some have a
            transcript.
    """
    infos = [audio_info(path) for path in paths]
    channels = infos[0].channels
    for path, info in zip(paths, infos, strict=True):
        if info.channels != channels:
            raise UserError(
                f"{path} has {info.channels} channels and {paths[0]} {channels}: the files of a "
                "recording must have the same"
            )
    files = tuple(AudioFile(p, i.duration) for p, i in zip(paths, infos, strict=True))
    beside = [read_beside(f.path, f.duration) for f in files]
    seconds = sum(f.duration for f in files)
    speaker = beside[0].speaker if speaker is None else speaker
    name = name_of([str(path) for path in paths])
    check_transcripts(files, [b.words is not None for b in beside])
    return Recording(name, seconds, channels, where, files, None, speaker)


def name_of(names: Sequence[str]) -> str:
    """One name for the files of a recording."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def check_transcripts(files: Sequence[AudioFile], there: Sequence[bool]) -> None:
    """See that all files of a recording have a transcript, or none.

    Raises:
        UserError: naming one that has none.
    """
    if any(there) and not all(there):
        without = files[list(there).index(False)].path
        raise UserError(
            f"{without} has no transcript, but other files of the recording have one: "
            "give all of them one, or none"
        )
