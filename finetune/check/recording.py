"""One line of a manifest: what it is, and everything that is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from sentencepiece import SentencePieceProcessor

from finetune.check.findings import Finding
from finetune.check.lines import Line
from finetune.check.samples import Sound, read_sound
from finetune.check.sound import is_silent, listen
from finetune.check.words import Transcript, compare, judge, read_transcript, unknown_words
from finetune.data.manifest import DURATION_TOLERANCE
from moshi_ttt.audio import audio_info
from moshi_ttt.errors import UserError


@dataclass(frozen=True)
class Header:
    """What a file's header says, or why it cannot be read: kind and detail."""

    seconds: float = 0.0
    channels: int = 0
    problem: tuple[str, str] | None = None


@dataclass
class Checked:
    """A line that was looked at.

    Attributes:
        line: the line.
        headers: of its audio files.
        findings: in the order in which they were made.
        rates: Hz of each file that can be read.
        digests: of the samples of each of those that is not silent, to the file's name.
        transcribed: whether any file has a transcript.
        words: how many can be read.
        main_seconds: length of those of SPEAKER_MAIN.
        word_seconds: length of all.
    """

    line: Line
    headers: list[Header]
    findings: list[Finding] = field(default_factory=list)
    rates: list[int] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    transcribed: bool = False
    words: int = 0
    main_seconds: float = 0.0
    word_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Length of what can be read."""
        if self.line.shard is not None:
            return _number(self.line.entry.get("duration")) or 0.0
        return sum(h.seconds for h in self.headers)

    @property
    def channels(self) -> int:
        """1 or 2; 0 where nothing can be read."""
        if self.line.shard is not None:
            said = self.line.entry.get("channels")
            return said if said in (1, 2) else 0
        return next((h.channels for h in self.headers if h.channels), 0)

    def add(self, kind: str, detail: str, file: str = "") -> None:
        """Note a finding; `file` as the manifest has it."""
        self.findings.append(Finding(kind, self.line.manifest, self.line.number, file, detail))


def read_header(path: Path) -> Header:
    """Read a file's header; what is wrong is in it."""
    try:
        if not path.exists():
            return Header(problem=("file missing", str(path)))
        info = audio_info(path)
    except (UserError, OSError) as error:
        return Header(problem=_problem(error, path))
    return Header(info.duration, info.channels)


def _problem(error: Exception, path: Path) -> tuple[str, str]:
    text = error.strerror or "" if isinstance(error, OSError) else str(error)
    text = text.removeprefix(f"{path}: ")
    return ("too many channels" if "channels; mono or stereo" in text else "file broken"), text


def check_line(
    line: Line,
    headers: list[Header],
    progress: Callable[[float], object],
    duration_sec: float | None = None,
    tokenizer: SentencePieceProcessor | None = None,
) -> Checked:
    """Look at everything a line names, its samples included.

    Args:
        line: any.
        headers: of its files.
        progress: told the seconds of audio that were read.
        duration_sec: the length of training's segments.
        tokenizer: of the text.
    """
    found = Checked(line, headers)
    if line.problem is not None:
        found.add("broken line", line.problem)
        return found
    name = " + ".join(line.names[:1]) + (" ..." if len(line.names) > 1 else "")
    if line.shard is not None:
        _check_codes(found, line.shard, name)
        return found
    transcripts: list[Transcript] = []
    for file_name, path, header in zip(line.names, line.files, headers, strict=True):
        if header.problem is not None:
            found.add(header.problem[0], header.problem[1], file_name)
            continue
        transcript = read_transcript(path, header.seconds)
        transcripts.append(transcript)
        try:
            sound = read_sound(path, progress)
        except (UserError, OSError) as error:
            kind, detail = _problem(error, path)
            found.add(kind, detail, file_name)
            sound = None
        for kind, detail in _findings(sound, transcript, tokenizer):
            found.add(kind, detail, file_name)
        if sound is not None:
            found.rates.append(sound.sample_rate)
            if not is_silent(sound.power.max(1)):
                found.digests[sound.digest] = file_name
    _count(found, transcripts, name)
    if all(h.problem is None for h in headers) and "file broken" not in {
        f.kind for f in found.findings
    }:
        _check_duration(found, line.entry.get("duration"), name)
        if duration_sec is not None and found.seconds < duration_sec:
            found.add("short", f"{found.seconds:.1f} s, the segment {duration_sec:g} s", name)
    return found


def _findings(
    sound: Sound | None, transcript: Transcript, tokenizer: SentencePieceProcessor | None
) -> Iterator[tuple[str, str]]:
    yield from transcript.findings
    if sound is not None:
        yield from listen(sound)
        yield from compare(sound, transcript.words or [])
    if tokenizer is not None and transcript.words:
        unknown = list(unknown_words(transcript.words, tokenizer))
        if unknown:
            shown = ", ".join(map(repr, unknown[:3]))
            yield "unknown to the tokenizer", f"{len(unknown)} different words: {shown}"


def _count(found: Checked, transcripts: list[Transcript], name: str) -> None:
    there = [t.there for t in transcripts]
    if len({h.channels for h in found.headers if h.channels}) > 1:
        found.add("channels differ", "mono and stereo files in one recording", name)
    if any(there) and not all(there):
        found.add("some transcripts", f"{sum(there)} of {len(there)} files have one", name)
    if there and not any(there):
        found.add("no transcript", "no alignments in a json beside the audio", name)
    found.transcribed = any(there)
    found.words = sum(len(t.words or ()) for t in transcripts)
    found.word_seconds = sum(t.seconds() for t in transcripts)
    found.main_seconds = sum(t.seconds(main_only=True) for t in transcripts)


def _check_duration(found: Checked, said: Any, name: str) -> None:
    number = _number(said)
    real = f"the audio has {found.seconds:.3f} s"
    if number is None:
        found.add("duration", f"must be a positive number, got {str(said)[:30]!r}; {real}", name)
    elif abs(number - found.seconds) > DURATION_TOLERANCE:
        found.add("duration", f"is {number:g}, but {real}", name)


def _number(value: Any) -> float | None:
    """A positive, finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if 0 < number < math.inf else None


def _check_codes(found: Checked, shard: Path, name: str) -> None:
    """What a line of a manifest of codes says of itself, and whether its shard has that."""
    entry = found.line.entry
    found.add("encoded already", shard.name, name)
    key, said = entry.get("key"), [entry.get(k) for k in ("channels", "codebooks", "frames")]
    if found.seconds == 0:
        found.add("duration", f"must be a positive number, got {entry.get('duration')!r}", name)
    try:
        with safe_open(shard, "pt") as stored:
            shape = stored.get_slice(key).get_shape() if isinstance(key, str) else None
            if shape != said:
                found.add("codes missing", f"{shard}: {key} is {shape}, its line says {said}", name)
    except (SafetensorError, OSError) as error:
        found.add("codes missing", f"{shard}: {error}", name)
    if isinstance(key, str):
        found.digests[key] = name  # it is that of the audio
    transcripts = [Transcript()]
    if entry.get("alignments") is not None:
        transcripts = [judge(entry["alignments"], found.seconds, "its line")]
    for kind, detail in transcripts[0].findings:
        found.add(kind, detail, name)
    _count(found, transcripts, name)
