"""`python -m eval.bench.gpu_check`: a CUDA machine's first words, on random weights of the 7B.

Nothing is downloaded. Measured, at Moshi 7B's shape in bfloat16, with TTT-MLP in every 4th layer:

- streaming: 300 frames through LMGen in CUDA graphs, with and without the memory;
- graphs: the same tokens forced through graphed and through eager streams must give the same
  logits and the same fast weights, for one row, and for two with exec masks and a reset;
- training: 5 steps of the real trainer on 100 s segments, gradient checkpointing on, LoRA with and
  without the memory, at the largest batch that fits (16 at most).

Where graphed and eager disagree the exit status is 1; the table is written all the same.
`--device cpu --small` runs the same code end to end on a small shape, without graphs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("NO_TORCH_COMPILE", "1")  # before moshi is imported: compiling takes minutes

import torch

from eval.bench.gpu_model import MOSHI_7B, SMALL, Shape, add_memory, build, clean, open_memories
from eval.bench.gpu_stream import TOLERANCE, compare, stream
from eval.bench.gpu_train import train
from moshi_ttt.config import TTTConfig
from moshi_ttt.errors import UserError, run_cli
from moshi_ttt.hybrid import unsplice
from moshi_ttt.lora import add_lora
from moshi_ttt.memory import MEMORIES
from moshi_ttt.models import choose_device

GIB = 2**30
DEFAULT = "ttt_mlp"
"""Memory that is checked unless another one is named."""
RESULTS = Path(__file__).parent / "results"


def measure(shape: Shape, device: torch.device) -> dict[str, list[dict[str, Any]]]:
    """All three parts, one model for all of them.

    Returns:
        Rows of `streaming`, `graphs` and `training`.
    """
    torch.manual_seed(0)
    lm = build(shape, device)
    say(f"{shape.name}: {sum(p.numel() for p in lm.parameters()) / 1e6:,.2f} M parameters")
    streaming = [{"memory": False, **stream(lm, shape.stream_frames)}]
    say(f"streaming without memory: {streaming[0]['ms_p50']:.2f} ms a frame")
    added = add_memory(lm, shape)
    open_memories(lm)
    streaming.append({"memory": True, **stream(lm, shape.stream_frames)})
    say(f"streaming with {added / 1e6:,.2f} M of memory: {streaming[1]['ms_p50']:.2f} ms a frame")
    graphs = []
    for rows in (1, 2):
        graphs.append(compare(lm, rows, shape.compare_frames, TOLERANCE[shape.dtype]))
        off, exact = graphs[-1]["logits"], graphs[-1]["exact"]
        say(f"graphed against eager, {rows} rows: {'exact' if exact else f'{off:.1e} off'}")
    unsplice(lm)
    clean(device)
    with torch.device(device):
        add_lora(lm, shape.rank, 2.0)
    training = []
    for memory in (False, True):
        if memory:
            add_memory(lm, shape)
        training.append(train(lm, shape, memory=memory))
        rate = training[-1]["tokens_per_second"] or 0.0
        say(f"{training_name(training[-1])}: {training[-1]['batch']} rows, {rate:,.0f} tokens/s")
    return {"streaming": streaming, "graphs": graphs, "training": training}


def say(line: str) -> None:
    """Progress, for a person."""
    sys.stderr.write(line + "\n")


def training_name(row: dict[str, Any]) -> str:
    """What was trained."""
    return "LoRA + memory" if row["memory"] else "LoRA only"


def gib(value: int | None) -> str:
    """Bytes as GiB; a dash where they are not counted."""
    return "-" if value is None else f"{value / GIB:.2f}"


def table(parts: dict[str, list[dict[str, Any]]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| streaming, 1 row | frames | ms p50 | ms p95 | GiB allocated | GiB reserved |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in parts["streaming"]:
        lines.append(
            f"| {'with' if r['memory'] else 'without'} memory | {r['frames']} | {r['ms_p50']:.2f} "
            f"| {r['ms_p95']:.2f} | {gib(r['allocated'])} | {gib(r['reserved'])} |"
        )
    lines += [
        "",
        "| graphed against eager | frames | logits | fast weights | tokens | never writing | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in parts["graphs"]:
        verdict = "exact" if r["exact"] else f"within {r['tolerance']:.1e}"
        rows = "1 row" if r["rows"] == 1 else f"{r['rows']} rows, exec masks and a reset"
        lines.append(
            f"| {rows} | {r['frames']} | {r['logits']:.1e} | {r['states']:.1e} "
            f"| {r['tokens_equal']:.0%} equal | {r['without_writing']:.1e} "
            f"| {verdict if r['passed'] else 'DIFFERS'} |"
        )
    lines += [
        "",
        "| training | trained | segment | batch | s a step | tokens/s | GiB allocated "
        "| GiB reserved |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in parts["training"]:
        seconds, rate = r["step_seconds"], r["tokens_per_second"]
        measured = "- | -" if rate is None else f"{seconds:.2f} | {rate:,.0f}"
        lines.append(
            f"| {training_name(r)} | {r['trained'] / 1e6:,.2f} M | {r['seconds']:g} s "
            f"| {r['batch'] or 'none fits'} | {measured} "
            f"| {gib(r['allocated'])} | {gib(r['reserved'])} |"
        )
    return "\n".join(lines) + "\n"


def about(
    shape: Shape, device: torch.device, arguments: Sequence[str], graphed: bool
) -> dict[str, str]:
    """Commit, date, machine, versions, command and what was run."""

    def git(*words: str) -> str:
        root = Path(__file__).parents[2]
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, cwd=root, check=False
        )
        return done.stdout.strip()

    dirty = " with changes" if git("status", "--porcelain", "moshi_ttt", "finetune", "eval") else ""
    machine, versions = platform.processor() or platform.machine(), f"torch {torch.__version__}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"
        versions += f", CUDA {torch.version.cuda}"
    dtype = str(shape.dtype).removeprefix("torch.")
    ttt = f"{shape.ttt.memory} in layers {shape.ttt.layers}, chunks of {shape.ttt.chunk_size}"
    return {
        "commit": (git("rev-parse", "HEAD") or "unknown") + dirty,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine,
        "versions": f"python {platform.python_version()}, {versions}, moshi {version('moshi')}",
        "command": shlex.join(["python", "-m", "eval.bench.gpu_check", *arguments]),
        "model": f"{shape.name}, random weights, {dtype}, {ttt}, LoRA of rank {shape.rank}",
        "cuda graphs": "yes" if graphed else "none: eager in their place",
        "torch.compile": "off" if os.environ.get("NO_TORCH_COMPILE") else "on",
    }


def write(
    folder: Path, memory: str, facts: dict[str, str], parts: dict[str, list[dict[str, Any]]]
) -> None:
    """gpu_check.json and gpu_check.md; of another memory than the default with its name."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "gpu_check" if memory == DEFAULT else f"gpu_check_{memory}"
    (folder / f"{name}.json").write_text(json.dumps(facts | parts, indent=1) + "\n")
    (folder / f"{name}.md").write_text(
        "# A GPU's first words\n\n"
        "Random weights; times are synchronised wall time after warm-up, medians where not said; "
        "differences in parts of the largest value, tolerance for logits and fast weights alike; "
        "`never writing` is how far logits are from those of a memory that does not write; "
        "tokens/s counts 9 target tokens a frame.\n\n"
        + table(parts)
        + "\n"
        + "".join(f"- {key}: `{value}`\n" for key, value in facts.items())
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write it down.

    Raises:
        UserError: there is no CUDA device, or the 7B was asked of a CPU.
        SystemExit: status 1, graphed and eager disagree.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m eval.bench.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ..., or cpu (with --small)")
    parser.add_argument("--small", action="store_true", help="a small shape, in seconds on a CPU")
    parser.add_argument("--memory", choices=list(MEMORIES), default=DEFAULT)
    parser.add_argument("--max-batch", type=int, help="rows of a training batch at most")
    parser.add_argument("--out", type=Path, help="directory for gpu_check.json, gpu_check.md")
    args = parser.parse_args(arguments)
    cpu = args.device == "cpu"
    if not (args.small if cpu else torch.cuda.is_available()):
        raise UserError(
            "a CUDA device is needed, and "
            + ("--device cpu was asked for" if cpu else "torch finds none")
            + "; --device cpu --small runs the same code on a small shape"
        )
    if args.max_batch is not None and args.max_batch < 1:
        raise UserError(f"--max-batch must be at least 1, got {args.max_batch}")
    device, shape = choose_device(args.device), SMALL if args.small else MOSHI_7B
    chunk_size = shape.ttt.chunk_size
    shape = replace(shape, ttt=TTTConfig(memory=args.memory, chunk_size=chunk_size))
    if args.max_batch is not None:
        shape = replace(shape, max_batch=args.max_batch)
    parts = measure(shape, device)
    sys.stdout.write(table(parts))
    out = args.out or (None if args.small else RESULTS)
    if out is not None:
        graphed = all(row["graphed"] for row in parts["streaming"])
        write(out, args.memory, about(shape, device, arguments, graphed), parts)
    if not all(row["passed"] for row in parts["graphs"]):
        say("graphed and eager streams disagree, or the memory's writes do not show")
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
