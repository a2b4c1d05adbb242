"""The steps of a run: learning rates, resets, skipped steps, checkpoints, being stopped."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from finetune import after
from finetune.args import TrainArgs
from finetune.data.corpus import segment_frames
from finetune.data.interleaver import FRAME_RATE
from finetune.loss import LossWeights, TeacherForced
from finetune.metrics import Metrics
from finetune.optim import inner_lr_scale, schedule, set_inner_loop
from finetune.sharding import whole
from finetune.signals import Stopped, StopRequest
from finetune.step import StepResult, memory_metrics, train_step
from finetune.trainer_state import FOLDER, TrainerState
from finetune.world import World
from moshi_ttt.base import Base
from moshi_ttt.checkpoint import write_consolidated
from moshi_ttt.errors import UserError, no_space_left
from moshi_ttt.files import staging
from moshi_ttt.lanes import Lanes, detach_lanes, put_lanes, take_lanes

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
    ) -> None:
        self.args, self.base, self.model, self.lm = args, base, model, model.lm
        self.trainer, self.metrics, self.evaluation = trainer, metrics, evaluation
        self.optimizer, self.loader = trainer.optimizer, trainer.loader
        self.folder, self.here = run_dir / "checkpoints", here
        self.weights = LossWeights(args.first_codebook_weight_multiplier, args.text_padding_weight)
        self.rate, self.inner = schedule(args), inner_lr_scale(args)
        self.peaks = [group["lr"] for group in self.optimizer.adamw.param_groups]
        self.stop = StopRequest()

    def run(self) -> Path | None:
        """Train; leaves the model as it was saved, without lanes.

        Returns:
            The last checkpoint's `consolidated` folder; None if nothing is saved.

        Raises:
            UserError: too many skipped steps, weights that are no numbers, no memory, a full disk.
            Stopped: a signal came; the state is saved.
        """
        args, progress = self.args, self.trainer.progress
        last, done, bad = self._saved(progress["step"]), progress["step"], 0
        bar = tqdm(
            total=args.max_steps, initial=done, desc="training", unit="step", dynamic_ncols=True,
            disable=not self.here.first,
        )  # fmt: skip
        good = self._moment()
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
                end = step == args.max_steps
                if args.do_eval and (step % args.eval_freq == 0 if args.eval_freq > 0 else end):
                    self.evaluation.during(self.model, self.metrics, step)
                due = args.ckpt_freq > 0 and step % args.ckpt_freq == 0
                if args.do_ckpt and (due or end):
                    last = self._save(step)
                if not end:
                    self._stop_if_asked(step)
        detach_lanes(self.lm)
        return last

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
        try:
            result = train_step(
                self.model, ticks, self.optimizer, self.weights,
                max_norm=args.max_norm, pass_states=args.passes_states, reset=reset,
                measure=log, world=self.here,
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
        if args.ttt is not None:
            # what is saved writes at the full rate: evaluate that
            set_inner_loop(self.lm, 1.0, active)
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
            values |= memory_metrics(self.lm, result, self.here)
        self.metrics.log("train", step, values)
        bar.set_postfix(
            loss=f"{result.loss:.3f}", cb0=f"{values['nll_codebook0']:.3f}",
            tok_s=f"{values['tokens_per_second']:.0f}", audio=f"{values['audio_hours']:.2f}h",
            mem=f"{memory / 2**30:.1f}G",
        )  # fmt: skip

    # -- checkpoints and the end -------------------------------------------------------------------

    def _saved(self, step: int) -> Path | None:
        """The `consolidated` folder of a step's checkpoint, if it is there."""
        there = self.folder / f"checkpoint_{step:06d}" / "consolidated"
        return there if there.is_dir() else None

    def _save(self, step: int) -> Path:
        """Adapters and state of this moment, whole or not at all; nothing if they are there."""
        args, folder = self.args, self.folder / f"checkpoint_{step:06d}"
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
            self.trainer.save(beside / FOLDER, args.to_dict())
            with whole(self.model):
                self._first(lambda: self._write_adapters(beside / "consolidated", step))
            self._first(lambda: os.replace(beside, folder))
        except (OSError, SafetensorError) as error:
            if not no_space_left(error):
                raise
            raise UserError(
                f"step {step}: no space left for {folder}; what was saved before is whole: make "
                "room, then --resume"
            ) from error
        finally:
            if self.here.first:
                shutil.rmtree(beside, ignore_errors=True)
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
        """Remove all but the newest checkpoints; a torn one never has a checkpoint's name."""
        if self.args.num_ckpt_keep is None:
            return
        for old in sorted(self.folder.glob("checkpoint_??????"))[: -self.args.num_ckpt_keep]:
            aside = old.with_name(old.name + ".tmp")
            os.replace(old, aside)
            shutil.rmtree(aside)

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
        asked = self.here.gather(self.stop.signum)
        signum = next((s for s in asked if s is not None), None)
        if signum is None:
            return
        saved = "nothing is saved (do_ckpt is false)"
        if self.args.do_ckpt:
            saved = f"saved in {self._save(step).parent}; --resume goes on"
        raise Stopped(signum, f"stopped after step {step}: {saved}")
