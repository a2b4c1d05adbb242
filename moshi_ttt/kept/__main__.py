"""Memories kept by name, a file a person: `python -m moshi_ttt.kept list | export | delete`.

    python -m moshi_ttt.kept list
    python -m moshi_ttt.kept export anna anna.safetensors
    python -m moshi_ttt.kept delete anna

A name is letters and digits of any script, and "-", "_", "." and single spaces after the first of
them; "Anna" is "anna". Conversations make and save these files (`moshi_ttt.stream --user anna`, and
the server), into `$MOSHI_TTT_MEMORIES`, or else `$XDG_DATA_HOME/moshi_ttt/memories`
(`~/.local/share`), or what --memories names. An exported one is a file for --load-memory.
"""

from __future__ import annotations

import argparse
import sys

from moshi_ttt.errors import Parser, run_cli
from moshi_ttt.kept.folder import Kept, clock


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's options.

    Raises:
        UserError: unknown, missing or malformed ones.
    """
    p = Parser("python -m moshi_ttt.kept", __doc__)
    commands = p.add_subparsers(dest="command", metavar="COMMAND", required=True)
    about = {
        "list": "whose memories are kept",
        "export": "copy a memory to a file of your own",
        "delete": "remove a memory",
    }
    for command, words in about.items():
        one = commands.add_parser(command, help=words, description=words, allow_abbrev=False)
        one.add_argument("--memories", metavar="FOLDER", help="where memories are kept")
        if command != "list":
            one.add_argument("name", metavar="NAME", help="whose")
        if command == "export":
            one.add_argument("to", metavar="FILE", help="the file to write")
            one.add_argument("--force", action="store_true", help="write over one that is there")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """List, export or delete.

    Raises:
        UserError: what the user has to change.
    """
    args = parse(argv)
    kept = Kept(args.memories)
    if args.command == "export":
        found = kept.export(args.name, args.to, force=args.force)
        sys.stdout.write(
            f"exported {found.name} ({found}) to {args.to}; --load-memory starts with it\n"
        )
    elif args.command == "delete":
        found = kept.delete(args.name)
        sys.stdout.write(f"deleted {found.name} ({found}) from {kept.folder}\n")
    else:
        sys.stdout.write(table(kept))


def table(kept: Kept) -> str:
    """What is kept, for people."""
    memories, strangers = kept.list(), kept.strangers()
    width = max([4, *(len(memory.name) for memory in memories)])
    lines = [f"{'name':{width}}  {'minutes':>8}  {'saved':16}  {'MiB':>8}"]
    for m in memories:
        lived = "broken" if m.broken else f"{m.seconds / 60:.1f}"
        lines.append(f"{m.name:{width}}  {lived:>8}  {clock(m.saved)}  {m.size / 2**20:8.2f}")
    if not memories:
        lines = [f"nothing is kept in {kept.folder}"]
    lines += [f"{m.path} is broken: {m.broken}" for m in memories if m.broken]
    lines += [f"{path} is nobody's: not a name, or not a file" for path in strangers]
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    run_cli(main)
