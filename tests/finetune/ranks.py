"""Several ranks on this machine: processes with gloo, started from one that has imported."""

from __future__ import annotations

import math
import os
import socket
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # by the first step of an optimizer, more than a second in every process

import finetune.train
from finetune.loss import LossWeights, TeacherForced
from finetune.optim import MasterAdamW, parameter_groups
from finetune.sharding import local, shard, whole
from finetune.step import train_step
from finetune.world import world
from moshi_ttt.hybrid import carry_kv
from moshi_ttt.lanes import attach_lanes, lanes_of
from moshi_ttt.lora import add_lora
from moshi_ttt.states import ttt_blocks
from tests.small import START, small_hybrid

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.finetune.ranks"])

_ranks: list[tuple[Any, Connection]] = []
"""Processes that stay for the next job: what a first one costs in a process is paid once."""


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _serve(jobs: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            env, work, args = jobs.recv()
        except EOFError:
            return
        os.environ.update(env)
        try:
            jobs.send((None, work(*args)))
        except BaseException as error:
            jobs.send((f"{type(error).__name__}: {error}\n{traceback.format_exc()}", None))


def _start() -> tuple[Any, Connection]:
    jobs, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return process, jobs


def on_ranks(size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What `work(*args)` gives on each of `size` ranks; an error of any is raised."""
    _ranks.extend(_start() for _ in range(size - len(_ranks)))
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(size)}
    found = []
    try:
        for rank, (_, jobs) in enumerate(_ranks[:size]):
            jobs.send((env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, work, args))
        for _, jobs in _ranks[:size]:
            found.append(jobs.recv() if jobs.poll(120) else ("no answer in 120 s", None))
        errors = [error for error, _ in found if error]
        if errors:
            raise AssertionError("\n".join(errors))
    except BaseException:  # a group of processes that is broken is of no use to the next job
        for process, _ in _ranks:
            process.kill()
        _ranks.clear()
        raise
    return [value for _, value in found]


def train(config: str, keys: dict[str, Any], double: bool = False) -> None:
    """A run of the trainer, in float64 if asked, without pictures."""
    build = finetune.train.build_model

    def in_double(*given: Any) -> Any:
        lm, done = build(*given)
        return lm.double(), done

    with ExitStack() as stack:
        stack.enter_context(mock.patch("finetune.train.plot_curves"))
        if double:
            stack.enter_context(mock.patch("finetune.train.build_model", in_double))
        finetune.train.train(config, **keys)


def steps(
    batches: list[Any], args: Any, dtype: torch.dtype, poison: int | None = None, **config: Any
) -> dict[str, Any]:
    """Train a small sharded model by hand: losses, dtypes, and how far its lanes have moved.

    Args:
        batches: of each step the micro-batch of each rank.
        args: what is trained.
        dtype: a forward computes in.
        poison: a text token whose embedding is no number.
        config: of `TTTConfig`.
    """
    with world() as here:
        lm = small_hybrid(lm={"norm": "rms_norm"}, **config)
        memories = {n: b.state_dict() for n, b in ttt_blocks(lm).items()}
        lm.to(dtype)
        if poison is not None:
            lm.text_emb.weight.data[poison] = math.nan
        add_lora_without_memory(lm)
        for name, block in ttt_blocks(lm).items():  # as a run has them: float32 but for projections
            block.float().load_state_dict(memories[name])
            block.memory.cast_projections(dtype)
        groups = parameter_groups(lm, args)
        model = TeacherForced(lm)
        carry_kv(lm)
        if here.size > 1:
            shard(model, here, dtype)
            groups = parameter_groups(lm, args)
        optimizer = MasterAdamW(groups, (0.9, 0.95))
        attach_lanes(lm, len(batches[0][here.rank].names))
        results = [
            train_step(model, [[b[here.rank]]], optimizer, LossWeights(), max_norm=1.0, world=here)
            for b in batches
        ]
        dtypes = {
            f"{name}.{key}": str(tensor.dtype)
            for name, lanes in lanes_of(lm).items()
            for key, tensor in lanes.tensors().items()
        }
        masters = {str(local(master).dtype) for _, master in optimizer.pairs}
        with whole(model):
            attention = lm.transformer.layers[0].self_attn.in_projs[0]
            w0 = {
                f"{n}.{key}": parameter.detach().tolist()
                for n, b in ttt_blocks(lm).items()
                for key, parameter in b.memory.named_parameters()
                if key in START
            }
            memory = next(iter(ttt_blocks(lm).values())).memory
            seen = {
                "projection": memory.o_proj and str(memory.o_proj.weight.dtype),
                "attention": str(attention.lora_A.weight.dtype),
            }
        return {
            "loss": [r.loss for r in results], "bad": [r.bad for r in results], "dtypes": dtypes,
            "masters": masters, "w0": w0, "seen": seen,
        }  # fmt: skip


def add_lora_without_memory(lm: Any) -> None:
    """LoRA on the base only: the memory is spliced in already."""
    blocks = {}
    for layer in lm.transformer.layers:
        blocks[layer] = layer.seq_modeling_block
        del layer.seq_modeling_block
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        add_lora(lm, 4, 2.0)
    for layer, block in blocks.items():
        layer.add_module("seq_modeling_block", block)
