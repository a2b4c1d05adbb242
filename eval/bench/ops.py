"""`python -m eval.bench.ops`: the memories on the CPU, against two baselines, as ratios of one run.

A whole memory layer (projections, convolution, memory, output norm) at B = 1, T = 2048 frames, 8
heads of 64, chunks of 16 and 64 frames, float32, one thread. Measured:

- bytes that the forward saves for the backward, beyond inputs and parameters (at most 30 MiB),
- forward and backward, against plain autograd through the chunk form (at most as long),
- one streamed frame, against the dense streaming form (at most half as long), twice: the whole
  layer as the paper's code decodes it (`Published`), and the dense form inside our own layer, made
  with our kernels (`DenseOp`), which shares all but the form with what it is compared to,
- what such a frame is made of: the projections alone, which any form has, and the op alone.

Times are CPU time of the one thread (others may share the machine), medians of 5 interleaved
pairs. Where the results of a form and its baseline disagree, no time is reported and the exit
status is 1. A target missed by less than 10 % is reported as near.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import moshi_ttt.memory.base
from eval.bench.baselines import plain_scan
from eval.bench.dense import DenseOp, Published, PublishedState
from eval.bench.ops_table import TARGETS, table
from eval.provenance import provenance
from moshi_ttt.config import TTTConfig
from moshi_ttt.memory import MEMORIES, Memory
from moshi_ttt.memory.ttt import TTT

PAIRS = 5
MIB = 2**20
RESULTS = Path(__file__).parent / "results"
FAMILIES = [name for name, family in MEMORIES.items() if issubclass(family, TTT)]
"""Those with a dense form to be measured against."""


@contextlib.contextmanager
def plain_autograd(memory: Memory) -> Iterator[None]:
    """The same layer through plain autograd: nothing is made again in the backward."""
    with (
        mock.patch.object(memory.op, "scan", plain_scan),
        mock.patch.object(moshi_ttt.memory.base, "recomputed", lambda f, *x: f(*x)),
        mock.patch.object(
            moshi_ttt.memory.base,
            "recomputed_linear",
            lambda f, weight, *x: torch.nn.functional.linear(f(*x), weight),
        ),
    ):
        yield


def make(family: str, chunk_size: int, width: int, heads: int) -> TTT:
    """A fresh memory of the family."""
    memory = MEMORIES[family](width, heads, TTTConfig(memory=family, chunk_size=chunk_size))
    assert isinstance(memory, TTT)
    return memory


def train(memory: Memory, x: Tensor, weight: Tensor) -> tuple[Tensor, list[Tensor]]:
    """One forward and backward of `sum(y * weight)`: outputs and all gradients."""
    inputs = [x, *memory.parameters()]
    y, _ = memory(x, memory.init_state(x.shape[0]))
    return y.detach(), list(torch.autograd.grad((y * weight).sum(), inputs))


def saved_bytes(memory: Memory, x: Tensor) -> int:
    """Bytes of the distinct storages saved for the backward, less inputs and parameters."""
    own = {p.untyped_storage().data_ptr() for p in (x, *memory.parameters())}
    found: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            found[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, _ = memory(x, memory.init_state(x.shape[0]))
    assert y.requires_grad
    return sum(t.untyped_storage().nbytes() for t in found.values())


@torch.no_grad()
def stream(memory: Any, state: Any, x: Tensor) -> Tensor:
    """Frame after frame; `memory` is anything with a `step`."""
    return torch.cat([memory.step(x[:, t : t + 1], state) for t in range(x.shape[1])], 1)


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))


def interleaved(ours: Callable[[], Any], base: Callable[[], Any]) -> tuple[float, float, float]:
    """Median CPU seconds of each over `PAIRS` interleaved pairs, and the median of their ratios."""
    for f in (ours, base):
        f()
    pairs = []
    for _ in range(PAIRS):
        times = []
        for f in (ours, base):
            begin = time.process_time()
            f()
            times.append(time.process_time() - begin)
        pairs.append(times)
    a, b = zip(*pairs, strict=True)
    ratios = [x / y for x, y in pairs]
    return statistics.median(a), statistics.median(b), statistics.median(ratios)


def measure(family: str, chunk_size: int, width: int, heads: int, frames: int) -> dict[str, Any]:
    """One row of the table.

    Raises:
        ArithmeticError: a form and its baseline disagree.
    """
    torch.manual_seed(0)
    memory = make(family, chunk_size, width, heads)
    x = torch.randn(1, frames, width, requires_grad=True)
    weight = torch.randn(1, frames, width)

    y, grads = train(memory, x, weight)
    with plain_autograd(memory):
        y_plain, grads_plain = train(memory, x, weight)
        plain_bytes = saved_bytes(memory, x)
    agree = {"outputs": difference(y, y_plain)}
    agree["gradients"] = max(difference(a, b) for a, b in zip(grads, grads_plain, strict=True))

    n = min(frames, 4 * max(chunk_size, 64))
    piece = x[:, :n].detach()
    dense = DenseOp(memory.op)

    def with_dense(f: Callable[[], Any]) -> Any:
        with mock.patch.object(type(memory), "op", dense):
            return f()

    with torch.no_grad():
        state, dense_state = memory.init_state(1), with_dense(lambda: memory.init_state(1))
    streamed = stream(memory, state, piece)
    streamed_dense = with_dense(lambda: stream(memory, dense_state, piece))
    agree["streamed"] = difference(streamed, y[:, :n])
    agree["streamed dense"] = difference(streamed_dense, y[:, :n])
    published, published_state = Published(memory), PublishedState(memory, 1)
    agree["streamed published"] = difference(stream(published, published_state, piece), y[:, :n])
    for what, limit in (
        ("outputs", 1e-5),
        ("gradients", 1e-4),
        ("streamed", 1e-5),
        ("streamed dense", 1e-5),
        ("streamed published", 1e-5),
    ):
        if not agree[what] <= limit:
            raise ArithmeticError(
                f"{family}, chunks of {chunk_size}: {what} differ by {agree[what]:.1e} relative, "
                f"more than {limit:.0e}; no speed is reported"
            )

    def plain() -> None:
        with plain_autograd(memory):
            train(memory, x, weight)

    ours, base, ratio = interleaved(lambda: train(memory, x, weight), plain)
    frame, frame_base, frame_ratio = interleaved(
        lambda: stream(memory, state, piece), lambda: stream(published, published_state, piece)
    )
    _, kernels_base, kernels_ratio = interleaved(
        lambda: stream(memory, state, piece),
        lambda: with_dense(lambda: stream(memory, dense_state, piece)),
    )
    projections, _, _ = interleaved(lambda: project(memory, piece), lambda: project(memory, piece))
    return {
        "memory": family,
        "chunk_size": chunk_size,
        "saved_mib": saved_bytes(memory, x) / MIB,
        "saved_mib_plain": plain_bytes / MIB,
        "train_s": ours,
        "train_s_plain": base,
        "train_ratio": ratio,
        "frame_ms": 1e3 * frame / n,
        "frame_ms_published": 1e3 * frame_base / n,
        "frame_ratio": frame_ratio,
        "frame_ms_kernels": 1e3 * kernels_base / n,
        "kernels_ratio": kernels_ratio,
        "projections_ms": 1e3 * projections / n,
        "differences": agree,
        "op": op_frame(family, chunk_size, width, heads),
        "wide": op_frame(family, chunk_size, 4096, 32),
    }


@torch.no_grad()
def project(memory: TTT, x: Tensor) -> None:
    """What a frame cannot do without: the matrices of q, k, v and the output, frame after frame."""
    assert memory.qkv_proj is not None
    assert memory.o_proj is not None
    for t in range(x.shape[1]):
        frame = x[:, t]
        torch.nn.functional.linear(frame, memory.qkv_proj.weight)
        torch.nn.functional.linear(frame, memory.o_proj.weight)


def op_frame(family: str, chunk_size: int, width: int, heads: int) -> dict[str, Any]:
    """One frame of the op alone, low-rank and dense with the same kernels."""
    torch.manual_seed(0)
    memory = make(family, chunk_size, width, heads)
    params, op, dense = memory.params(), memory.op, DenseOp(memory.op)
    q, k, v = torch.randn(3, 1, heads, 64, memory.head_dim).unbind()
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    eta = torch.rand(1, heads, 64) * memory.config.options["base_lr"] / memory.head_dim

    def run(form: Any, state: Any) -> Callable[[], Tensor]:
        def go() -> Tensor:
            frames = [(slice(None), slice(None), slice(t, t + 1)) for t in range(64)]
            return torch.cat(
                [form.step(params, state, q[t], k[t], v[t], eta[t]) for t in frames], 2
            )

        return go

    with torch.no_grad():
        forms = [run(form, form.init_state(params, 1)) for form in (op, dense)]
    ours, base, ratio = interleaved(*forms)
    return {"op_ms": 1e3 * ours / 64, "op_ms_dense": 1e3 * base / 64, "op_ratio": ratio}


def main() -> int:
    """Measure every memory, print the table and write it down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--memories", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--chunk-sizes", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--frames", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for ops.json, ops.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for family in args.memories:
        for chunk_size in args.chunk_sizes:
            try:
                rows.append(measure(family, chunk_size, args.width, args.heads, args.frames))
            except ArithmeticError as error:
                sys.stderr.write(f"{error}\n")
                return 1
            sys.stderr.write(f"{family}, chunks of {chunk_size}: done\n")
    about = provenance("eval.bench.ops")
    sys.stdout.write(table(rows))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "ops.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    facts = "".join(f"- {k}: `{v}`\n" for k, v in about.items())
    shape = f"B = 1, T = {args.frames}, {args.heads} heads of {args.width // args.heads}, float32"
    (args.out / "ops.md").write_text(
        f"# Memories on the CPU\n\nA whole layer, {shape}; CPU time, medians of {PAIRS} "
        f"interleaved pairs. Targets: {TARGETS}.\n\n{table(rows)}\n{facts}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
