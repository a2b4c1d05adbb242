"""Train LoRA and a memory (or either, or all of a base) on recordings; reads top to bottom."""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import fire
import torch
from moshi.models.lm import LMModel

from finetune import after
from finetune.args import TrainArgs
from finetune.corpora import prepare_corpus
from finetune.curves import plot_curves
from finetune.data.codes import CodesCache
from finetune.data.loader import Layout, Loader
from finetune.data.manifest import Source, read_sources
from finetune.data.recording import Recording
from finetune.data.stored_checks import check_codes
from finetune.load_args import load_args
from finetune.loop import Loop, say
from finetune.loss import TeacherForced
from finetune.memory_use import check_fits
from finetune.metrics import Metrics
from finetune.model import (
    build_model,
    check_lora_file,
    check_remote,
    codec_needed,
    find_base_of,
    load_mimi,
    load_tokenizer,
)
from finetune.optim import MasterAdamW, parameter_groups
from finetune.run_dir import (
    begin_run_dir,
    check_same_run,
    finish_run_dir,
    finished_summary,
    held,
    run_dir_of,
)
from finetune.sharding import shard
from finetune.signals import Stopped
from finetune.trainer_state import (
    TrainerState,
    find_state,
    newest_state,
    numbered,
    read_about,
)
from finetune.world import ALONE, Rows, World, rows_of, world
from moshi_ttt.base import fingerprint
from moshi_ttt.errors import UserError, run_cli
from moshi_ttt.hybrid import carry_kv
from moshi_ttt.lanes import attach_lanes

logger = logging.getLogger(__name__)


def train(config: str, *, resume: bool | str = False, **overrides: object) -> None:
    """Train as `config` says; `--key value` (dotted: `--ttt.layers every:4`) goes before the file.

    Args:
        config: a yaml file, e.g. configs/tiny.yaml.
        resume: go on from the run's newest checkpoint, or from the one named; a run that is not
            there yet is begun.
        overrides: any key of the config.

    Raises:
        UserError: what the user has to change, in one line, before anything is written.
        Stopped: by Ctrl-C or SIGTERM, the state saved.
    """
    args = load_args(config, overrides)
    with world() as here, ExitStack() as until_the_end:
        _train(config, args, resume, here, until_the_end)


def _train(
    config: str, args: TrainArgs, resume: bool | str, here: World, until_the_end: ExitStack
) -> None:
    began = time.monotonic()
    run_dir, device, goes_on = run_dir_of(args), here.device, resume is not False
    finished = finished_summary(run_dir, args, resume=goes_on)
    if finished is not None:
        say(here, f"{run_dir} holds this very run, finished:\n{finished}")
        return
    holds = here.first and goes_on and run_dir.exists()
    if holds:  # before its checkpoints are looked at: another process makes and removes them
        until_the_end.enter_context(held(run_dir))
    here.wait()
    state = _state_to_resume(run_dir, args, resume)
    ranks = "" if here.size == 1 else f", rank 0 of {here.size}"
    say(here, f"1/5  {config} on {device}{ranks}")
    check_lora_file(args)
    check_remote(args, device)
    if here.first:
        prepare_corpus(args.data.corpus)
    here.wait()
    sources = read_sources(args.data.train_data)
    held_out = read_sources(args.data.eval_data) if after.wanted(args) else []
    base = find_base_of(args, sources)
    panel = after.panel_of(args, base)
    heard = [*sources, *held_out, Source(Path("eval.librilight_data"), 1.0, tuple(panel))]
    saved = None if state is None else len(read_about(state)["reading"]["lanes"])
    rows = rows_of(args, here, saved)
    need = check_fits(base.lm_config, args, device, rows)
    sides, card = base.lm_config["n_q"] - base.lm_config["dep_q"], base.lm_config["card"]
    check_codes(heard, max(base.lm_config["dep_q"], sides), card)
    needed = codec_needed(base, heard)
    size, free = need.parameters / 1e6, need.trainable / 1e6
    say(here, f"     base {base.name}: {size:.2f} M parameters, {free:.2f} M of them trained")
    say(here, f"     needs about {need.total / 2**30:.2f} GiB")

    torch.manual_seed(args.seed)
    lm, spliced = build_model(base, args, device)
    if spliced is not None:
        where, millions = f"{spliced.config.memory} in layers {spliced.layers}", spliced.parameters
        say(here, f"     {where}, {millions / 1e6:.2f} M parameters")
    groups = parameter_groups(lm, args)
    trained = ", ".join(f"{g.name} {sum(p.numel() for p in g.params):,}" for g in groups)
    model, mesh = TeacherForced(lm), None
    if args.carry_kv:
        size = _carry_kv(lm) * rows.here / 2**20
        lanes = f"keys and values of {rows.here} lanes"
        say(here, f"     {lanes}: {size:,.1f} MiB, twice that during a step")
    if here.size > 1:
        mesh = shard(model, here, lm.dtype)
        groups = parameter_groups(lm, args)
    optimizer = MasterAdamW(groups, args.optim.betas)
    attach_lanes(lm, rows.batch_size, rows.slots)

    say(here, "2/5  speech to codes (made once, then re-used)")
    mimi, tokenizer = load_mimi(base, device) if needed else None, load_tokenizer(base)
    cache = CodesCache(
        args.data.codes_cache, mimi, load_mimi=base.info.get_mimi, mono_side=args.data.mono_side
    )
    _encode(cache, [r for s in heard for r in s.recordings], args, here)
    loader = Loader(
        sources, cache, tokenizer, Layout.of(lm),
        seconds=args.duration_sec, batch_size=rows.batch_size, slots=rows.slots,
        whole=args.whole_recordings, shuffle=args.data.shuffle, seed=args.seed,
        rank=here.rank, world=here.size,
    )  # fmt: skip
    evaluation = after.Evaluation(args, base, cache, held_out, panel, here)
    del mimi

    trainer = TrainerState(lm, optimizer, loader, here, mesh, fingerprint(base.info.moshi_weights))
    if state is not None:
        trainer.load(state)
    done = trainer.progress["step"]
    if here.first:
        _begin(run_dir, args, goes_on, until_the_end, holds)
    here.wait()
    if state is not None:
        say(here, f"     goes on after step {done} ({state})")
    elif goes_on:
        say(here, f"     nothing to go on from in {run_dir}: begins at step 1")
    say(here, f"3/5  {_plan(args, rows, done)}; parameters: {trained}")
    metrics = Metrics(run_dir, args, after_step=done, silent=not here.first)
    try:
        own = state is not None and run_dir.resolve() in state.resolve().parents
        known = {done} if own else set()
        loop = Loop(args, base, model, trainer, metrics, evaluation, run_dir, here, known)
        last = loop.run()
        summary = [f"trained in {(time.monotonic() - began) / 60:.1f} min"]
        if last is not None:
            summary = [f"{summary[0]}; checkpoint {last}"]
        if here.first:
            plot_curves(run_dir)
        if args.eval.eval_after_training:
            say(here, "4/5  evaluation beyond the attention window")
            summary += evaluation.final(model, run_dir, metrics, args.max_steps)
        say(here, "5/5  done")
    except BaseException:
        metrics.close(failed=True)
        raise
    metrics.close()
    summary += after.next_steps(run_dir, last)
    if here.first:
        finish_run_dir(run_dir, "\n".join(summary) + "\n")
    say(here, "\n".join(summary))


