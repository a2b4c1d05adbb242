"""ms a frame, by the number of sessions: stock Moshi and Moshi with a memory, part by part.

    python -m eval.bench.frame                        newest checkpoint, else the embedded base
    python -m eval.bench.frame --shape 7b             a GPU: random weights, nothing is downloaded

Both models are the same but for the memory (LoRA too), and share their weights. On a CPU they take
turns of 16 frames, and the ratio is one of CPU time within a turn: other work on the machine then
changes it little. On a GPU, in CUDA graphs as `moshi_ttt.engine` has them, one follows the other,
and parts are timed by events in its stream. The frames are noise: no time depends on what is heard.
A frame is `Engine.step`; the LM's step is `LMGen.step` in it: embeddings, temporal transformer,
text head, depformer with its heads, drawing all tokens, and the cache of tokens.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("NO_TORCH_COMPILE", "1")  # before moshi is imported: compiling takes minutes

import torch
import yaml
from moshi.models.loaders import get_mimi
from sentencepiece import SentencePieceProcessor

from eval.bench.frame_table import as_row, figure, page
from eval.bench.frame_timing import Models, fits, in_turn, sharing
from eval.bench.gpu_model import MOSHI_7B, SMALL, add_memory, build
from eval.bench.gpu_train import largest_batch
from eval.output import save_figure, write_json
from eval.provenance import provenance
from moshi_ttt.config import TTTConfig
from moshi_ttt.errors import Parser, UserError, run_cli
from moshi_ttt.hybrid import HybridLMModel, splice, unsplice
from moshi_ttt.memory import MEMORIES
from moshi_ttt.models import choose_device, cpu_threads, open_talker

RESULTS = Path(__file__).parent / "results"
CONFIGS = Path(__file__).parents[2] / "configs"
SHAPES = {"7b": MOSHI_7B, "small": SMALL}
STOCK, MEMORY = "stock", "with memory"


class Wordless:
    """A tokenizer for random weights, whose tokens mean nothing."""

    def id_to_piece(self, token: int) -> str:
        """The token's number."""
        return str(token)


def of_shape(name: str, memory: str, device: torch.device) -> Models:
    """Models of random weights."""
    torch.manual_seed(0)
    shape = SHAPES[name]
    shape = replace(shape, ttt=TTTConfig(memory=memory, chunk_size=shape.ttt.chunk_size))
    stock = build(shape, device)
    spliced = sharing(stock)
    add_memory(spliced, shape)
    mimi = get_mimi(None, device=device, num_codebooks=stock.n_q - stock.dep_q)
    tokenizer = cast(SentencePieceProcessor, Wordless())
    about = f"{shape.name}, random weights, {memory} in layers {shape.ttt.layers}"
    return Models(
        {STOCK: stock, MEMORY: spliced}, {STOCK: mimi, MEMORY: sharing(mimi)}, tokenizer, about
    )


def of_files(args: argparse.Namespace, device: torch.device) -> Models:
    """A checkpoint with and without its memory, or a base without and with an untrained one.

    Raises:
        UserError: it cannot be loaded, or has no memory, or another one was asked for.
    """
    talker = open_talker(args.checkpoint, args.base, device)
    lms, name = {STOCK: talker.lm, MEMORY: sharing(talker.lm)}, talker.name
    if isinstance(talker.lm, HybridLMModel):
        if args.memory:
            raise UserError(f"--memory {args.memory}: {name} has a memory; name a --base with it")
        unsplice(talker.lm)
    else:
        family = args.memory or "ttt_mlp"
        file = CONFIGS / ("tiny.yaml" if family == "ttt_mlp" else f"tiny_{family}.yaml")
        ttt = TTTConfig.from_dict(yaml.safe_load(file.read_text())["ttt"])
        splice(lms[MEMORY], ttt)
        name = f"{name}; with memory: the untrained {family} of configs/{file.name}"
    mimis = {STOCK: talker.mimi, MEMORY: sharing(talker.mimi)}
    return Models(lms, mimis, talker.tokenizer, name)


def measure(models: Models, args: argparse.Namespace) -> dict[str, Any]:
    """The rows of the table, and how many sessions fit."""
    rows, frames, most = [], args.frames, args.most
    for size in args.batches:
        say(f"{size} sessions: {frames} frames of each model")
        rows.append(as_row(size, in_turn(models, size, frames), STOCK, MEMORY, args.clock))
    found = {}
    for name in models.lms:
        say(f"sessions that fit in 80 ms, {name}: up to {most}")
        found[name] = largest_batch(
            lambda b, n=name: fits(models, n, b, min(frames, 90), args.clock), most
        )
    return {
        "rows": rows,
        "fit": found,
        "most": most,
        "frames": frames,
        "model": models.name,
        "clock": args.clock,
    }


def say(line: str) -> None:
    """Progress, for a person."""
    sys.stderr.write(line + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options.

    Raises:
        UserError: unknown, malformed or contradictory ones.
    """
    parser = Parser("python -m eval.bench.frame", __doc__)
    parser.add_argument("--checkpoint", help="a checkpoint folder (the newest under runs/)")
    parser.add_argument("--base", help="a base; alone: with an untrained memory")
    parser.add_argument("--shape", choices=list(SHAPES), help="random weights of this shape")
    parser.add_argument("--memory", choices=list(MEMORIES), help="without a checkpoint (ttt_mlp)")
    parser.add_argument("--device", help="cuda or cpu (cuda if there is one)")
    parser.add_argument("--batches", default="1,4,8,32", help="sessions at a time (1,4,8,32)")
    parser.add_argument("--frames", type=int, default=300, help="of each model and batch (300)")
    parser.add_argument("--most", type=int, default=256, help="sessions tried at most (256)")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall",
        help="cpu: CPU time of the thread, on a machine that has other work too",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args(arguments)
    try:
        args.batches = [int(size) for size in args.batches.split(",")]
    except ValueError as error:
        raise UserError(f"--batches {args.batches}: numbers with commas, as in 1,4,8") from error
    if min(*args.batches, args.frames, args.most) < 1:
        raise UserError("--batches, --frames and --most must be at least 1")
    if args.shape and (args.checkpoint or args.base):
        raise UserError(f"--shape {args.shape} has random weights: neither checkpoint nor base")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write it down and draw it.

    Raises:
        UserError: unknown or malformed options, a model that cannot be loaded, or a 7B on a CPU.
    """
    args = parse(arguments)
    device = choose_device(args.device)
    if args.clock == "cpu" and device.type != "cpu":
        raise UserError(
            f"--clock cpu: the model runs on {device}; only its wall time means anything"
        )
    if args.shape == "7b" and device.type != "cuda":
        raise UserError("--shape 7b needs a CUDA device; --shape small runs the same code anywhere")
    if args.shape:
        models = of_shape(args.shape, args.memory or "ttt_mlp", device)
    else:
        models = of_files(args, device)
    torch.set_num_threads(cpu_threads(models.lms[STOCK]))
    about = provenance("eval.bench.frame", device)
    results = measure(models, args) | about
    stem = f"frame_{args.shape}" if args.shape else "frame"
    save_figure(figure(results, STOCK, MEMORY), args.out / stem)
    gpu = None if args.shape == "7b" else args.out / "frame_7b.md"
    text = page(results, STOCK, MEMORY, f"{stem}.png", gpu)
    (args.out / f"{stem}.md").write_text(text)
    write_json(results, args.out / f"{stem}.json")
    sys.stdout.write(text)


if __name__ == "__main__":
    run_cli(main)
