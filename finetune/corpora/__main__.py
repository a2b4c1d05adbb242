"""Manifests of corpora: `python -m finetune.corpora NAME ...`, `NAME --help`.

Each of them writes what data.train_data of a config names, or what finetune.encode reads.
"""

from __future__ import annotations

import argparse
import sys

from finetune.corpora import daily_talk, embedded, folder, librilight
from moshi_ttt.errors import Parser, run_cli


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's options.

    Raises:
        UserError: unknown or malformed ones.
    """
    p = Parser("python -m finetune.corpora", __doc__)
    names = p.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, about in (
        ("librilight", "a folder in Libri-Light's layout; a book is a recording"),
        ("folder", "any folder of wav, flac, mp3 and ogg; a file is a recording"),
    ):
        one = names.add_parser(name, help=about, description=about, allow_abbrev=False)
        one.add_argument("root", help="the folder")
        one.add_argument("out", metavar="OUT.jsonl", help="the manifest to write")
        one.add_argument(
            "--skip-broken", action="store_true", help="leave out what cannot be read"
        )  # fmt: skip
    names.add_parser("daily_talk", help=f"fetch {daily_talk.REPO} into {daily_talk.FOLDER}")
    names.add_parser("embedded", help="make the embedded speech under data/tiny")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Make a corpus or its manifest.

    Raises:
        UserError: what the user has to change.
    """
    args = parse(argv)
    if args.name == "librilight":
        librilight.prepare(args.root, args.out, skip_broken=args.skip_broken)
    elif args.name == "folder":
        folder.prepare(args.root, args.out, skip_broken=args.skip_broken)
    elif args.name == "daily_talk":
        daily_talk.prepare()
        sys.stdout.write(f"{daily_talk.FOLDER}: its .jsonl files are the manifests\n")
    else:
        embedded.prepare()
        sys.stdout.write("data/tiny/speech: its .jsonl files are the manifests\n")


if __name__ == "__main__":
    run_cli(main)