def _state_to_resume(run_dir: Path, args: TrainArgs, resume: bool | str) -> Path | None:
    if resume is False:
        return None
    state = newest_state(run_dir) if resume is True else find_state(str(resume))
    if state is not None:
        check_same_run(read_about(state)["config"], args, state)
    elif checkpoints := numbered(run_dir / "checkpoints"):
        newest = list(checkpoints.values())[-1]
        raise UserError(f"--resume: {newest} holds no state to go on from, only its weights")
    return state


def _begin(
    run_dir: Path, args: TrainArgs, goes_on: bool, until_the_end: ExitStack, holds: bool
) -> None:
    """Take the folder of the run, for as long as it lasts."""
    if not holds and (goes_on or not run_dir.exists()):
        until_the_end.enter_context(held(run_dir))
        holds = True
    if holds:
        begin_run_dir(run_dir, args, resume=goes_on)
        return
    with held(run_dir):
        aside = begin_run_dir(run_dir, args)
    if aside is not None:
        say(ALONE, f"     the older run was moved to {aside}")
    until_the_end.enter_context(held(run_dir))


def _carry_kv(lm: LMModel) -> int:
    try:
        return carry_kv(lm)
    except ValueError as error:
        raise UserError(f"carry_kv: {error}") from error


def _encode(cache: CodesCache, recordings: list[Recording], args: TrainArgs, here: World) -> None:
    """Every rank encodes its share; then the first makes sure that all is there."""
    workers = 1 if here.device.type == "cuda" or here.size > 1 else args.data.workers
    cache.prepare(recordings[here.rank :: here.size], workers)
    here.wait()
    if here.size > 1:
        if here.first:
            cache.prepare(recordings)
        here.wait()


def _plan(args: TrainArgs, rows: Rows, done: int) -> str:
    """What is going to be done, in words."""
    left = f"steps {done + 1} to {args.max_steps}" if done else f"{args.max_steps} steps"
    segments = f"{args.tbptt_segments} x " if args.tbptt_segments > 1 else ""
    plan = f"{left} of {rows.all} x {segments}{args.duration_sec:g} s"
    if args.ttt is not None:
        plan += ", states are passed on" if args.passes_states else ", every segment starts from W0"
    if args.carry_kv:
        plan += ", keys and values too"
    if args.whole_recordings and args.state_reset_interval:
        plan += f", reset every {args.state_reset_interval} steps"
    return plan


def command(config: str, *surplus: object, resume: bool | str = False, **overrides: object) -> None:
    """Train as a config says: `configs/x.yaml [--key value ...]`, dotted: `--ttt.layers every:4`.

    Args:
        config: a yaml file, e.g. configs/tiny.yaml.
        surplus: nothing belongs here.
        resume: go on with a run that was interrupted; a checkpoint may be named.
        overrides: any key of the file.

    Raises:
        UserError: what the user has to change.
    """
    if surplus:  # fire would train first and complain then
        raise UserError(f"one config is read; {surplus[0]!r} is too much (--key value sets a key)")
    train(str(config), resume=resume, **overrides)


def main() -> None:
    """Command line: `python -m finetune.train configs/x.yaml [--key value ...]`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        run_cli(lambda: fire.Fire(command))
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"{stopped}\n")
        sys.exit(128 + stopped.signum)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: checkpoints written so far stay\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
