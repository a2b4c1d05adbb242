"""Train LoRA and a memory (or either, or all of a base) on recordings; reads top to bottom."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from pathlib import Path

import fire
import torch
from moshi.models.lm import LMModel
from tqdm import tqdm

from finetune import after
from finetune.args import TrainArgs, load_args
from finetune.corpora import prepare_corpus
from finetune.data.codes import CodesCache
from finetune.data.corpus import segment_frames
from finetune.data.loader import Batch, Loader
from finetune.data.manifest import read_sources
from finetune.loss import LossWeights
from finetune.memory_use import check_fits
from finetune.metrics import Metrics
from finetune.model import build_model, check_lora_file, check_remote, find_base_of, load_codec
from finetune.optim import MasterAdamW, inner_lr_scale, parameter_groups, schedule, set_inner_lr
from finetune.run_dir import begin_run_dir, finish_run_dir, finished_summary, run_dir_of
from finetune.step import NonFiniteError, StepResult, memory_metrics, train_step
from moshi_ttt import states
from moshi_ttt.base import Base
from moshi_ttt.checkpoint import save_checkpoint
from moshi_ttt.errors import UserError, run_cli

logger = logging.getLogger(__name__)


def train(config: str, **overrides: object) -> None:
    """Train as `config` says; `--key value` (dotted: `--ttt.layers every:4`) goes before the file.

    Args:
        config: a yaml file, e.g. configs/tiny.yaml.
        overrides: any key of it.

    Raises:
        UserError: what the user has to change, in one line, before anything is written.
    """
    began = time.monotonic()
    args = load_args(config, overrides)
    run_dir = run_dir_of(args)
    if (finished := finished_summary(run_dir, args)) is not None:
        say(f"{run_dir} holds this very run, finished:\n{finished}")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say(f"1/5  {config} on {device}")
    check_lora_file(args)
    check_remote(args, device)
    prepare_corpus(args.data.corpus)
    sources = read_sources(args.data.train_data)
    held_out = read_sources(args.data.eval_data) if after.wanted(args) else []
    base = find_base_of(args)
    need = check_fits(base.lm_config, args, device)
    size, free = need.parameters / 1e6, need.trainable / 1e6
    say(f"     base {base.name}: {size:.2f} M parameters, {free:.2f} M of them trained")
    say(f"     needs about {need.total / 2**30:.2f} GiB")

    torch.manual_seed(args.seed)
    lm, spliced = build_model(base, args, device)
    if spliced is not None:
        millions = spliced.parameters / 1e6
        say(f"     {spliced.config.memory} in layers {spliced.layers}, {millions:.2f} M parameters")
    groups = parameter_groups(lm, args)
    optimizer = MasterAdamW(groups, args.optim.betas)

    say("2/5  speech to codes (made once, then re-used)")
    mimi, tokenizer = load_codec(base, device)
    cache = CodesCache(
        args.data.codes_cache, mimi, load_mimi=base.info.get_mimi, mono_side=args.data.mono_side
    )
    workers = 1 if device.type == "cuda" else args.data.workers
    cache.prepare([r for s in sources + held_out for r in s.recordings], workers)
    loader = Loader(
        sources, cache, tokenizer, seconds=args.duration_sec, batch_size=args.batch_size,
        shuffle=args.data.shuffle, seed=args.seed,
    )  # fmt: skip
    evaluation = after.Evaluation(args, base, cache, held_out)
    del mimi

    if (aside := begin_run_dir(run_dir, args)) is not None:
        say(f"     the older run was moved to {aside}")
    trained = ", ".join(f"{g.name} {sum(p.numel() for p in g.params):,}" for g in groups)
    rows = args.batch_size * args.num_microbatches
    say(f"3/5  {args.max_steps} steps of {rows} x {args.duration_sec:g} s; parameters: {trained}")
    metrics = Metrics(run_dir, args)
    try:
        last = _loop(lm, loader, optimizer, args, base, metrics, evaluation, run_dir)
        summary = [f"trained in {(time.monotonic() - began) / 60:.1f} min"]
        if last is not None:
            summary = [f"{summary[0]}; checkpoint {last}"]
        after.plot_curves(run_dir)
        if args.eval.eval_after_training:
            say("4/5  evaluation beyond the attention window")
            summary += evaluation.final(lm, run_dir, metrics, args.max_steps)
        say("5/5  done")
    except BaseException:
        metrics.close(failed=True)
        raise
    metrics.close()
    summary += after.next_steps(run_dir, last)
    finish_run_dir(run_dir, "\n".join(summary) + "\n")
    say("\n".join(summary))


def say(text: str) -> None:
    """A line for a person."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def _loop(
    lm: LMModel,
    loader: Loader,
    optimizer: MasterAdamW,
    args: TrainArgs,
    base: Base,
    metrics: Metrics,
    evaluation: after.Evaluation,
    run_dir: Path,
) -> Path | None:
    """Train to the last step; leaves the model as it was saved, without lanes."""
    weights = LossWeights(args.first_codebook_weight_multiplier, args.text_padding_weight)
    rate, inner = schedule(args), inner_lr_scale(args)
    peaks = [group["lr"] for group in optimizer.adamw.param_groups]
    last: Path | None = None
    bar = tqdm(total=args.max_steps, desc="training", unit="step", dynamic_ncols=True)
    with bar:
        for step in range(1, args.max_steps + 1):
            end = step == args.max_steps
            for group, peak in zip(optimizer.adamw.param_groups, peaks, strict=True):
                group["lr"] = peak * rate(step - 1)
            if args.ttt is not None:
                set_inner_lr(lm, inner(step - 1))
            start = time.monotonic()
            batches = [next(loader) for _ in range(args.num_microbatches)]
            result = _step(lm, batches, optimizer, weights, args, step)
            bar.update()
            if step % args.log_freq == 0 or end:
                values = _values(lm, result, optimizer, time.monotonic() - start, args)
                metrics.log("train", step, values)
                bar.set_postfix(
                    loss=f"{values['loss']:.3f}", cb0=f"{values['nll_codebook0']:.3f}",
                    tok_s=f"{values['tokens_per_second']:.0f}",
                )  # fmt: skip
            if args.ttt is not None:
                set_inner_lr(lm, 1.0)  # what is saved writes at the full rate: evaluate that
            if args.do_eval and (step % args.eval_freq == 0 if args.eval_freq > 0 else end):
                evaluation.during(lm, metrics, step)
            due = args.ckpt_freq > 0 and step % args.ckpt_freq == 0
            if args.do_ckpt and (due or end):
                last = _save(lm, optimizer, run_dir, base, args, step)
    if args.ttt is not None:
        states.detach_ttt_states(lm)
    return last


