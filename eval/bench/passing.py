"""What passing states, and carrying keys and values, are worth: trained, scored, timed.

Four runs a seed on the embedded speech, with the same budget: passing on and off, `carry_kv` on and
off. A segment is as long as the attention window. Runs that are finished are not made again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.bench.runs import recordings, timed, train
from eval.provenance import provenance
from eval.stats import estimate
from moshi_ttt.errors import Parser, UserError, run_cli

ARMS = {
    (passing, kv): f"{'on' if passing else 'off'}, {'on' if kv else 'off'}"
    for passing in (False, True)
    for kv in (False, True)
}
"""(states passed, keys and values carried) -> the table's words."""
RANGES = ("1x-2x", "1x-4x", "4x-end")
KEYS = ("--duration_sec", "4", "--batch_size", "48", "--state_reset_interval", "0",
        "--do_eval", "false")  # fmt: skip
RESULTS = Path(__file__).parent / "results"


def run_dir(root: Path, arm: tuple[bool, bool], seed: int) -> Path:
    """Where a run is."""
    passing, kv = arm
    return root / f"passing_{'on' if passing else 'off'}_kv_{'on' if kv else 'off'}_{seed}"


def train_arm(arm: tuple[bool, bool], folder: Path, *more: object) -> None:
    """Train one run, or finish it.

    Raises:
        UserError: it failed.
    """
    passing, kv = arm
    train(
        folder, "configs/tiny.yaml", *KEYS, "--carry_kv", str(kv).lower(),
        "--state_passing" if passing else "--no_state_passing", *more,
    )  # fmt: skip


def compared(root: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Of each arm NLL and its difference from the first arm, over all seeds.

    A recording's value is its mean over the seeds; intervals are 95 % cluster bootstrap over
    speakers, each of which reads one recording.
    """
    found = {a: [recordings(run_dir(root, a, s)) for s in seeds] for a in ARMS}
    first = next(iter(ARMS))
    names = sorted(found[first][0])
    rows = []
    for arm, label in ARMS.items():
        row: dict[str, Any] = {"arm": label}
        for key in RANGES:
            mine, base = (
                np.array([[run[n][key] for n in names] for run in found[a]]) for a in (arm, first)
            )
            missing = f"no recording has {key}"
            row[key] = estimate(mine.mean(0), names, missing).to_dict()
            row[f"{key} difference"] = estimate((mine - base).mean(0), names, missing).to_dict()
            row[f"{key} seeds"] = (mine - base).mean(1).tolist()
        rows.append(row)
    return rows


def as_markdown(rows: list[dict[str, Any]], seeds: Sequence[int]) -> str:
    """The table."""
    lines = [
        "| states passed, keys and values | 1x-4x | minus off, off | 4x-end | minus off, off "
        "| time of a step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [row["arm"]]
        for key in RANGES[1:]:
            gap = row[f"{key} difference"]
            by_seed = ", ".join(f"{x:+.3f}" for x in row[f"{key} seeds"])
            cells.append(f"{row[key]['mean']:.4f}")
            same = row is rows[0]
            cells.append("" if same else f"{gap['mean']:+.4f} [{gap['low']:+.4f}, "
                         f"{gap['high']:+.4f}] (seeds {by_seed})")  # fmt: skip
        cells.append(f"{row['step']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([
        "# Passing states, carrying keys and values", "",
        f"Embedded speech, configs/tiny.yaml, segments of one window (4 s), 48 lanes, {len(seeds)} "
        "seeds; NLL of codebook 0 in nats, memory kept, 24 held-out voices; 95 % cluster bootstrap "
        "over voices of the mean over seeds; time relative to off, off, arms in turn.",
        "", *lines, "",
    ])  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: `python -m eval.bench.passing`.

    Raises:
        UserError: unknown or malformed options, or a training that failed.
    """
    parser = Parser("python -m eval.bench.passing", __doc__)
    parser.add_argument(
        "--root", type=Path, default=Path("runs/passing"), help="folder of the runs"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-steps", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=3, help="of timing")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="gets passing.md and passing.json"
    )
    args = parser.parse_args(arguments)
    if min(args.seeds, args.max_steps, args.rounds) < 1:
        raise UserError("--seeds, --max-steps and --rounds must be at least 1")

    def trained(arm: tuple[bool, bool], turn: int) -> Path:
        folder = args.root / "timing" / f"{turn}_{run_dir(args.root, arm, 0).name}"
        short = ("--max_steps", 12, "--log_freq", 1, "--do_ckpt", "false")
        train_arm(arm, folder, *short, "--eval.eval_after_training", "false")
        return folder

    seeds = range(args.seeds)
    for seed in seeds:
        for arm in ARMS:
            more = ("--seed", seed, "--max_steps", args.max_steps)
            train_arm(arm, run_dir(args.root, arm, seed), *more)
    rows = compared(args.root, seeds)
    steps = timed(list(ARMS), trained, args.rounds)
    least = steps[next(iter(ARMS))]
    for row, arm in zip(rows, ARMS, strict=True):
        row["step"] = steps[arm] / least
    made = provenance("eval.bench.passing")
    listed = "".join(f"- {key}: `{value}`\n" for key, value in made.items())
    text = f"{as_markdown(rows, seeds)}\n{listed}"
    (args.out / "passing.md").write_text(text)
    found = json.dumps(made | {"rows": rows}, indent=1)
    (args.out / "passing.json").write_text(found + "\n")
    sys.stdout.write(text)


if __name__ == "__main__":
    run_cli(main)
