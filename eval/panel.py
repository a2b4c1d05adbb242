"""Which recordings are scored: Libri-Light's layout or a manifest, one item a speaker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from tqdm import tqdm

from eval.arms import hashed
from eval.scores import Item
from finetune.corpora.librilight import find_books
from finetune.corpora.listing import Group
from finetune.data.codes import CodesCache
from finetune.data.corpus import Corpus
from finetune.data.interleaver import Interleaver
from finetune.data.manifest import read_lines
from finetune.data.recording import AudioFile, Recording, open_audio
from moshi_ttt.errors import UserError

SIDES = ("moshi", "user")


@dataclass(frozen=True)
class Failed:
    """A recording that cannot be read.

    Attributes:
        name: of the recording.
        reason: what is wrong, with file and line.
    """

    name: str
    reason: str


def read_panel(data: str | Path, failed: list[Failed] | None = None) -> list[Recording]:
    """Find the recordings of a manifest (jsonl, of codes too) or of a folder of Libri-Light.

    A folder has Libri-Light's layout, or is any part of it, down to one book; see
    `finetune.corpora.librilight.find_books`. In a manifest each line is one recording.

    Args:
        data: the manifest or the folder.
        failed: what cannot be read is added here and left out; None raises at the first.

    Raises:
        UserError: no such path, nothing in it, an audio file that is broken, or a name twice.
    """
    path = Path(data).expanduser()
    if path.is_file():
        lines = list(read_lines(path))
        found = [(" + ".join(line.names), line.recording) for line in lines]
    elif path.is_dir():

        def broken(name: str, error: UserError) -> None:
            assert failed is not None
            failed.append(Failed(name, str(error)))

        books = find_books(path, None if failed is None else broken)
        found = [(book.name, partial(_open, book)) for book in books]
    else:
        raise UserError(f"{path}: no such folder or manifest")
    recordings: list[Recording] = []
    for name, read in tqdm(found, desc="reading headers", unit="recording", delay=1):
        try:
            recordings.append(read())
        except UserError as error:
            if failed is None:
                raise
            failed.append(Failed(name, str(error)))
    if not recordings:
        reason = f"; the first: {failed[0].reason}" if failed else ""
        raise UserError(f"{path}: no recording that can be read{reason}")
    names = Counter(r.name for r in recordings)
    for recording in recordings:
        if names[recording.name] > 1:
            raise UserError(f"{recording.where}: {recording.name} is there twice")
    return recordings


def _open(book: Group) -> Recording:
    return replace(open_audio(book.files, str(book.files[0].parent), book.speaker), name=book.name)


def choose(
    books: Sequence[Recording], min_seconds: float, max_items: int | None = None
) -> tuple[list[Recording], list[str]]:
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
    long = [b for b in books if b.duration >= min_seconds]
    if not long:
        longest = max(books, key=lambda b: b.duration)
        raise UserError(
            f"no recording is as long as {min_seconds:g} s; the longest of {len(books)} is "
            f"{longest.name} with {longest.duration:.1f} s (--min-minutes takes shorter ones)"
        )
    by_speaker: dict[str, Recording] = {}
    for book in sorted(long, key=lambda b: hashed(b.name)):
        by_speaker.setdefault(speaker_of(book), book)
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


def shorten(book: Recording, seconds: float) -> Recording:
    """The first files of a book, as many as it takes for so many seconds; stored codes as is."""
    files: list[AudioFile] = []
    for file in book.files:
        if sum(f.duration for f in files) >= seconds:
            break
        files.append(file)
    if not files:
        return book
    return replace(book, files=tuple(files), duration=sum(f.duration for f in files))


def speaker_of(book: Recording) -> str:
    """Who reads it; the name itself where nothing says who."""
    return book.speaker or book.name


def make_items(
    books: Sequence[Recording],
    cache: CodesCache,
    tokenizer: SentencePieceProcessor,
    side: str = "moshi",
    workers: int = 1,
    failed: list[Failed] | None = None,
) -> list[Item]:
    """Codes of the books, encoded where the cache lacks them.

    A mono recording is on `side`, and the codes of silence on the other; a stereo one has Moshi on
    the left, or on the right with `side="user"`. The text
    row is the transcript where there is one on Moshi's side, else padding.

    Args:
        books: see `read_panel`.
        cache: with `mono_side=side`.
        tokenizer: of the text row.
        side: the stream of the first channel.
        workers: processes that encode.
        failed: what cannot be read is added here and left out; None raises at the first.

    Raises:
        UserError: broken audio or transcript, or no recording is left.
    """
    if side not in SIDES or cache.mono_side != side:
        raise ValueError(f"side {side!r} is not one of {SIDES}, or not the cache's")
    lost: dict[str, str] = {}

    def broken(book: Recording, error: UserError) -> None:
        lost.setdefault(book.name, str(error))

    cache.prepare(books, workers, None if failed is None else broken)
    items: list[Item] = []
    for book in books:
        try:
            if book.name not in lost:
                items.append(_item(book, cache, Interleaver(tokenizer), side))
        except UserError as error:
            if failed is None:
                raise
            broken(book, error)
    if failed is not None:
        failed += [Failed(name, reason) for name, reason in lost.items()]
    if not items:
        reason = f"; the first: {next(iter(lost.values()))}" if lost else ""
        raise UserError(f"none of {len(books)} recordings can be read{reason}")
    return items


def _item(book: Recording, cache: CodesCache, interleaver: Interleaver, side: str) -> Item:
    corpus = Corpus([book], cache, interleaver)
    whole = corpus.read(0, 0, corpus.lengths[0])
    codes = whole.codes
    if side == "user" and book.channels == 2:
        text = torch.full_like(codes[:1], interleaver.text_padding)
        moshi, user = codes[1:].chunk(2)
        codes = torch.cat([text, user, moshi])
    known = whole.text_known and side == "moshi"
    return Item(book.name, speaker_of(book), codes, known)
