"""Transcripts with word times for the recordings of manifests, by faster-whisper.

Beside each audio file a json of the same name, as training reads it:
{"alignments": [[word, [start, end], speaker], ...]}. Left is Moshi, SPEAKER_MAIN; right is the
user, SPEAKER_USER; a mono file is SPEAKER_MAIN. A json that is there keeps its other keys. A file
that has a transcript is left as it is, so that a run that was broken off goes on where it was.
faster-whisper is an extra: pip install 'moshi-ttt[annotate]'.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.check.lines import manifests, read_lines
from finetune.check.report import printable, several
from finetune.data.transcript import MAIN_SPEAKER, transcript_path
from finetune.whisper import SAMPLE_RATE, Recogniser, load_whisper
from moshi_ttt.audio import audio_info, read_audio
from moshi_ttt.errors import Parser, UserError, no_space_left, run_cli
from moshi_ttt.files import check_writable, written_whole

USER_SPEAKER = "SPEAKER_USER"
"""The label of the user's side."""
SHORTEST_WORD = 0.02
"""Seconds, the step of Whisper's times: it gives words without duration, which training leaves
out."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's options.

    Raises:
        UserError: unknown or malformed ones.
    """
    p = Parser("python -m finetune.annotate", __doc__)
    p.add_argument("manifests", nargs="+", help="jsonl, or a folder for all in it")
    p.add_argument("--model", default="large-v3", help="size, hub repository or folder (large-v3)")
    p.add_argument("--language", default="en", help="code, or auto for each channel's own (en)")
    p.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    p.add_argument(
        "--overwrite", action="store_true", help="transcribe again what has a transcript"
    )
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Transcribe, write, and say how fast it went.

    Raises:
        UserError: wrong use; at the end also if any file could not be transcribed.
    """
    args = parse(argv)
    language = None if args.language == "auto" else args.language
    annotate(
        manifests(args.manifests),
        lambda: load_whisper(args.model, language, args.device),
        overwrite=args.overwrite,
    )


def annotate(
    paths: Sequence[Path], load: Callable[[], Recogniser], *, overwrite: bool = False
) -> None:
    """Give every audio file of some manifests a transcript.

    Args:
        paths: manifests that exist.
        load: makes the recogniser; called only if there is something to do.
        overwrite: also files that have one.

    Raises:
        UserError: files that could not be transcribed, after all the others were; or the
            recogniser cannot be loaded.
    """
    jobs, there, failed = _jobs(paths, overwrite)
    if there:
        _say(
            f"{several(there, 'file')} with a transcript left as it was (--overwrite does it again)"
        )
    if jobs:
        seconds = sum(duration for duration, _ in jobs.values())
        _say(f"{several(len(jobs), 'file')} to transcribe, {seconds / 3600:.2f} hours of audio")
        recognise = load()
        begun = time.monotonic()
        done = 0.0
        # tqdm warns when rounding carries the sum past the total
        total = seconds / 60 + 1e-6
        bar_format = "{l_bar}{bar}| {n:.1f}/{total:.1f} min [{elapsed}<{remaining}]"
        with tqdm(total=total, desc="transcribing", bar_format=bar_format) as bar:
            before = 0.0

            def heard(seconds: float) -> None:
                bar.update(max(0.0, (before + seconds) / 60 - bar.n))

            for path, (duration, where) in jobs.items():
                try:
                    _annotate(path, duration, recognise, heard)
                    done += duration
                except (UserError, OSError) as error:
                    failed += _broken(where, path, error)
                heard(duration)
                before += duration
        hours = (time.monotonic() - begun) / 3600
        _say(
            f"{done / 3600:.2f} hours of audio in {hours:.2f} hours: "
            f"{done / 3600 / max(hours, 1e-9):.1f} hours an hour"
        )
    if failed:
        raise UserError(f"{several(failed, 'recording')} could not be transcribed: see above")


def _jobs(paths: Sequence[Path], overwrite: bool) -> tuple[dict[Path, tuple[float, str]], int, int]:
    """Files to transcribe with their seconds and lines; how many are done; how many are broken."""
    jobs: dict[Path, tuple[float, str]] = {}
    there: set[Path] = set()
    failed = 0
    for line in (line for path in paths for line in read_lines(path)):
        if line.problem is not None:
            failed += _broken(line.where, None, UserError(line.problem))
        if line.shard is not None:
            failed += _broken(
                line.where, None, UserError("a line of codes has no audio: annotate, then encode")
            )
            continue
        for file in line.files:
            if file in jobs or file in there:
                continue
            try:
                duration = audio_info(file).duration
                if "alignments" in _content(file) and not overwrite:
                    there.add(file)
                else:
                    check_writable(transcript_path(file))
                    jobs[file] = duration, line.where
            except (UserError, OSError) as error:
                failed += _broken(line.where, file, error)
    if not (jobs or there or failed):
        raise UserError(f"no recordings in {', '.join(map(str, paths))}")
    _refuse_shared(list(jobs))
    return jobs, len(there), failed


def _refuse_shared(files: Sequence[Path]) -> None:
    owner: dict[Path, Path] = {}
    for file in files:
        first = owner.setdefault(transcript_path(file), file)
        if first != file:
            raise UserError(f"{first} and {file} would share one transcript: rename one of them")


def _broken(where: str, path: Path | None, error: Exception) -> int:
    """Name it, and count it."""
    if no_space_left(error):  # the next would fail like it
        raise error
    text = str(error)
    named = path is None or str(path) in text or str(transcript_path(path)) in text
    _say(f"{where}: {text if named else f'{path}: {text}'}")
    return 1


def _say(text: str) -> None:
    tqdm.write(printable(" ".join(text.split())), file=sys.stdout)
    sys.stdout.flush()


def _content(audio: Path) -> dict[str, Any]:
    """What the json beside an audio file holds; nothing if there is none."""
    path = transcript_path(audio)
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}; mend it or move it away") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; move it away")
    return content


def _annotate(
    audio: Path, duration: float, recognise: Recogniser, heard: Callable[[float], None]
) -> None:
    pcm = read_audio(audio, SAMPLE_RATE)
    words: list[tuple[str, float, float, str]] = []
    speakers = (MAIN_SPEAKER, USER_SPEAKER)
    for index, (samples, speaker) in enumerate(zip(pcm, speakers, strict=False)):
        for word in recognise(samples.contiguous().numpy()):
            text, start, end = _within(word, duration)
            if text:
                words.append((text, start, end, speaker))
            heard((index * duration + end) / len(pcm))
    words.sort(key=lambda word: word[1])
    entries = [[text, [start, end], speaker] for text, start, end, speaker in words]
    content = _content(audio) | {"alignments": entries}
    with written_whole(transcript_path(audio)) as beside:
        beside.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _within(word: tuple[str, float, float], duration: float) -> tuple[str, float, float]:
    """A word without space around it, its times in whole ms, within the recording, end > start."""
    text, start, end = word
    last = math.floor(duration * 1000) / 1000
    end = min(max(end, start + SHORTEST_WORD, 0.0), last)
    start = max(0.0, min(start, end - SHORTEST_WORD))
    return text.strip(), round(start, 3), round(end, 3)


if __name__ == "__main__":
    run_cli(main)
