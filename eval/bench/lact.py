"""`python -m eval.bench.lact`: LaCT's backward against plain autograd and checkpointing.

The op alone, B = 1, float32, one thread, recordings of 4k to 32k frames. Three ways to train it:

- ours: the hand-written backward, which keeps every sqrt(n)-th chunk's state,
- plain: autograd through the same forward, chunk after chunk,
- checkpoint: the same, each chunk under `torch.utils.checkpoint`.

Of each: bytes saved for the backward (beyond parameters, state and frames), the most bytes alive at
one time in a forward and backward, and its time. Where outputs or gradients of the three disagree,
no speed is reported and the exit status is 1.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from eval.bench.ops import MIB, difference
from eval.provenance import provenance
from finetune.live_bytes import LiveBytes, kept
from moshi_ttt.errors import Parser, UserError, run_cli
from moshi_ttt.ops import lact
from moshi_ttt.ops.grid import Grid
from moshi_ttt.ops.lact_chunks import Slow, recall, write
from moshi_ttt.ops.lact_scan import scan

RESULTS = Path(__file__).parent / "results"
BOUNDS = {"outputs": 1e-5, "gradients": 1e-4}
"""Largest difference from plain autograd, relative to the largest value."""


def chunk_after_chunk(run: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`lact_scan.scan` as one writes it down; `run` calls a chunk's function."""

    def plain_scan(
        grid: Grid,
        slow: Slow,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lr: Tensor,
        gates: Tensor,
        W: Tensor,
        D: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        def one(W: Tensor, D: Tensor, q: Tensor, *frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            o, _ = recall(q, W, slow.residual)
            k, v, lr, gates = frames
            return o, *write(slow, W, D, (k, v, lr), gates, None)[:2]

        assert grid.start == 0
        assert not grid.leftover
        outputs = []
        for frames in zip(q, k, v, lr, gates, strict=True):
            o, W, D = run(one, W, D, *frames)
            outputs.append(o)
        return torch.stack(outputs), W, D

    return plain_scan


WAYS = {
    "ours": scan,
    "plain": chunk_after_chunk(lambda f, *x: f(*x)),
    "checkpoint": chunk_after_chunk(lambda f, *x: checkpoint(f, *x, use_reentrant=False)),
}


class Case:
    """Random slow weights and frames; the rates and gates as they are when training starts."""

    def __init__(self, frames: int, heads: int, width: int, chunk_size: int) -> None:
        torch.manual_seed(0)
        shape = (1, heads, frames)
        W = torch.randn(3, heads, 1, width, width) * width**-0.5
        q, k, v = torch.nn.functional.silu(torch.randn(3, *shape, width))
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
        lr, m, w = 2e-3 * torch.rand(*shape, 3), *torch.randn(2, *shape).sigmoid()
        made = (*W, torch.full((heads,), 0.05), q, k, v, lr, m, w)
        self.leaves = [x.clone().requires_grad_() for x in made]
        Wg, Wu, Wo, eta, *self.frames = self.leaves
        self.params = lact.Params(Wg, Wu, Wo, eta, chunk_size)
        self.weight = torch.randn(*shape, width)

    def forward(self, way: str) -> Tensor:
        """The outputs."""
        with mock.patch.object(lact, "scan", WAYS[way]):
            return lact.chunk(self.params, lact.init_state(self.params, 1), *self.frames)[0]

    def train(self, way: str) -> list[Tensor]:
        """The outputs and all gradients of `sum(o * weight)`."""
        o = self.forward(way)
        return [o.detach(), *torch.autograd.grad((o * self.weight).sum(), self.leaves)]

    def saved(self, way: str) -> float:
        """MiB that the forward saves."""
        with kept(self.leaves) as found:
            o = self.forward(way)
        assert o.requires_grad
        return found.bytes / MIB

    def alive(self, way: str) -> float:
        """Most MiB alive in a forward and backward."""
        with LiveBytes() as live:
            self.train(way)
        return live.peak / MIB


def measure(case: Case, ways: Sequence[str], rounds: int, bar: Any) -> dict[str, Any]:
    """One row: of each way its bytes and times, which are taken in turn.

    Raises:
        ArithmeticError: the ways disagree.
    """
    T = case.frames[0].shape[2]
    base, agree = case.train(ways[-1]), {}
    for way in ways[:-1]:
        mine = case.train(way)
        errors = [difference(x, y) for x, y in zip(mine, base, strict=True)]
        agree[way] = {"outputs": errors[0], "gradients": max(errors[1:])}
        for what, error in agree[way].items():
            if not error <= BOUNDS[what]:
                raise ArithmeticError(
                    f"{T} frames: {what} of {way} and {ways[-1]} differ by {error:.1e} relative, "
                    f"more than {BOUNDS[what]:.0e}; no speed is reported"
                )
        bar.update(T)
    sizes = {way: {"saved": case.saved(way), "alive": case.alive(way)} for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            begin = time.process_time()
            case.train(way)
            seconds[way].append(time.process_time() - begin)
            bar.update(T)
    row: dict[str, Any] = {"frames": T, "differences": agree}
    for way in ways:
        ratios = [x / y for x, y in zip(seconds["ours"], seconds[way], strict=True)]
        row[way] = sizes[way] | {
            "seconds": statistics.median(seconds[way]),
            "ratio": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
        }
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| frames | way | saved MiB | most alive MiB | s | ours / it | its range |",
        "| ---: | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        for way in WAYS:
            found = row.get(way)
            if found is None:
                lines.append(f"| {row['frames']} | {way} | {row['skipped']} |  |  |  |  |")
                continue
            low, high = found["range"]
            lines.append(
                f"| {row['frames']} | {way} | {found['saved']:.1f} | {found['alive']:.1f} "
                f"| {found['seconds']:.2f} | {found['ratio']:.2f} | {low:.2f} to {high:.2f} |"
            )
    worst = max(x["gradients"] for row in rows for x in row["differences"].values())
    return "\n".join([*lines, "", f"Gradients differ by at most {worst:.1e} relative."]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, measure, print the table and write it down.

    Raises:
        UserError: options that make no sense.
        SystemExit: status 1, the ways do not agree.
    """
    parser = Parser("python -m eval.bench.lact", __doc__)
    parser.add_argument("--frames", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--chunk-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--most-gib", type=float, default=8.0, help="plain autograd is left out above it"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the results")
    args = parser.parse_args(arguments)
    if min(args.heads, args.width, args.chunk_size, args.rounds) < 1:
        raise UserError("--heads, --width, --chunk-size and --rounds must be at least 1")
    if min(args.frames) < 1 or any(T % args.chunk_size for T in args.frames):
        raise UserError(f"--frames must be whole chunks of {args.chunk_size}, got {args.frames}")
    torch.set_num_threads(1)
    bar = tqdm(total=sum(args.frames) * (3 * args.rounds + 2), file=sys.stderr, unit="frame")
    rows, each = [], None
    try:
        for T in sorted(args.frames):
            case = Case(T, args.heads, args.width, args.chunk_size)
            each = case.alive("plain") / T if each is None else each
            if each * T <= 1024 * args.most_gib:
                rows.append(measure(case, ["ours", "checkpoint", "plain"], args.rounds, bar))
            else:
                rows.append(measure(case, ["ours", "checkpoint"], args.rounds, bar))
                rows[-1]["skipped"] = f"would keep {each * T / 1024:.1f} GiB: left out"
    except ArithmeticError as error:
        sys.stderr.write(f"\n{error}\n")
        sys.exit(1)
    bar.close()
    text = (
        "# LaCT's backward\n\n"
        f"The op alone, B = 1, {args.heads} heads of {args.width}, chunks of {args.chunk_size}, "
        "momentum and Muon, float32; forward and backward, CPU time of one thread, medians of "
        f"{args.rounds} rounds in which the ways take turns, ratios within a round. Gradients are "
        "compared before any time is taken. Most alive has the frames' outputs and gradients in "
        "it, the same in every way; ours adds the Newton-Schulz steps of one group of chunks.\n\n"
        f"{table(rows)}\n"
    )
    sys.stdout.write(text)
    facts = provenance("eval.bench.lact")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "lact_backward.json").write_text(
        json.dumps(facts | {"rows": rows}, indent=1) + "\n"
    )
    listed = "".join(f"- {key}: `{value}`\n" for key, value in facts.items())
    (args.out / "lact_backward.md").write_text(text + listed)


if __name__ == "__main__":
    run_cli(main)