def _step(
    lm: LMModel,
    batches: list[Batch],
    optimizer: MasterAdamW,
    weights: LossWeights,
    args: TrainArgs,
    step: int,
) -> StepResult:
    try:
        return train_step(lm, batches, optimizer, weights, max_norm=args.max_norm, step=step)
    except NonFiniteError as error:
        raise UserError(f"{error}: lower the learning rate, or look at that data") from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"step {step}: out of GPU memory ({str(error).split('. ')[0]}): lower batch_size "
            "(num_microbatches makes up for it) or duration_sec, or set gradient_checkpointing"
        ) from error


def _values(
    lm: LMModel, result: StepResult, optimizer: MasterAdamW, seconds: float, args: TrainArgs
) -> dict[str, float]:
    values = {"loss": result.loss, **result.sums.means(), "grad_norm": result.grad_norm}
    values["lr"] = optimizer.adamw.param_groups[0]["lr"]
    values["tokens_per_second"] = result.tokens / seconds
    values["peak_memory"] = float(after.peak_memory(lm.device))
    if args.ttt is not None:
        values |= memory_metrics(lm, result)
    return values


def _save(
    lm: LMModel, optimizer: MasterAdamW, run_dir: Path, base: Base, args: TrainArgs, step: int
) -> Path:
    # the last update is in no loss yet
    if not optimizer.is_finite():
        raise UserError(f"step {step}: weights are not finite, not saved: lower the learning rate")
    folder = run_dir / "checkpoints"
    saved = save_checkpoint(
        lm, folder / f"checkpoint_{step:06d}", base,
        full=args.full_finetuning or not args.save_adapters,
        with_embeddings=args.lora.ft_embed,
        extra={"step": step, "segment_frames": segment_frames(args.duration_sec)},
    )  # fmt: skip
    there = sorted(folder.glob("checkpoint_??????"))
    if args.num_ckpt_keep is not None:
        for old in there[: -args.num_ckpt_keep]:
            shutil.rmtree(old)
    return saved


def command(config: str, *surplus: object, **overrides: object) -> None:
    """Train as a config says: `configs/x.yaml [--key value ...]`, dotted: `--ttt.layers every:4`.

    Args:
        config: a yaml file, e.g. configs/tiny.yaml.
        surplus: nothing belongs here.
        overrides: any key of the file.

    Raises:
        UserError: what the user has to change.
    """
    if surplus:  # fire would train first and complain then
        raise UserError(f"one config is read; {surplus[0]!r} is too much (--key value sets a key)")
    train(str(config), **overrides)


def main() -> None:
    """Command line: `python -m finetune.train configs/x.yaml [--key value ...]`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        run_cli(lambda: fire.Fire(command))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: checkpoints written so far stay\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
