"""Train LoRA and a memory (or either, or all of a base) on recordings; reads top to bottom."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from pathlib import Path

os.environ.setdefault("NO_TORCH_COMPILE", "1")  # before moshi is imported: compiling costs minutes

import fire
import torch
import yaml
from moshi.models.lm import LMModel
from tqdm import tqdm

from finetune import after
from finetune.args import TrainArgs, load_args
from finetune.corpora import prepare_corpus
from finetune.data.codes import CodesCache
from finetune.data.loader import Loader
from finetune.data.manifest import read_sources
from finetune.loss import LossWeights
from finetune.memory_use import check_fits
from finetune.metrics import Metrics
from finetune.optim import MasterAdamW, inner_lr_scale, parameter_groups, schedule
from finetune.step import NonFiniteError, StepResult, memory_metrics, train_step
from moshi_ttt import states
from moshi_ttt.checkpoint import Base, add_lora, find_base, load_base, load_lora, save_checkpoint
from moshi_ttt.errors import UserError, run_cli
from moshi_ttt.hybrid import splice

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
    run_dir = Path(args.run_dir)
    if _finished(run_dir, args):
        say(f"{run_dir} holds this very run, finished:\n{(run_dir / 'summary.txt').read_text()}")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say(f"1/5  {config} on {device}")
    if args.moshi_paths.is_remote:
        check_fits(None, args, device)  # as Moshi 7B: its config.json is a download too
    prepare_corpus(args.data.corpus)
    base = _find_base(args)
    need = check_fits(base.lm_config, args, device)
    size, free = need.parameters / 1e6, need.trainable / 1e6
    say(f"     base {base.name}: {size:.2f} M parameters, {free:.2f} M of them trained")
    say(f"     needs about {need.total / 2**30:.2f} GiB")

    torch.manual_seed(args.seed)
    lm = _build_model(base, args, device)
    groups = parameter_groups(lm, args)
    optimizer = MasterAdamW(groups, args.optim.betas)

    say("2/5  speech to codes (made once, then re-used)")
    mimi = base.info.get_mimi(device)
    tokenizer = base.info.get_text_tokenizer()
    cache = CodesCache(
        args.data.codes_cache, mimi, load_mimi=base.info.get_mimi, mono_side=args.data.mono_side
    )
    sources = read_sources(args.data.train_data)
    held_out = read_sources(args.data.eval_data) if args.data.eval_data else []
    workers = 1 if device.type == "cuda" else args.data.workers
    cache.prepare([r for s in sources + held_out for r in s.recordings], workers)
    loader = Loader(
        sources, cache, tokenizer, seconds=args.duration_sec, batch_size=args.batch_size,
        shuffle=args.data.shuffle, seed=args.seed,
    )  # fmt: skip
    evaluation = after.Evaluation(args, base, cache, held_out, after.window_of(base))
    del mimi

    _make_run_dir(run_dir, args)
    trained = ", ".join(f"{g.name} {sum(p.numel() for p in g.params):,}" for g in groups)
    rows = args.batch_size * args.num_microbatches
    say(f"3/5  {args.max_steps} steps of {rows} x {args.duration_sec:g} s; parameters: {trained}")
    metrics = Metrics(run_dir, args)
    last = _loop(lm, loader, optimizer, args, base, metrics, evaluation, run_dir)
    if args.ttt is not None:
        states.detach_ttt_states(lm)

    summary = [
        f"trained in {(time.monotonic() - began) / 60:.1f} min; checkpoint {last or '(none)'}"
    ]
    after.plot_curves(run_dir)
    if args.eval.eval_after_training:
        say("4/5  evaluation beyond the attention window")
        summary += evaluation.final(lm, run_dir, metrics, args.max_steps)
    say("5/5  done")
    summary += after.next_steps(run_dir, last)
    metrics.close()
    (run_dir / "summary.txt").write_text("\n".join(summary) + "\n")
    say("\n".join(summary))


def say(text: str) -> None:
    """A line for a person."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def _finished(run_dir: Path, args: TrainArgs) -> bool:
    """Whether the run is there and finished; refuse a folder that holds something else."""
    if args.overwrite_run_dir or not run_dir.exists():
        return False
    if not run_dir.is_dir():
        raise UserError(f"run_dir {run_dir} is a file")
    if not any(run_dir.iterdir()):
        return False
    advice = "choose another run_dir, or --overwrite_run_dir to move it aside"
    config = run_dir / "config.yaml"
    if not config.is_file():
        raise UserError(f"run_dir {run_dir} exists and is not a run of ours; {advice}")
    there = load_args(config)
    if there.to_dict() != args.to_dict():
        mine, theirs = _flat(args.to_dict()), _flat(there.to_dict())
        key = next(k for k in sorted(mine | theirs) if mine.get(k) != theirs.get(k))
        raise UserError(
            f"run_dir {run_dir} holds a run with another config "
            f"({key}: {theirs.get(key)!r}, now {mine.get(key)!r}); {advice}"
        )
    if not (run_dir / "summary.txt").is_file():
        raise UserError(f"run_dir {run_dir} holds this run, unfinished; {advice}")
    return True


