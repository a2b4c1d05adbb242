"""All memories side by side: trained, also with writing off, scored, sized and timed.

Each family of configs/tiny*.yaml is trained on the embedded speech with the same steps and, but for
2 %, the same number of trained parameters (LoRA's rank takes what a memory leaves), by every seed,
once as it is and once with writing off. Runs that are finished are not made again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eval.bench.gpu_stream import stream
from eval.bench.memories_table import TOKENS_A_STEP, as_markdown, compared, figure
from eval.bench.runs import newest, timed, train
from eval.output import save_figure, write_json
from eval.provenance import provenance
from eval.trainings import trained_parameters
from moshi_ttt.block import HybridSeqModelingBlock
from moshi_ttt.checkpoint import load
from moshi_ttt.errors import Parser, UserError, run_cli
from moshi_ttt.lanes import named_tensors
from moshi_ttt.states import ttt_blocks

CONFIGS = {
    "TTT-Linear": "configs/tiny_ttt_linear.yaml",
    "TTT-MLP": "configs/tiny.yaml",
    "LaCT": "configs/tiny_lact.yaml",
    "Atlas": "configs/tiny_atlas.yaml",
}
LORA = "configs/tiny_lora.yaml"
"""The baseline that all are told from: as many parameters, no memory."""
RESULTS = Path(__file__).parent / "results"
FRAMES = 200
"""Of a timing of a stream, 16 s."""


def run_dir(root: Path, name: str, writing: bool, seed: int) -> Path:
    """Where a run is; LoRA alone has no writing to switch off."""
    stem = name.lower().replace("-", "_").replace(" ", "_")
    return root / f"{stem}{'' if writing else '_writing_off'}_{seed}"


def config_of(name: str) -> str:
    """The run's configuration."""
    return CONFIGS.get(name, LORA)


def state_bytes(block: HybridSeqModelingBlock) -> int:
    """Of one stream's memory in one layer: fast weights, momentum, buffers, convolution."""
    with torch.no_grad():
        return sum(tensor.nbytes for _, tensor in named_tensors(block.memory.init_state(1)))


def sizes(folder: Path) -> dict[str, int]:
    """Trained parameters of a run, and the bytes of its memories' state in one stream."""
    loaded = load(newest(folder))
    blocks = ttt_blocks(loaded.lm).values() if loaded.ttt is not None else ()
    return {
        "state_bytes": sum(map(state_bytes, blocks)),
        "parameters": trained_parameters(newest(folder) / "consolidated"),
    }


def frame_times(folders: dict[str, Path], rounds: int) -> dict[str, float]:
    """Median ms of a frame through LMGen, one stream, the models in turn."""
    models = {name: load(newest(folder)).lm for name, folder in folders.items()}
    found: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, lm in models.items():
            found[name].append(stream(lm, FRAMES)["ms_p50"])
    return {name: statistics.median(times) for name, times in found.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: `python -m eval.bench.memories`.

    Raises:
        UserError: unknown or malformed options, or a training that failed.
    """
    parser = Parser("python -m eval.bench.memories", __doc__)
    root = Path("runs/memories")
    parser.add_argument("--root", type=Path, default=root, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-steps", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="gets memories.md, .json, .png")
    args = parser.parse_args(arguments)
    if min(args.seeds, args.max_steps, args.rounds) < 1:
        raise UserError("--seeds, --max-steps and --rounds must be at least 1")
    measure(args)


def measure(args: argparse.Namespace) -> None:
    """Train what is missing, and write the table."""
    seeds, names = range(args.seeds), ["LoRA only", *CONFIGS]
    torch.set_num_threads(1)
    runs = [(n, w, s) for s in seeds for n in names for w in (True, False) if w or n in CONFIGS]
    for place, (name, writing, seed) in enumerate(runs):
        sys.stderr.write(f"run {place + 1} of {len(runs)}: {name}, seed {seed}"
                         f"{'' if writing else ', writing off'}\n")  # fmt: skip
        more = () if writing else ("--ttt.writing", "false")
        train(
            run_dir(args.root, name, writing, seed), config_of(name), "--seed", seed,
            "--max_steps", args.max_steps, "--ckpt_freq", 0, "--do_eval", "false", *more,
        )  # fmt: skip

    def briefly(name: str, turn: int) -> Path:
        folder = args.root / "timing" / f"{turn}_{run_dir(args.root, name, True, 0).name}"
        train(
            folder, config_of(name), "--max_steps", 8, "--log_freq", 1, "--do_ckpt", "false",
            "--do_eval", "false", "--eval.eval_after_training", "false",
        )  # fmt: skip
        return folder

    def folders(name: str, writing: bool = True) -> list[Path]:
        return [run_dir(args.root, name, writing, seed) for seed in seeds]

    firsts = {name: folders(name)[0] for name in names}
    steps, frames = timed(names, briefly, args.rounds), frame_times(firsts, args.rounds)
    rows: list[dict[str, Any]] = []
    for name in names:
        off = folders(name, False) if name in CONFIGS else None
        row = {"memory": name} | compared(folders(name), off, folders("LoRA only"))
        row |= sizes(firsts[name]) | {"ms_per_frame": frames[name]}
        row |= {"tokens_per_s": TOKENS_A_STEP / steps[name]}
        rows.append(row)
    about = provenance("eval.bench.memories") | {"steps of training": str(args.max_steps)}
    text = as_markdown(rows, args.seeds, about)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "memories.md").write_text(text)
    write_json(about | {"rows": rows}, args.out / "memories.json")
    save_figure(figure(rows), args.out / "memories")
    sys.stdout.write(text)


if __name__ == "__main__":
    run_cli(main)
