"""All that a run goes on from, beside the adapters of a checkpoint: written, found, read.

Tensors go through `torch.distributed.checkpoint`, every rank its part, as safetensors (its usual
format is a pickle); what is no tensor goes into trainer.json. Any number of ranks can read it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from moshi.models.lm import LMModel
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh

from finetune.data.loader import Loader
from finetune.optim import MasterAdamW
from finetune.sharding import spread
from finetune.world import World
from moshi_ttt.errors import UserError
from moshi_ttt.lanes import FRESH, Lanes, lane_holders, lanes_of, named_tensors

FORMAT = 1
FOLDER, ABOUT = "trainer", "trainer.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_KEYS = {"progress", "config", "reading", "adam_steps", "lanes", "random", "base"}


class TrainerState:
    """The parts of a run whose state is saved.

    Args:
        lm: its trained parameters, and the lanes on it.
        optimizer: masters, moments and step counts of each parameter.
        loader: where every lane reads.
        world: the ranks.
        mesh: what the model is sharded over, None on one rank.
        base: fingerprint of the base's weights.

    Attributes:
        progress: counters: the `step` done last, `frames` heard by all lanes, steps `skipped`.
    """

    def __init__(
        self,
        lm: LMModel,
        optimizer: MasterAdamW,
        loader: Loader,
        world: World,
        mesh: DeviceMesh | None,
        base: str,
    ) -> None:
        self.lm, self.optimizer, self.loader = lm, optimizer, loader
        self.world, self.mesh, self.base = world, mesh, base
        self.progress: dict[str, int] = {"step": 0, "frames": 0, "skipped": 0}
        names = {id(p): name for name, p in lm.named_parameters()}
        self.masters = {names[id(p)]: master for p, master in optimizer.pairs}

    def save(self, folder: Path, config: dict[str, Any]) -> None:
        """Write the state after a step; every rank has to call it.

        Args:
            folder: there and empty.
            config: of the run.

        Raises:
            OSError: what the disk said, on every rank.
        """
        tensors: dict[str, Any] = {f"master.{n}": m.detach() for n, m in self.masters.items()}
        steps = {}
        for name, master in self.masters.items():
            if moments := self.optimizer.adamw.state.get(master):
                steps[name] = int(moments["step"])
                tensors |= {f"{key}.{name}": moments[key] for key in _MOMENTS}
        held: dict[str, list[str]] = {}
        for module, lanes in lanes_of(self.lm).items():
            rows = lanes.tensors()
            rows[FRESH] = rows[FRESH].flatten().to(torch.uint8)
            held[module] = sorted(rows)
            tensors |= {f"lanes.{module}.{n}": spread(t, self.mesh) for n, t in rows.items()}
        random = {f"{kind}.{self.world.rank}": s for kind, s in _random_states().items()}
        tensors |= random
        about = {
            "format": FORMAT, "progress": self.progress, "config": config,
            "reading": self.loader.state_dict(), "adam_steps": steps, "lanes": held,
            "random": sorted(n for found in self.world.gather(random) for n in found),
            "base": self.base,
        }  # fmt: skip
        try:
            writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
            with _quiet():
                save(tensors, storage_writer=writer)
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error
        if self.world.first:
            (folder / ABOUT).write_text(json.dumps(about))

    def load(self, folder: Path) -> None:
        """Take a saved state over; every rank has to call it.

        Raises:
            UserError: it is of another model, other data or another number of lanes.
        """
        about = read_about(folder)
        for file in folder.glob("*.safetensors"):
            try:
                with safe_open(file, "pt"):
                    pass
            except SafetensorError as error:
                raise UserError(f"{file} is broken: {error}") from error
        if about["base"] != self.base:
            raise UserError(f"{folder}: it was trained on a base with other weights")
        tensors: dict[str, Any] = {f"master.{n}": m.detach() for n, m in self.masters.items()}
        for name in about["adam_steps"]:
            if name not in self.masters:
                raise UserError(f"{folder}: {name} was trained there and is not here")
            moments = {key: torch.zeros_like(self.masters[name]) for key in _MOMENTS}
            step = torch.tensor(float(about["adam_steps"][name]))
            self.optimizer.adamw.state[self.masters[name]] = {"step": step} | moments
            tensors |= {f"{key}.{name}": moment for key, moment in moments.items()}
        rows: dict[str, dict[str, Tensor]] = {}
        holders = lane_holders(self.lm)
        if set(about["lanes"]) != set(lanes_of(self.lm)):
            raise UserError(f"{folder}: other layers carried something from segment to segment")
        for module, names in about["lanes"].items():
            lanes = holders[module]._lanes
            assert lanes is not None
            count = lanes.batch_size * len(lanes.values)
            like = dict(named_tensors(holders[module].lane_value()))
            rows[module] = {
                n: torch.zeros(count, *t.shape[1:], dtype=t.dtype, device=self.lm.device)
                for n, t in like.items()
                if n in names
            }
            rows[module][FRESH] = torch.zeros(count, dtype=torch.uint8, device=self.lm.device)
            tensors |= {
                f"lanes.{module}.{n}": spread(t, self.mesh) for n, t in rows[module].items()
            }
        random = {f"{k}.{self.world.rank}": s for k, s in _random_states().items()}
        # a further rank, or the GPU of a run from a CPU, begins with the seed's
        random = {name: state for name, state in random.items() if name in about["random"]}
        tensors |= random
        try:
            self.loader.load_state_dict(about["reading"])
            with _quiet():
                load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))
        except (CheckpointException, ValueError) as error:
            cause: BaseException = error
            if isinstance(error, CheckpointException):
                cause = next(iter(error.failures.values()))[0]
            reason = " ".join(f"{cause}".split())[:300] or type(cause).__name__
            raise UserError(f"{folder} does not fit this run: {reason}") from error
        for module, found in rows.items():
            lanes = holders[module]._lanes
            assert lanes is not None
            shape = len(lanes.values), lanes.batch_size
            fresh = found.pop(FRESH).bool().view(shape)
            holders[module]._lanes = Lanes.load(
                {FRESH: fresh} | found, holders[module].lane_value(), fresh.device
            )
        with torch.no_grad():
            for p, master in self.optimizer.pairs:
                if master is not p:
                    p.copy_(master)
        _set_random_states({k.partition(".")[0]: s for k, s in random.items()})
        self.progress = about["progress"]


def read_about(folder: Path) -> dict[str, Any]:
    """What is no tensor of a saved state.

    Raises:
        UserError: there is none, or it is of another version.
    """
    try:
        about = json.loads((folder / ABOUT).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no state to go on from: {error}") from error
    format_ = about.get("format") if isinstance(about, dict) else None
    if format_ != FORMAT:
        raise UserError(f"{folder}: format {format_!r}, this version reads {FORMAT}")
    if missing := sorted(_KEYS - set(about)):
        raise UserError(f"{folder / ABOUT} lacks {missing[0]!r}")
    return about


def numbered(checkpoints: Path) -> dict[int, Path]:
    """The checkpoints of a run, by their steps, in order; none that is being written."""
    found = {f.name.removeprefix("checkpoint_"): f for f in checkpoints.glob("checkpoint_*")}
    return dict(sorted((int(step), f) for step, f in found.items() if step.isdecimal()))


def newest_state(run_dir: Path) -> Path | None:
    """The newest saved state of a run, None if there is none."""
    found = [f / FOLDER for f in numbered(run_dir / "checkpoints").values()]
    return next((f for f in reversed(found) if (f / ABOUT).is_file()), None)


def find_state(name: str) -> Path:
    """The saved state that a person means: a run's newest, a checkpoint's, or that folder itself.

    Raises:
        UserError: nothing to go on from.
    """
    if not name:
        raise UserError("--resume: the name of the run or checkpoint is empty")
    folder = Path(name).expanduser()
    for candidate in (folder, folder / FOLDER, newest_state(folder)):
        if candidate is not None and (candidate / ABOUT).is_file():
            return candidate
    raise UserError(f"--resume {name}: no run or checkpoint with a state to go on from")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of itself: that one process is alone, and of its own storage API."""
    with warnings.catch_warnings():
        for message in ("torch.distributed is disabled", "TypedStorage is deprecated"):
            warnings.filterwarnings("ignore", message)
        yield


def _random_states() -> dict[str, Tensor]:
    states = {"rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["rng_cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, Tensor]) -> None:
    if "rng" in states:
        torch.set_rng_state(states["rng"])
    if "rng_cuda" in states:
        torch.cuda.set_rng_state(states["rng_cuda"])
