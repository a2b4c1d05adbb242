"""Hours: is it as fast, as small and as sound at the end as it was in the second minute?

    python -m eval.bench.soak --codes 10                  hours of codes through the LM
    python -m eval.bench.soak --engine 1                  hours of speech through the whole engine
    python -m eval.bench.soak --sessions 8 --minutes 20   conversations come and go, in real time

The first two go as fast as the machine can. Each is one part of soak.json and soak.md; the other
parts stay. A window is a minute (of codes 20), `--window` seconds of sound. Exit status 1 if one
of three promises is broken, all against the second window: bytes in memory at the end of any later
one within 1 %; time of a step in the last one within 5 %, counted in steps of a twin that is always
young (`soak_watch`: the machine has other work); and no number that is none, in sound, scores and
memories.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eval.bench.soak_crowd import soak_sessions
from eval.bench.soak_runs import FRAMES_PER_MINUTE, soak_codes, soak_engine
from eval.bench.soak_watch import FLAT, STEADY
from eval.output import write_json
from eval.provenance import provenance
from eval.tables import as_markdown
from moshi_ttt.errors import Parser, UserError, run_cli
from moshi_ttt.models import Talker, choose_device, cpu_threads, open_talker

RESULTS = Path(__file__).parent / "results"
PARTS = ("codes", "engine", "sessions")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options.

    Raises:
        UserError: unknown, malformed or contradictory ones.
    """
    parser = Parser("python -m eval.bench.soak", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--codes", type=float, metavar="HOURS", help="through the LM, from codes")
    what.add_argument("--engine", type=float, metavar="HOURS", help="through the whole engine")
    what.add_argument("--sessions", type=int, metavar="ROWS", help="through a host, in real time")
    parser.add_argument("--minutes", type=float, help="with --sessions: how long (20)")
    parser.add_argument("--window", type=float, help="seconds of sound (60; --codes: 1200)")
    parser.add_argument("--checkpoint", help="a checkpoint folder (the newest under runs/)")
    parser.add_argument("--base", help="a base folder or hub repository; alone: without a memory")
    parser.add_argument("--device", help="cuda or cpu (cuda if there is one)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of soak.json, soak.md")
    args = parser.parse_args(arguments)
    if args.minutes is not None and args.sessions is None:
        raise UserError("--minutes belongs to --sessions")
    for name in ("codes", "engine", "sessions", "minutes", "window"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be positive, got {value}")
    args.part = next(name for name in PARTS if getattr(args, name) is not None)
    hours = (args.minutes or 20) / 60 if args.part == "sessions" else getattr(args, args.part)
    args.frames = round(hours * 60 * FRAMES_PER_MINUTE)
    seconds = args.window or (1200 if args.part == "codes" else 60)
    args.window = round(seconds * FRAMES_PER_MINUTE / 60)
    if args.frames < 3 * args.window or args.window < 1:
        raise UserError(
            f"{args.frames} frames are less than three windows of {args.window}: there is nothing "
            "to compare; let it run longer, or name a shorter --window"
        )
    return args


def soak(talker: Talker, args: argparse.Namespace) -> dict[str, Any]:
    """Run the part that was asked for."""
    if args.part == "codes":
        return soak_codes(talker, args.frames, args.window)
    if args.part == "engine":
        return soak_engine(talker, args.frames, args.window)
    return soak_sessions(talker, args.sessions, args.frames, args.window)


def page(parts: dict[str, dict[str, Any]]) -> str:
    """All parts that have run, as Markdown."""
    head = ["", "sound", "MiB, 2nd window", "highest later", "step / young twin's, 2nd", "last",
            "last / 2nd", "CPU ms, 2nd", "last", "wall ms, 2nd", "last", "no number"]  # fmt: skip
    rows, notes = [head], []
    for name, part in parts.items():
        windows = part["windows"]
        second, last = windows[1], windows[-1]
        rows.append([
            name, f"{part['frames'] / FRAMES_PER_MINUTE:.0f} min",
            f"{second['resident'] / 2**20:.1f}", f"{part['grown'] - 1:+.2%}",
            f"{second['age']:.3f}", f"{last['age']:.3f}", f"{part['slower']:.3f}",
            *(f"{w[key]:.2f}" for key in ("ms", "wall_ms") for w in (second, last)),
            "; ".join(part["bad"]) or "none",
        ])  # fmt: skip
        notes += [f"## {name}", "", f"{len(windows)} windows: {verdict(part)}.", ""]
        known = {"frames", "windows", "grown", "slower", "bad", "flat", "steady", "finite"}
        notes += [f"- {key}: {value}" for key, value in part.items() if key not in known] + [""]
    return (
        f"# Soak\n\nBytes in memory (resident) within {FLAT:.0%}, time of a step within "
        f"{STEADY:.0%} of the second window's; a step of codes is a call of 100 frames. Times are "
        "medians over a window's steps; what is compared is a step over one of a young twin right "
        "after it, in CPU time of their thread, for other work on the machine slows both alike.\n\n"
        + as_markdown(rows) + "\n\n" + "\n".join(notes)
    )  # fmt: skip


def verdict(part: dict[str, Any]) -> str:
    """The three promises, in words."""
    said = {"flat": ("memory flat", "MEMORY GREW"), "steady": ("as fast", "SLOWER"),
            "finite": ("all finite", "NOT FINITE")}  # fmt: skip
    return ", ".join(words[not part[name]] for name, words in said.items())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a soak, print and write what was found.

    Raises:
        UserError: unknown or malformed options, or a model that cannot be loaded.
        SystemExit: status 1, a promise was broken.
    """
    args = parse(arguments)
    device = choose_device(args.device)
    talker = open_talker(args.checkpoint, args.base, device)
    torch.set_num_threads(cpu_threads(talker.lm))
    found = soak(talker, args) | {"model": talker.name} | provenance("eval.bench.soak", device)
    file = args.out / "soak.json"
    parts = json.loads(file.read_text()) if file.is_file() else {}
    parts = {name: found if name == args.part else parts.get(name) for name in PARTS}
    parts = {name: part for name, part in parts.items() if part}
    write_json(parts, file)
    text = page(parts)
    (args.out / "soak.md").write_text(text)
    sys.stdout.write(text)
    if not (found["flat"] and found["steady"] and found["finite"]):
        sys.stderr.write(f"{args.part}: {verdict(found)}\n")
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
