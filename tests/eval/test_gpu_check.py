"""The check of a GPU, end to end on a small shape without one."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from moshi.models.lm import LMGen

from eval.bench import gpu_check, gpu_train
from eval.bench.gpu_model import MOSHI_7B, SMALL, add_memory, build, open_memories
from eval.bench.gpu_stream import compare, forced, plan
from eval.bench.gpu_train import largest_batch, out_of_memory, train
from moshi_ttt.errors import run_cli
from moshi_ttt.hybrid import hybrid_layers
from moshi_ttt.lora import add_lora
from moshi_ttt.states import ttt_blocks

CPU = torch.device("cpu")
TINY = replace(SMALL, stream_frames=2, seconds=1.0, max_batch=1, steps=1)
"""What is compared is as long as in `SMALL`; what is timed is not."""


def check_results(folder, shape):
    values = json.loads((folder / "gpu_check.json").read_text())
    without, with_memory = values["streaming"]
    assert [without["memory"], with_memory["memory"]] == [False, True]
    for row in values["streaming"]:
        assert row["frames"] == shape.stream_frames
        assert 0 < row["ms_p50"] <= row["ms_p95"]
    for row, rows in zip(values["graphs"], (1, 2), strict=True):
        assert row["rows"] == rows
        assert row["passed"]
        assert row["frames"] > 4 * shape.ttt.chunk_size
        assert row["without_writing"] > 10 * row["tolerance"]
    lora, both = values["training"]
    assert [lora["memory"], both["memory"]] == [False, True]
    assert both["trained"] > lora["trained"] > 0
    for row in values["training"]:
        assert 1 <= row["batch"] <= shape.max_batch
        target = 9 * row["batch"] * shape.seconds * 12.5
        assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(target, rel=0.05)
    table = (folder / "gpu_check.md").read_text()
    for text in (
        "| without memory |", "| with memory |", "| 1 row |", "exec masks and a reset",
        "| LoRA only |", "| LoRA + memory |", f"| {shape.seconds:g} s |", "- date: `20",
        f"torch {torch.__version__}", "moshi 0.", "- command: `python -m eval.bench.gpu_check",
    ):  # fmt: skip
        assert text in table
    assert re.search(r"- commit: `([0-9a-f]{40}|unknown)", table)
    return values


def test_end_to_end_on_a_small_shape(tmp_path, capsys):
    gpu_check.main(["--device", "cpu", "--small", "--out", str(tmp_path)])
    values = check_results(tmp_path, SMALL)
    assert values["cuda graphs"].startswith("none")
    assert values["training"][0]["batch"] == SMALL.max_batch
    assert all(row["exact"] for row in values["graphs"])  # both eager here
    out = capsys.readouterr()
    assert "| LoRA + memory |" in out.out
    assert "graphed against eager, 2 rows: exact" in out.err


@pytest.mark.gpu
def test_end_to_end_on_a_gpu(tmp_path):
    gpu_check.main(["--small", "--out", str(tmp_path)])
    assert check_results(tmp_path, SMALL)["cuda graphs"] == "yes"


@pytest.mark.parametrize(
    "memory", ["lact", *(pytest.param(m, marks=pytest.mark.slow) for m in ("ttt_linear", "atlas"))]
)
def test_every_memory_can_be_checked(tmp_path, monkeypatch, memory):
    monkeypatch.setattr(gpu_check, "SMALL", TINY)
    gpu_check.main(["--device", "cpu", "--small", "--memory", memory, "--out", str(tmp_path)])
    assert {p.name for p in tmp_path.iterdir()} == {
        f"gpu_check_{memory}.{kind}" for kind in ("json", "md")
    }
    found = json.loads((tmp_path / f"gpu_check_{memory}.json").read_text())
    assert f" {memory} in layers" in found["model"]
    assert all(row["exact"] for row in found["graphs"])


def test_a_small_run_leaves_the_results_alone(monkeypatch):
    row = {"ms_p50": 1.0, "ms_p95": 1.0, "frames": 1, "allocated": None, "reserved": None}
    parts = {"streaming": [row | {"memory": False, "graphed": False}], "graphs": [], "training": []}
    written = []
    monkeypatch.setattr(gpu_check, "measure", lambda shape, device: parts)
    monkeypatch.setattr(gpu_check, "write", lambda *args: written.append(args))
    gpu_check.main(["--device", "cpu", "--small"])
    assert not written


def test_streams_that_disagree_end_in_status_1(tmp_path, monkeypatch, capsys):
    def broken(lm, rows, frames, tolerance):
        found = {"rows": rows, "frames": frames, "tolerance": tolerance, "passed": False}
        off = {"exact": False, "logits": 0.5, "states": 0.0, "tokens_equal": 1.0}
        return found | off | {"without_writing": 1.0}

    monkeypatch.setattr(gpu_check, "compare", broken)
    monkeypatch.setattr(gpu_check, "SMALL", TINY)
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(["--device", "cpu", "--small", "--out", str(tmp_path)])
    assert stopped.value.code == 1
    assert "DIFFERS" in (tmp_path / "gpu_check.md").read_text()
    assert "disagree" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "a CUDA device is needed, and torch finds none"),
        (["--small"], "a CUDA device is needed, and torch finds none"),
        (["--device", "cpu"], "a CUDA device is needed, and --device cpu was asked for"),
        (["--device", "cpu", "--small", "--max-batch", "0"], "--max-batch must be at least 1"),
        (["--device", "nonsense"], "a CUDA device is needed"),
    ],
)
def test_without_a_gpu_it_says_so_in_one_line(arguments, text, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: gpu_check.main(arguments))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert text in error


def test_the_results_in_the_repository_name_the_command():
    text = (Path(gpu_check.__file__).parent / "results" / "gpu_check.md").read_text()
    assert "python -m eval.bench.gpu_check" in text
    assert "not yet run on a GPU" in text or "- machine: `" in text


def small_open():
    torch.manual_seed(0)
    lm = build(SMALL, CPU)
    add_memory(lm, SMALL)
    open_memories(lm)
    return lm


def test_the_comparison_sees_a_stream_that_drifts(monkeypatch):
    lm = small_open()
    assert compare(lm, 2, 14, 1e-4)["passed"]
    assert not compare(lm, 2, 14, 10.0)["passed"]  # what a memory writes would not be seen
    step, calls = LMGen.step, []

    def nudged(self, codes):
        calls.append(None)
        if len(calls) == 9:  # of the first, the graphed stream
            state = next(iter(ttt_blocks(lm).values()))._streaming_state
            state.memory.fast.W1.mul_(1.1)
        return step(self, codes)

    monkeypatch.setattr(LMGen, "step", nudged)
    found = compare(lm, 2, 14, 1e-4)
    assert not found["passed"]
    assert not found["exact"]
    assert found["logits"] > 1e-3


def test_rows_are_out_of_step_and_one_starts_anew():
    there = plan(2, 70)
    assert there.sum(0).tolist() == [56, 60]
    assert (there[:, 0] != there[:, 1]).any()
    lm = small_open()
    two = forced(lm, 2, 26, graphs=True)
    assert two.logits.shape == (26, 2, 64)
    again = forced(lm, 2, 26, graphs=True, seed=1)
    assert 0 < (two.tokens == again.tokens).double().mean() < 0.5  # what was sampled, not drawn
    positions = [x.tolist() for x in two.states if x.dtype == torch.int64]
    assert len(set(map(tuple, positions))) == 1
    expected = [int(plan(2, 26)[14:, 0].sum()), int(plan(2, 26)[:, 1].sum())]
    assert positions[0] == expected


@pytest.mark.parametrize("most", [1, 2, 3, 7, 16])
def test_the_largest_batch_is_found(most):
    for limit in range(20):
        tried = []

        def fits(size, limit=limit, tried=tried):
            tried.append(size)
            return size <= limit

        assert largest_batch(fits, most) == min(limit, most)
        assert len(tried) == len(set(tried)) <= 8


def test_what_does_not_fit_is_no_error_and_leaves_nothing(monkeypatch):
    lm = build(SMALL, CPU)
    add_lora(lm, 2, 2.0)
    add_memory(lm, SMALL)
    real = gpu_train.train_step

    def limited(model, ticks, *args, **kwargs):
        if len(ticks[0][0].frames) > 1:
            model(ticks[0][0].sequence)[0].sum().backward()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, ticks, *args, **kwargs)

    monkeypatch.setattr(gpu_train, "train_step", limited)
    row = train(lm, replace(SMALL, seconds=1.0, rank=2, steps=1), memory=True)
    assert row["batch"] == 1
    assert row["tokens_per_second"] > 0
    assert all(p.grad is None and not p.requires_grad for p in lm.parameters())
    assert not lm.training


def test_other_errors_of_training_are_errors(monkeypatch):
    def broken(*args):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(gpu_train, "timed", broken)
    lm = build(SMALL, CPU)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(lm, SMALL, memory=False)
    assert out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"))
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))


def test_the_7b_is_the_7b():
    """Built where nothing is stored: its shape, its memory and what is trained."""
    meta = torch.device("meta")
    lm = build(MOSHI_7B, meta)
    assert lm.dtype == torch.bfloat16
    base = sum(p.numel() for p in lm.parameters())
    assert 7.6e9 < base < 7.8e9
    add_memory(lm, MOSHI_7B)
    open_memories(lm)
    assert len(list(hybrid_layers(lm))) == 8
    for block in ttt_blocks(lm).values():
        for name, parameter in block.named_parameters():
            wanted = torch.bfloat16 if "proj" in name else torch.float32
            assert parameter.dtype == wanted, name
    assert MOSHI_7B.frames == 1250
    gen = LMGen(lm, support_out_of_sync=True)
    with gen.streaming(1):
        for _ in range(2):
            gen.step(torch.zeros(1, 8, 1, dtype=torch.long, device=meta))
