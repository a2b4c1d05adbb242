"""Which recordings are scored: Libri-Light's layout or a manifest, one item a speaker."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor

from eval.scores import Item
from finetune.data.codes import CodesCache
from finetune.data.corpus import Corpus
from finetune.data.interleaver import Interleaver
from finetune.data.manifest import Recording, read_manifest
from moshi_ttt.audio import audio_info
from moshi_ttt.errors import UserError

SIDES = ("moshi", "user")


@dataclass(frozen=True)
class Book:
    """One recording of a panel: files that follow each other.

    Attributes:
        name: unique in its panel.
        speaker: who reads it; the name itself where nothing says who.
        files: one, or a book's chapters in their natural order.
    """

    name: str
    speaker: str
    files: tuple[Recording, ...]

    @property
    def seconds(self) -> float:
        """Length of all files."""
        return sum(f.duration for f in self.files)


def read_panel(data: str | Path) -> list[Book]:
    """Find the recordings of a manifest (jsonl) or of a folder in Libri-Light's layout.

    Libri-Light: `<root>/<small|medium|large>/<speaker>/<book>/<stem>.flac`, with `speaker` in the
    json of the same stem; any part of it may be given, down to one book. A book's chapters, in
    natural order (2 before 10), are one recording. In a manifest each line is one.

    Raises:
        UserError: no such path, nothing in it, or an audio file that is broken.
    """
    path = Path(data).expanduser()
    if path.is_file():
        return _from_manifest(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder or manifest")
    found: dict[tuple[str, str], list[Path]] = {}
    for flac in path.resolve().rglob("*.flac"):
        speaker = _speaker(flac) or flac.parent.parent.name
        found.setdefault((speaker, flac.parent.name), []).append(flac)
    if not found:
        raise UserError(f"{path}: no .flac file under it (<speaker>/<book>/<stem>.flac is wanted)")
    books = []
    for (speaker, book), flacs in sorted(found.items()):
        chapters = sorted(flacs, key=lambda flac: natural(flac.stem))
        files = []
        for flac in chapters:
            info = audio_info(flac)
            files.append(Recording(flac, info.duration, info.channels, str(flac)))
        books.append(Book(f"{speaker}/{book}", speaker, tuple(files)))
    return books


def choose(
    books: Sequence[Book], min_seconds: float, max_items: int | None = None
) -> tuple[list[Book], list[str]]:
    """One book a speaker, fixed by the hash of its name, and at most `max_items` speakers.

    Args:
        books: all there are.
        min_seconds: shorter ones are left out.
        max_items: None is all.

    Returns:
        The chosen ones, in the order of their hashes, and lines that say what was left out.

    Raises:
        UserError: none is long enough.
    """
    long = [b for b in books if b.seconds >= min_seconds]
    if not long:
        longest = max(books, key=lambda b: b.seconds)
        raise UserError(
            f"no recording is as long as {min_seconds:g} s; the longest of {len(books)} is "
            f"{longest.name} with {longest.seconds:.1f} s (--min-seconds takes shorter ones)"
        )
    by_speaker: dict[str, Book] = {}
    for book in sorted(long, key=lambda b: _hash(b.name)):
        by_speaker.setdefault(book.speaker, book)
    chosen = list(by_speaker.values())[:max_items]
    left = []
    if len(long) < len(books):
        left.append(
            f"{len(books) - len(long)} of {len(books)} recordings are shorter than "
            f"{min_seconds:g} s and left out"
        )
    if len(by_speaker) < len(long):
        left.append(f"{len(long) - len(by_speaker)} more recordings of the same speakers left out")
    if len(chosen) < len(by_speaker):
        left.append(f"{len(chosen)} of {len(by_speaker)} speakers taken (--max-items)")
    return chosen, left


def shorten(book: Book, seconds: float) -> Book:
    """The first files of a book, as many as it takes for so many seconds."""
    files: list[Recording] = []
    for file in book.files:
        if sum(f.duration for f in files) >= seconds:
            break
        files.append(file)
    return replace(book, files=tuple(files))


def make_items(
    books: Sequence[Book],
    cache: CodesCache,
    tokenizer: SentencePieceProcessor,
    side: str = "moshi",
    workers: int = 1,
) -> list[Item]:
    """Codes of the books, encoded where the cache lacks them.

    A mono recording is on `side`, and the codes of silence on the other; a stereo one has Moshi on
    the left, or on the right with `side="user"`. Each file is encoded from a fresh codec. The text
    row is the transcript where there is one on Moshi's side, else padding.

    Args:
        books: see `read_panel`.
        cache: with `mono_side=side`.
        tokenizer: of the text row.
        side: the stream of the first channel.
        workers: processes that encode.

    Raises:
        UserError: broken audio or transcript.
    """
    if side not in SIDES or cache.mono_side != side:
        raise ValueError(f"side {side!r} is not one of {SIDES}, or not the cache's")
    cache.prepare([f for b in books for f in b.files], workers)
    return [_item(book, cache, Interleaver(tokenizer), side) for book in books]


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key in which numbers count as numbers."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part)
        for part in re.split(r"(\d+)", name)
        if part
    ]


def _item(book: Book, cache: CodesCache, interleaver: Interleaver, side: str) -> Item:
    corpus = Corpus(book.files, cache, interleaver)
    parts, known = [], True
    for index, (file, frames) in enumerate(zip(book.files, corpus.lengths, strict=True)):
        part = corpus.read(index, 0, frames)
        codes = part.codes
        if side == "user" and file.channels == 2:
            text = torch.full_like(codes[:1], interleaver.text_padding)
            moshi, user = codes[1:].chunk(2)
            codes = torch.cat([text, user, moshi])
        known &= part.text_known and side == "moshi"
        parts.append(codes)
    return Item(book.name, book.speaker, torch.cat(parts, dim=-1), known)


def _from_manifest(path: Path) -> list[Book]:
    books = []
    for recording in read_manifest(path):
        name = str(recording.path)
        books.append(Book(name, _speaker(recording.path) or name, (recording,)))
    names = [b.name for b in books]
    for book in books:
        if names.count(book.name) > 1:
            raise UserError(f"{book.files[0].where}: {book.name} is in the manifest twice")
    return books


def _speaker(audio: Path) -> str | None:
    """The `speaker` of the json beside a file, if there is one and it says."""
    beside = audio.with_suffix(".json")
    if not beside.is_file():
        return None
    try:
        content = json.loads(beside.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{beside}: not JSON: {error}") from error
    speaker = content.get("speaker") if isinstance(content, dict) else None
    return None if speaker is None else str(speaker)


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
