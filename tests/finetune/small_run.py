"""A small base, a few seconds of sound, and runs of the real trainer on them."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import soundfile
import torch
import yaml
from safetensors.torch import load_file

from finetune.train import train
from tests.small import small_base
from tests.test_hybrid import codes_for

LORA_ONLY = {"ttt": "none"}
MEMORY_ONLY = {"lora__enable": False}
ROOT = Path(__file__).parents[2]
SECONDS = {"dialogue": (4.0, 2), "reading": (2.2, 1), "held_out": (5.0, 2), "panel": (7.0, 1)}
"""Recording -> seconds and channels; the panel's is longer than four windows of the small base."""
MANIFESTS = {
    "train": ["dialogue", "reading"],
    "stereo": ["dialogue"],
    "mono": ["reading"],
    "eval": ["held_out"],
    "panel": ["panel"],
}


class World:
    """A folder with a base, recordings, and a config; `run` trains as the config and more says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = small_base(folder / "base")
        rng = np.random.default_rng(0)
        for name, (seconds, channels) in SECONDS.items():
            noise = 0.1 * rng.standard_normal((int(seconds * 24_000), channels))
            soundfile.write(folder / f"{name}.wav", noise, 24_000)
        words = [["seven", [0.4, 0.7], "SPEAKER_MAIN"], ["days", [2.5, 2.9], "SPEAKER_MAIN"]]
        for name in ("dialogue", "held_out"):
            (folder / f"{name}.json").write_text(json.dumps({"alignments": words}))
        for name, recordings in MANIFESTS.items():
            lines = [{"path": f"{r}.wav", "duration": SECONDS[r][0]} for r in recordings]
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        self.config = self.write_config(
            "x",
            {
                "run_dir": str(folder / "run"),
                "moshi_paths": {"hf_repo_id": str(self.base)},
                "data": {
                    "train_data": str(folder / "train.jsonl"),
                    "eval_data": str(folder / "eval.jsonl"),
                    "codes_cache": str(folder / "codes"),
                    "encode_workers": 1,
                },
                "lora": {"enable": True, "rank": 4},
                "ttt": {"layers": "all", "chunk_size": 4, "num_heads": 2},
                "duration_sec": 1.2,
                "batch_size": 2,
                "max_steps": 2,
                "gradient_checkpointing": False,
                "eval": {"eval_after_training": False},  # pictures take seconds
                "optim": {"lr": 1e-3, "gate_lr": 0.1, "schedule": "cosine"},
            },
        )

    def write_config(self, name: str, values: dict) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def run(self, run_dir: Path, *, drawn: bool = False, **overrides) -> Path:
        """Train in this process; keys as on the command line, `__` for a dot.

        Without its curves unless they are to be `drawn`: they take as long as all the rest.
        """
        keys = {k.replace("__", "."): v for k, v in overrides.items()}
        with nullcontext() if drawn else mock.patch("finetune.train.plot_curves"):
            train(str(self.config), **{"run_dir": str(run_dir), **keys})
        return run_dir


def command(*args: object, **env: str) -> subprocess.CompletedProcess:
    """`python -m finetune.train ARGS` in a process of its own; WANDB_* only as given."""
    around = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    around |= {"NO_TORCH_COMPILE": "1", "OMP_NUM_THREADS": "1"} | env
    return subprocess.run(
        [sys.executable, "-m", "finetune.train", *map(str, args)],
        cwd=ROOT, env=around, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def lines(run_dir: Path, kind: str = "train") -> list[dict]:
    """The metrics of one kind."""
    found = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


def checkpoint(run_dir: Path) -> Path:
    """The newest one's `consolidated` folder."""
    return sorted((run_dir / "checkpoints").iterdir())[-1] / "consolidated"


def weights(run_dir: Path) -> dict:
    """All tensors that the newest checkpoint holds."""
    files = sorted(checkpoint(run_dir).glob("*.safetensors"))
    assert files
    return {k: t for f in files for k, t in load_file(f).items()}


def logits(lm):
    """Of the frozen model: a weight that wants a gradient makes matmul differ by an ulp."""
    lm.requires_grad_(False)
    with torch.no_grad():
        out = lm.eval()(codes_for(lm, 2, 25))
    return torch.cat([out.text_logits.flatten(), out.logits[out.mask].flatten()])
