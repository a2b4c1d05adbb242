"""The steps of a run: learning rates, resets, skipped steps, checkpoints, being stopped."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from finetune import after
from finetune.args import TrainArgs
from finetune.data.corpus import segment_frames
from finetune.data.interleaver import FRAME_RATE
from finetune.gate_reg import gate_weight
from finetune.loss import LossWeights, TeacherForced
from finetune.memory_log import MemoryLog
from finetune.metrics import Metrics
from finetune.optim import inner_lr_scale, schedule, set_inner_loop
from finetune.sharding import whole
from finetune.signals import Stopped, StopRequest
from finetune.step import StepResult, memory_metrics, train_step
from finetune.trainer_state import FOLDER, TrainerState, numbered
from finetune.world import World
from moshi_ttt.base import Base
from moshi_ttt.checkpoint import write_consolidated
from moshi_ttt.errors import UserError, no_space_left
from moshi_ttt.files import remove_folder, staging
from moshi_ttt.lanes import Lanes, detach_lanes, put_lanes, take_lanes

STOP = "stop"
"""A file of this name in a run's folder is a request to save and stop, like SIGTERM."""
Moment = tuple[dict[str, int], dict[str, Any], dict[str, Lanes]]
"""Counters, where lanes read and what they carry."""


def say(here: World, text: str) -> None:
    """A line for a person, from the first rank."""
    if here.first:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


