"""`python -m eval.bench.scoring`: time of scoring a frame, against one frame a call.

The tiny base's shape (window 50 frames), alone and with the memory of configs/tiny.yaml, recordings
of different lengths, float32, one thread. What it is compared with is what one would write: a
stream, `forward_text` and `forward_depformer_training` of one frame, the NLL of its codes, no more.

Times are CPU time (others may share the machine), the ways taking turns in every round. First every
way's NLL is compared with that loop's; where they differ, no time is reported and the status is 1,
as it is where one recording at a time is not 8 times as fast as the loop.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("NO_TORCH_COMPILE", "1")  # before moshi is imported: compiling takes minutes

import torch
import torch.nn.functional as F
import yaml
from moshi.models.lm import LMModel
from moshi.models.lm_utils import _delay_sequence
from torch import Tensor
from tqdm import tqdm

from eval.perplexity import FRAMES_PER_CALL, score
from eval.provenance import provenance
from moshi_ttt.base import find_base, load_base
from moshi_ttt.config import TTTConfig
from moshi_ttt.errors import Parser, UserError, run_cli
from moshi_ttt.hybrid import splice
from moshi_ttt.states import ttt_blocks
from moshi_ttt.tiny.model import BASE_WEIGHTS, build_base

TARGET = 8.0
"""How many times as fast as one frame a call, one recording at a time."""
BOUND = 1e-4
"""Largest difference of an NLL in nats, float32."""
RESULTS = Path(__file__).parent / "results"
CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"


@dataclass(frozen=True)
class Way:
    """How recordings are scored.

    Attributes:
        label: for the table.
        recordings: how many.
        run: gives [9, T] NLL of each.
    """

    label: str
    recordings: int
    run: Callable[[LMModel, Sequence[Tensor]], list[Tensor]]


@torch.no_grad()
def frame_by_frame(lm: LMModel, recordings: Sequence[Tensor]) -> list[Tensor]:
    """[1 + dep_q, T] NLL of each [17, T]: a stream, one frame a call, nothing else."""
    out = []
    for codes in recordings:
        initial = lm._get_initial_token()
        inputs = torch.cat([initial, _delay_sequence(lm.delays, codes[None], initial)], 2)
        rows, frames = 1 + lm.dep_q, codes.shape[1]
        late = torch.full((rows, frames + max(lm.delays)), float("nan"))
        with lm.streaming(1):
            for t in range(frames):
                after = inputs[:, :, t + 1 : t + 2]
                hidden, text = lm.forward_text(inputs[:, :, t : t + 1])
                audio = lm.forward_depformer_training(after, hidden)
                late[0, t] = F.cross_entropy(text[0, 0], after[0, 0])
                # a delayed codebook's initial token is no code: what it gives is left out below
                target = after[0, 1:rows, 0].clamp(max=lm.card - 1)
                late[1:, t] = F.cross_entropy(audio[0, :, 0], target, reduction="none")
        delays = enumerate(lm.delays[:rows])
        out.append(torch.stack([late[row, delay : delay + frames] for row, delay in delays]))
    return out


def scored(rows: int) -> Callable[[LMModel, Sequence[Tensor]], list[Tensor]]:
    """`eval.perplexity.score` as it is by default, so many recordings at a time."""
    return lambda lm, recordings: [nll.values for nll in score(lm, recordings, rows=rows)]


WAYS = [
    Way("one frame a call", 1, frame_by_frame),
    Way("score, 1 at a time", 2, scored(1)),
    Way("score, 4 at a time", 8, scored(4)),
    Way("score, 8 at a time", 16, scored(8)),
]


def tiny_lm(folder: Path, ttt: TTTConfig | None) -> LMModel:
    """The embedded base, with a memory whose gates are open: else the check would not see it."""
    lm = load_base(find_base(folder), dtype=torch.float32).eval()
    if ttt is not None:
        splice(lm, ttt)
        with torch.no_grad():
            for block in ttt_blocks(lm).values():
                block.gate.fill_(0.5)
    return lm


def make_recordings(lm: LMModel, frames: int) -> list[Tensor]:
    """Random codes [17, T], T from 3/4 to 5/4 of `frames`, in an order that is none of length."""
    count = max(way.recordings for way in WAYS)
    lengths = [frames * 3 // 4 + frames // 2 * (i * 7 % count) // count for i in range(count)]
    cards = torch.tensor([lm.text_card] + [lm.card] * lm.n_q).view(-1, 1)
    return [(torch.rand(len(cards), length) * cards).long() for length in lengths]


def measure(lm: LMModel, name: str, frames: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each way: ms a frame, and how many times as fast as one frame a call.

    Raises:
        ArithmeticError: an NLL differs by more than `BOUND`, or is a number in one way only.
    """
    torch.manual_seed(0)
    recordings = make_recordings(lm, frames)
    bar = tqdm(total=rounds * len(WAYS) + len(recordings), desc=name, file=sys.stderr, unit="run")
    wanted: list[Tensor] = []
    for codes in recordings:
        wanted += frame_by_frame(lm, [codes])
        bar.update()
    differ = [difference(way, lm, recordings, wanted) for way in WAYS]
    times: list[list[float]] = [[] for _ in WAYS]
    for _ in range(rounds):
        for way, taken in zip(WAYS, times, strict=True):
            part = recordings[: way.recordings]
            begin = time.process_time()
            way.run(lm, part)
            seconds = time.process_time() - begin
            taken.append(1e3 * seconds / sum(codes.shape[1] for codes in part))
            bar.update()
    bar.close()
    rows = []
    for way, taken, most in zip(WAYS, times, differ, strict=True):
        ratios = [base / mine for base, mine in zip(times[0], taken, strict=True)]
        rows.append({
            "model": name, "way": way.label, "ms": statistics.median(taken),
            "times": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
            "difference": most,
        })  # fmt: skip
    return rows