def _flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    out: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        elif key != "overwrite_run_dir":
            out[prefix + key] = value
    return out


def _make_run_dir(run_dir: Path, args: TrainArgs) -> None:
    if run_dir.exists() and any(run_dir.iterdir()):
        aside = run_dir.with_name(f"{run_dir.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        run_dir.rename(aside)
        say(f"     the older run was moved to {aside}")
    run_dir.mkdir(parents=True, exist_ok=True)
    values = args.to_dict() | {"overwrite_run_dir": False}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def _find_base(args: TrainArgs) -> Base:
    paths = args.moshi_paths
    return find_base(
        paths.hf_repo_id or "local",
        moshi_path=paths.moshi_path,
        mimi_path=paths.mimi_path,
        tokenizer_path=paths.tokenizer_path,
        config_path=paths.config_path,
    )


def _build_model(base: Base, args: TrainArgs, device: torch.device) -> LMModel:
    bf16 = device.type == "cuda" and args.param_dtype == "bfloat16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    lm = load_base(base, device=device, dtype=dtype)
    if args.lora.enable:
        if args.lora.path is None:
            add_lora(lm, args.lora.rank, args.lora.scaling)
        else:
            load_lora(lm, Path(args.lora.path), args.lora.rank, args.lora.scaling)
    if args.ttt is not None:
        try:
            done = splice(lm, args.ttt)
        except ValueError as error:
            raise UserError(f"ttt: {error}") from error
        for block in states.ttt_blocks(lm).values():
            block.memory.cast_projections(dtype)
        say(
            f"     {args.ttt.memory} in layers {done.layers}, {done.parameters / 1e6:.2f} M parameters"
        )
    lm.transformer.checkpointing = args.gradient_checkpointing
    if lm.depformer is not None:
        lm.depformer.checkpointing = args.gradient_checkpointing
    return lm.train()


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
    weights = LossWeights(args.first_codebook_weight_multiplier, args.text_padding_weight)
    rate, inner = schedule(args), inner_lr_scale(args)
    peaks = [group["lr"] for group in optimizer.adamw.param_groups]
    last: Path | None = None
    bar = tqdm(total=args.max_steps, desc="training", unit="step", dynamic_ncols=True)
    for step in range(1, args.max_steps + 1):
        for group, peak in zip(optimizer.adamw.param_groups, peaks, strict=True):
            group["lr"] = peak * rate(step - 1)
        if args.ttt is not None:
            for block in states.ttt_blocks(lm).values():
                block.memory.lr_scale = inner(step - 1)
        start = time.monotonic()
        batches = [next(loader) for _ in range(args.num_microbatches)]
        try:
            result = train_step(lm, batches, optimizer, weights, max_norm=args.max_norm, step=step)
        except NonFiniteError as error:
            bar.close()
            raise UserError(f"{error}: lower the learning rate, or look at that data") from error
        bar.update()
        if step % args.log_freq == 0 or step == args.max_steps:
            seconds = time.monotonic() - start
            values = _values(lm, result, optimizer, seconds, args)
            metrics.log("train", step, values)
            bar.set_postfix(
                loss=f"{values['loss']:.3f}", cb0=f"{values['nll_codebook0']:.3f}",
                tok_s=f"{values['tokens_per_second']:.0f}",
            )  # fmt: skip
        if args.do_eval and args.eval_freq > 0 and step % args.eval_freq == 0:
            evaluation.during(lm, metrics, step)
        due = args.ckpt_freq > 0 and step % args.ckpt_freq == 0
        if args.do_ckpt and (due or step == args.max_steps):
            last = _save(lm, run_dir, base, args, step)
    bar.close()
    return last


def _values(
    lm: LMModel, result: StepResult, optimizer: MasterAdamW, seconds: float, args: TrainArgs
) -> dict[str, float]:
    values = {"loss": result.loss, **result.sums.means(), "grad_norm": result.grad_norm}
    values["lr"] = optimizer.adamw.param_groups[0]["lr"]
    values["tokens_per_second"] = result.tokens / seconds
    values["peak_memory"] = float(after.peak_memory(lm.device))
    if args.ttt is not None:
        values |= memory_metrics(lm)
    return values


def _save(lm: LMModel, run_dir: Path, base: Base, args: TrainArgs, step: int) -> Path:
    folder = run_dir / "checkpoints"
    saved = save_checkpoint(
        lm, folder / f"checkpoint_{step:06d}", base,
        full=args.full_finetuning or not args.save_adapters,
        with_embeddings=args.lora.ft_embed,
        extra={"step": step, "segment_frames": round(args.duration_sec * 12.5)},
    )  # fmt: skip
    there = sorted(folder.glob("checkpoint_??????"))
    if args.num_ckpt_keep is not None:
        for old in there[: -args.num_ckpt_keep]:
            shutil.rmtree(old)
    return saved


def main() -> None:
    """Command line: `python -m finetune.train configs/x.yaml [--key value ...]`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_cli(lambda: fire.Fire(train))


if __name__ == "__main__":
    main()