class Loop:
    """Trains from where `trainer` stands to the last step.

    Args:
        args: of the run.
        base: what the adapters belong to.
        model: with lanes attached.
        trainer: optimizer, loader and counters.
        metrics: where numbers go.
        evaluation: what is scored on the way.
        run_dir: gets `checkpoints/`.
        here: this rank.
        known: steps whose checkpoints under `run_dir` are of this very run.
    """

    def __init__(
        self,
        args: TrainArgs,
        base: Base,
        model: TeacherForced,
        trainer: TrainerState,
        metrics: Metrics,
        evaluation: after.Evaluation,
        run_dir: Path,
        here: World,
        known: set[int],
    ) -> None:
        self.args, self.base, self.model, self.lm = args, base, model, model.lm
        self.trainer, self.metrics, self.evaluation = trainer, metrics, evaluation
        self.optimizer, self.loader = trainer.optimizer, trainer.loader
        self.folder, self.here = run_dir / "checkpoints", here
        self.weights = LossWeights(args.first_codebook_weight_multiplier, args.text_padding_weight)
        self.rate, self.inner = schedule(args), inner_lr_scale(args)
        self.gate_weight = gate_weight(args)
        self.memories: MemoryLog | None = None
        if args.ttt is not None and args.monitor_freq and here.first:
            self.memories = MemoryLog(
                self.lm, run_dir, metrics, every=args.monitor_freq, last=args.max_steps,
                after_step=trainer.progress["step"],
            )  # fmt: skip
        self.peaks = [group["lr"] for group in self.optimizer.adamw.param_groups]
        self.stop = StopRequest()
        self.known = known

    def run(self) -> Path | None:
        """Train; leaves the model as it was saved, without lanes.

        Returns:
            The last checkpoint's `consolidated` folder; None if nothing is saved.

        Raises:
            UserError: too many skipped steps, weights that are no numbers, no memory, a full disk.
            Stopped: a signal came; the state is saved.
        """
        args, progress = self.args, self.trainer.progress
        done, bad, good = progress["step"], 0, self._moment()
        last = self._saved(done)
        self._first(self._clear)
        scored = any(self.metrics.has(kind, done) for kind in after.SCORED)
        if done and self._evaluation_due(done) and not self.here.gather(scored)[0]:
            self._evaluate(done)  # the run was stopped between saving and scoring
        bar = tqdm(
            total=args.max_steps, initial=done, desc="training", unit="step", dynamic_ncols=True,
            disable=not self.here.first,
        )  # fmt: skip
        with bar, self.stop.taken():
            for step in range(done + 1, args.max_steps + 1):
                good = good if bad else self._moment()
                result = self._step(step, bar)
                progress["step"], progress["frames"] = step, progress["frames"] + result.frames
                bad = 0 if result.bad is None else bad + 1
                if result.bad is not None:
                    progress["skipped"] += 1
                    say(self.here, f"step {step} is skipped: {result.bad}")
                if bad >= args.max_skipped_steps:
                    self._give_up(step, result.bad, good)
                due = args.ckpt_freq > 0 and step % args.ckpt_freq == 0 and not bad
                if args.do_ckpt and (due or step == args.max_steps):
                    last = self._save(step)
                self._stop_if_asked(step)
                if self._evaluation_due(step):
                    self._evaluate(step)
        self._full_rate(args.max_steps)
        detach_lanes(self.lm)
        return last

    def _evaluation_due(self, step: int) -> bool:
        every = self.args.eval_freq
        due = step % every == 0 if every > 0 else step == self.args.max_steps
        return self.args.do_eval and due

    def _evaluate(self, step: int) -> None:
        self._full_rate(step)
        self.evaluation.during(self.model, self.metrics, step)

    def _full_rate(self, step: int) -> None:
        """What is saved writes at the full rate, whatever the warm-up: that is evaluated."""
        if self.args.ttt is not None:
            set_inner_loop(self.lm, 1.0, step > self.args.memory_start_step)

    def _step(self, step: int, bar: tqdm) -> StepResult:  # pyright: ignore[reportMissingTypeArgument]
        args = self.args
        for group, peak in zip(self.optimizer.adamw.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.rate(step - 1)
        active = step > args.memory_start_step
        if args.ttt is not None:
            set_inner_loop(self.lm, self.inner(step - 1), active)
        every = args.state_reset_interval
        reset = args.whole_recordings and every > 0 and step > 1 and (step - 1) % every == 0
        start = time.monotonic()
        log = step % args.log_freq == 0 or step == args.max_steps
        ticks = [next(self.loader) for _ in range(args.tbptt_segments)]
        watching = nullcontext() if self.memories is None else self.memories.step(step)
        try:
            with watching:
                result = train_step(
                    self.model, ticks, self.optimizer, self.weights,
                    max_norm=args.max_norm, pass_states=args.passes_states, reset=reset,
                    measure=log, gate_weight=self.gate_weight(step), world=self.here,
                )  # fmt: skip
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"step {step}: out of GPU memory ({str(error).split('. ')[0]}): lower batch_size "
                "(num_microbatches makes up for it) or duration_sec, or set gradient_checkpointing"
            ) from error
        bar.update()
        if reset:
            self.metrics.log("lanes", step, {"reset": float(result.segments)})
        if log:
            self._log(step, result, time.monotonic() - start, bar)
        return result

    def _log(self, step: int, result: StepResult, seconds: float, bar: tqdm) -> None:  # pyright: ignore[reportMissingTypeArgument]
        memory = after.peak_memory(self.here.device)
        values = {"loss": result.loss, **result.sums.means(), "grad_norm": result.grad_norm}
        values |= {
            "lr": self.optimizer.adamw.param_groups[0]["lr"],
            "tokens_per_second": result.tokens / seconds,
            "audio_hours": (self.trainer.progress["frames"] + result.frames) / FRAME_RATE / 3600,
            "peak_memory": float(memory),
            "lanes_begun": float(result.begun),
            "lanes_passed": float(result.passed if self.args.whole_recordings else 0),
            "skipped": float(self.trainer.progress["skipped"] + (result.bad is not None)),
        }
        if self.args.ttt is not None:
            values |= memory_metrics(self.lm, result, self.here, self.gate_weight(step))
        self.metrics.log("train", step, values)
        bar.set_postfix(
            loss=f"{result.loss:.3f}", cb0=f"{values['nll_codebook0']:.3f}",
            tok_s=f"{values['tokens_per_second']:.0f}", audio=f"{values['audio_hours']:.2f}h",
            mem=f"{memory / 2**30:.1f}G",
        )  # fmt: skip

    # -- checkpoints and the end -------------------------------------------------------------------

    def _clear(self) -> None:
        """See that checkpoints can be written; remove torn ones, and those of later steps.

        Later ones are there where an earlier one was named to go on from: the run gets there again.
        """
        if not self.args.do_ckpt:
            return
        try:
            staging(self.folder / "probe").rmdir()
            for torn in self.folder.glob("checkpoint_*.tmp"):
                shutil.rmtree(torn)
            for step, later in numbered(self.folder).items():
                if step > self.trainer.progress["step"]:
                    say(self.here, f"     {later} is of a later step: removed")
                    remove_folder(later)
        except OSError as error:
            raise UserError(f"{self.folder}: no folder for checkpoints: {error}") from error

    def _saved(self, step: int) -> Path | None:
        """The `consolidated` folder of a step's checkpoint, if this run wrote or loaded it."""
        there = self.folder / f"checkpoint_{step:06d}" / "consolidated"
        return there if step in self.known and there.is_dir() else None

    def _save(self, step: int) -> Path:
        """Adapters and state of this moment, whole or not at all; nothing if they are there."""
        folder = self.folder / f"checkpoint_{step:06d}"
        if (there := self._saved(step)) is not None:
            return there
        # the last update is in no loss yet
        if self.here.any(not self.optimizer.is_finite()):
            raise UserError(
                f"step {step}: weights are not finite, not saved: lower the learning rate"
            )
        beside = folder.with_name(folder.name + ".tmp")
        try:
            self._first(lambda: (staging(folder) / FOLDER).mkdir())
            self.trainer.save(beside / FOLDER, self.args.to_dict())
            with whole(self.model):
                self._first(lambda: self._write_adapters(beside / "consolidated", step))
            self._first(lambda: os.replace(beside, folder))
        except (OSError, SafetensorError) as error:
            why = f"no space left for {folder}" if no_space_left(error) else f"{folder}: {error}"
            raise UserError(
                f"step {step}: {why}; what was saved before is whole: make room, then --resume"
            ) from error
        finally:
            if self.here.first:
                shutil.rmtree(beside, ignore_errors=True)
        self.known.add(step)
        self._first(self._prune)
        return folder / "consolidated"

    def _write_adapters(self, out: Path, step: int) -> None:
        args = self.args
        write_consolidated(
            self.lm, out, self.base,
            full=args.full_finetuning or not args.save_adapters,
            with_embeddings=args.lora.ft_embed,
            extra={"step": step, "segment_frames": segment_frames(args.duration_sec)},
        )  # fmt: skip

    def _prune(self) -> None:
        """Remove all but the newest checkpoints."""
        if self.args.num_ckpt_keep is None:
            return
        for old in list(numbered(self.folder).values())[: -self.args.num_ckpt_keep]:
            remove_folder(old)

    def _first(self, act: Callable[[], object]) -> None:
        """Do something on the first rank; if it fails there, no rank goes on."""
        error: Exception | None = None
        if self.here.first:
            try:
                act()
            except Exception as caught:
                error = caught
        for found in self.here.gather(error):
            if found is not None:
                raise found

    def _moment(self) -> Moment:
        """Where the run stands, but for what an update changes; costs nothing."""
        return dict(self.trainer.progress), self.loader.state_dict(), take_lanes(self.lm)

    def _give_up(self, step: int, why: str | None, good: Moment) -> None:
        """Save the run as it was before the first of the skipped steps, and end it."""
        progress, reading, lanes = good
        self.trainer.progress.update(progress)
        self.loader.load_state_dict(reading)
        put_lanes(self.lm, lanes)
        saved = ""
        if self.args.do_ckpt and progress["step"]:
            folder = self._save(progress["step"]).parent
            saved = f"; the state after step {progress['step']} is in {folder}"
        raise UserError(
            f"step {step}: {why}; {self.args.max_skipped_steps} steps in a row were skipped "
            f"(max_skipped_steps): lower the learning rate, or look at that data{saved}"
        )

    def _stop_if_asked(self, step: int) -> None:
        file = self.folder.parent / STOP
        if self.here.first and self.stop.signum is None and file.exists():
            file.unlink()
            self.stop.signum = signal.SIGTERM
        asked = self.here.gather(self.stop.signum)
        signum = next((s for s in asked if s is not None), None)
        if signum is None:
            return
        saved = "nothing is saved (do_ckpt is false)"
        if self.args.do_ckpt:
            saved = f"saved in {self._save(step).parent}; --resume goes on"
        raise Stopped(signum, f"stopped after step {step}: {saved}")
