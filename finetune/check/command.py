"""Is a data set ready to train on? Every line of every manifest is looked at, all audio is read.

Prints what there is, what is wrong with it, where, and what to do, and at the end "ready" or "not
ready". Exit status: 0 ready (there may be notes), 1 not ready, 2 wrong use. Give all manifests of a
training at once, those to evaluate on too: then a recording that is in two of them is found.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tqdm import tqdm

from finetune.check.findings import ERROR, KINDS, Finding
from finetune.check.lines import manifests, read_lines
from finetune.check.recording import Checked, check_line, read_header
from finetune.check.report import LISTED, as_json, as_text, printable
from moshi_ttt.errors import Parser, UserError
from moshi_ttt.files import check_writable, written_whole


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's options.

    Raises:
        UserError: unknown or malformed ones.
    """
    p = Parser("python -m finetune.check", __doc__)
    p.add_argument("manifests", nargs="+", help="jsonl, or a folder for all in it")
    p.add_argument("--duration-sec", type=_seconds, help="training's segment: what is shorter?")
    p.add_argument("--tokenizer", help="sentencepiece model: which words does it not know?")
    p.add_argument("--all", action="store_true", help=f"list all findings, not {LISTED} a kind")
    p.add_argument("--json", metavar="FILE", help="write all of it for machines too")
    return p.parse_args(argv)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def main(argv: list[str] | None = None) -> bool:
    """Check and report.

    Returns:
        Whether the data is ready to train on.

    Raises:
        UserError: what the user has to call otherwise, before anything is read.
    """
    args = parse(argv)
    paths = manifests(args.manifests)
    out = None if args.json is None else check_writable(args.json)
    tokenizer = _tokenizer(args.tokenizer)
    checked, findings = check(paths, args.duration_sec, tokenizer)
    if out is not None:
        with written_whole(out) as beside:
            beside.write_text(json.dumps(as_json(checked, findings), indent=1), encoding="utf-8")
    text = as_text(checked, findings, None if args.all else LISTED)
    sys.stdout.write(printable(text) + "\n")
    return not any(KINDS[f.kind].severity == ERROR for f in findings)


def _tokenizer(given: str | None) -> SentencePieceProcessor | None:
    if given is None:
        return None
    if not Path(given).is_file():
        raise UserError(f"--tokenizer {given}: no such file")
    try:
        return SentencePieceProcessor(model_file=given)
    except (RuntimeError, OSError) as error:
        raise UserError(f"--tokenizer {given}: not a sentencepiece model: {error}") from error


def check(
    paths: Sequence[Path],
    duration_sec: float | None = None,
    tokenizer: SentencePieceProcessor | None = None,
) -> tuple[list[Checked], list[Finding]]:
    """Look at every line of some manifests and read all their audio once.

    Args:
        paths: manifests that exist.
        duration_sec: the length of training's segments.
        tokenizer: of the text.

    Returns:
        The recordings, and what was found, in the order of the lines.
    """
    checked: list[Checked] = []
    findings: list[Finding] = []
    lines = []
    for path in paths:
        own = list(read_lines(path))
        if not own:
            findings.append(Finding("no recordings", path, 0, "", "it has no lines"))
        lines += own
    headers = [
        [] if line.shard else [read_header(f) for f in line.files]
        for line in tqdm(lines, desc="reading headers", unit="recording", delay=1)
    ]
    # tqdm warns when rounding carries the sum past the total
    total = sum(h.seconds for group in headers for h in group) / 60 + 1e-6
    bar_format = "{l_bar}{bar}| {n:.1f}/{total:.1f} min [{elapsed}<{remaining}]"
    with tqdm(total=total, desc="listening", bar_format=bar_format) as bar:
        for line, group in zip(lines, headers, strict=True):
            checked.append(
                check_line(line, group, lambda s: bar.update(s / 60), duration_sec, tokenizer)
            )
    add_duplicates(checked)
    return checked, findings + [f for c in checked for f in c.findings]


def add_duplicates(checked: Sequence[Checked]) -> None:
    """Note files that are named twice, and different files with the same sound in them."""
    paths: dict[str, Checked] = {}
    sounds: dict[str, tuple[Checked, str]] = {}
    for one in checked:
        told: set[str] = set()
        for name, file in zip(one.line.names, one.line.files, strict=True):
            real = os.path.realpath(file)
            first = paths.setdefault(real, one)
            if first is not one or real in told:
                _add_twice(one, first, name, "the same file is in")
            told.add(real)
        for digest, name in one.digests.items():
            first, other = sounds.setdefault(digest, (one, name))
            same_file = os.path.realpath(first.line.manifest.parent / other) == os.path.realpath(
                one.line.manifest.parent / name
            )
            if not same_file:
                _add_twice(one, first, name, f"the same sound as {other} in")


def _add_twice(one: Checked, first: Checked, name: str, what: str) -> None:
    leak = one.line.manifest != first.line.manifest
    one.add("in two manifests" if leak else "twice", f"{what} {first.line.where}", name)