def difference(
    way: Way, lm: LMModel, recordings: Sequence[Tensor], wanted: Sequence[Tensor]
) -> float:
    """The largest difference from `wanted` in nats, over a way's recordings.

    Raises:
        ArithmeticError: it is above `BOUND`, or something is a number in one of them only.
    """
    pairs = zip(way.run(lm, recordings[: way.recordings]), wanted, strict=False)
    most = 0.0
    for mine, theirs in pairs:
        known = theirs.isfinite()
        if not torch.equal(mine.isfinite(), known):
            raise ArithmeticError(f"{way.label}: an NLL is there in one way only: no times")
        most = max(most, float((mine - theirs)[known].abs().max()))
    if most > BOUND:
        raise ArithmeticError(f"{way.label}: an NLL differs by {most:.3g} nats: no times")
    return most


def missed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The models for which one recording at a time is less than `TARGET` times as fast."""
    one = [row for row in rows if row["way"] == WAYS[1].label]
    return [row["model"] for row in one if row["times"] < TARGET]


def page(rows: Sequence[dict[str, Any]], frames: int, rounds: int) -> str:
    """The results as a page."""
    lines = [
        "| model | way | ms a frame | times as fast | its range | NLL differs by at most |",
        "| --- | --- | ---: | ---: | --- | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['way']} | {row['ms']:.3f} | {row['times']:.1f} "
            f"| {row['least']:.1f} to {row['most']:.1f} | {row['difference']:.1e} |"
        )
    verdict = "missed: " + ", ".join(missed(rows)) if missed(rows) else "met"
    return (
        "# Scoring against one frame a call\n\n"
        f"The tiny base (window 50), random codes, recordings of {frames * 3 // 4} to "
        f"{frames * 5 // 4} frames, calls of {FRAMES_PER_CALL}, float32; CPU time of one thread, "
        f"medians of {rounds} rounds in which the ways take turns, ratios within a round. All NLL "
        "are compared before any time is taken, in nats. Target: one recording at a time is "
        f"{TARGET:g} times as fast: **{verdict}**."
        "\n\n" + "\n".join(lines) + "\n\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, measure, print the table and write it down.

    Raises:
        UserError: options that make no sense.
        SystemExit: status 1, the ways do not agree, or the target is missed.
    """
    parser = Parser("python -m eval.bench.scoring", __doc__)
    parser.add_argument("--frames", type=int, default=300, help="mean length of a recording")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the results")
    args = parser.parse_args(arguments)
    if args.rounds < 1 or args.frames < 8:
        raise UserError(f"--frames must be at least 8 ({args.frames}), --rounds 1 ({args.rounds})")
    torch.set_num_threads(1)
    memory = TTTConfig.from_dict(yaml.safe_load(CONFIG.read_text())["ttt"])
    rows = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            base = build_base(folder, weights=BASE_WEIGHTS)
            for name, ttt in (("base", None), (f"base with {memory.memory}", memory)):
                rows += measure(tiny_lm(base, ttt), name, args.frames, args.rounds)
    except ArithmeticError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(1)
    text = page(rows, args.frames, args.rounds)
    sys.stdout.write(text)
    facts = provenance("eval.bench.scoring")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "scoring.json").write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    listed = "".join(f"- {key}: `{value}`\n" for key, value in facts.items())
    (args.out / "scoring.md").write_text(text + listed)
    if missed(rows):
        sys.stderr.write(f"less than {TARGET:g} times as fast: {', '.join(missed(rows))}\n")
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
