"""Streaming for `eval.bench.gpu_check`: milliseconds a frame, and graphs against no graphs."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from moshi.models.lm import LMGen, LMModel
from moshi.utils.compile import no_cuda_graph
from torch import Tensor

from eval.bench.gpu_model import clean, peaks, synchronise
from moshi_ttt.engine import WARM_UP_FRAMES
from moshi_ttt.lanes import named_tensors
from moshi_ttt.states import ttt_blocks

TOLERANCE = {torch.bfloat16: 2.0**-5, torch.float32: 1e-4}
"""Largest difference allowed between graphed and eager logits, in parts of the largest logit."""


def stream(lm: LMModel, frames: int) -> dict[str, Any]:
    """One conversation through LMGen, sampling, in graphs on CUDA: ms a frame, and memory."""
    device = lm.device
    clean(device)
    gen = LMGen(lm, support_out_of_sync=True)
    heard = torch.randint(
        lm.card, (WARM_UP_FRAMES + frames, 1, lm.n_q - lm.dep_q, 1), device=device
    )
    times = []
    with gen.streaming(1):
        for codes in heard:
            synchronise(device)
            begin = time.perf_counter()
            gen.step(codes)
            synchronise(device)
            times.append(1e3 * (time.perf_counter() - begin))
        state = gen._streaming_state
        graphed = state is not None and state.graphed_main._graph is not None
    times = torch.tensor(times[WARM_UP_FRAMES:], dtype=torch.float64)
    p50, p95 = torch.quantile(times, torch.tensor([0.5, 0.95], dtype=times.dtype)).tolist()
    row = {"frames": frames, "graphed": graphed, "ms_p50": p50, "ms_p95": p95}
    return row | peaks(device)


@dataclass
class Forced:
    """A stream whose every input token was given.

    Attributes:
        logits: of the text, `[T, B, card]` float32 on the CPU.
        tokens: of the depformer, greedy, `[T, B, dep_q]`.
        states: the memories' tensors at the end.
    """

    logits: Tensor
    tokens: Tensor
    states: list[Tensor]


def forced(lm: LMModel, rows: int, frames: int, *, graphs: bool, seed: int = 0) -> Forced:
    """Pass the same random tokens every time; with several rows, out of step and with resets.

    The last row has no frame at every seventh call; the first none at every fifth, and it starts
    anew a little after half of them.
    """
    device, rng = lm.device, torch.Generator().manual_seed(seed)
    sizes = {"text": 1, "said": lm.dep_q, "heard": lm.n_q - lm.dep_q}
    draw = {
        name: torch.randint(
            lm.text_card if name == "text" else lm.card, (frames, rows, n), generator=rng
        ).to(device)
        for name, n in sizes.items()
    }
    logits: list[Tensor] = []
    tokens: list[Tensor] = []

    def say_text(token: Tensor) -> None:  # what was drawn goes on, not what was sampled
        token.copy_(draw["text"][len(logits) - 1, :, 0])

    def say_audio(codes: Tensor) -> None:
        tokens.append(codes.to("cpu", copy=True))
        codes.copy_(draw["said"][len(logits) - 1])

    gen = LMGen(
        lm,
        use_sampling=False,
        support_out_of_sync=True,
        on_text_logits_hook=lambda x: logits.append(x[:, 0, 0].float().cpu()),
        on_text_hook=say_text,
        on_audio_hook=say_audio,
    )
    every = plan(rows, frames).to(device)
    first = torch.arange(rows, device=device) == 0
    with nullcontext() if graphs else no_cuda_graph(), gen.streaming(rows):
        for t in range(frames):
            if rows > 1:
                if t == frames // 2 + 1:
                    gen.reset_streaming(first)
                gen.set_exec_mask(every[t])
            gen.step(draw["heard"][t, :, :, None])
        live = [block._streaming_state for block in ttt_blocks(lm).values()]
        found = [x for s in live if s is not None for _, x in named_tensors(s.memory)]
        states = [x.cpu() for x in found if x.numel()]
    return Forced(torch.stack(logits), torch.stack(tokens), states)


def plan(rows: int, frames: int) -> Tensor:
    """`[T, B]` bool: which row has a frame at which call."""
    every = torch.ones(frames, rows, dtype=torch.bool)
    if rows > 1:
        every[3::5, 0] = every[6::7, -1] = False
    return every


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference in parts of the largest value of `b`; infinite where one is no number."""
    off = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-12)
    return float(off) if bool(torch.isfinite(off)) else float("inf")


def compare(lm: LMModel, rows: int, frames: int, tolerance: float) -> dict[str, Any]:
    """Graphed against eager, and against a memory that never writes: shows that it would be seen.

    On a CPU both are eager.
    """
    graphed, eager = (forced(lm, rows, frames, graphs=g) for g in (True, False))
    memories = [block.memory for block in ttt_blocks(lm).values()]
    scales = [memory.lr_scale for memory in memories]
    for memory in memories:
        memory.lr_scale = 0.0
    still = forced(lm, rows, frames, graphs=False)
    for memory, scale in zip(memories, scales, strict=True):
        memory.lr_scale = scale
    there = plan(rows, frames)
    off = difference(graphed.logits[there], eager.logits[there])
    pairs = list(zip(graphed.states, eager.states, strict=True))
    written = difference(still.logits[there], eager.logits[there])
    moved = max(difference(a, b) for a, b in pairs)
    return {
        "rows": rows,
        "frames": frames,
        "exact": bool(torch.equal(graphed.logits[there], eager.logits[there]))
        and all(torch.equal(a, b) for a, b in pairs),
        "logits": off,
        "states": moved,
        "tokens_equal": float((graphed.tokens == eager.tokens)[there].double().mean()),
        "without_writing": written,
        "tolerance": tolerance,
        "passed": max(off, moved) <= tolerance < written,
    }
