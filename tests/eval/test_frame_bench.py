"""The frame benchmark, end to end on small shapes, and what its numbers mean."""

import json
import re
import time

import numpy as np
import pytest
import torch

from eval.bench import frame
from eval.bench.frame import MEMORY, STOCK, of_files, of_shape, parse
from eval.bench.frame_table import as_row, page, ratio_table, times_table
from eval.bench.frame_timing import (
    PARTS,
    TURN,
    Clock,
    Models,
    clocked,
    fits,
    in_turn,
    ratios,
    sharing,
)
from moshi_ttt.errors import UserError, run_cli
from moshi_ttt.hybrid import HybridLMModel
from tests.small import small_base, small_hybrid, small_lm, small_mimi, small_tokenizer

CPU = torch.device("cpu")
CARD = small_tokenizer().vocab_size()


def small_models():
    stock, memory = small_lm(text_card=CARD).eval(), small_hybrid(lm={"text_card": CARD})
    mimi = small_mimi()
    mimis = {STOCK: mimi, MEMORY: sharing(mimi)}
    return Models({STOCK: stock, MEMORY: memory}, mimis, small_tokenizer(), "small")


def test_end_to_end(tmp_path, capsys):
    base = small_base(tmp_path / "base")
    frame.main(["--base", str(base), "--device", "cpu", "--batches", "1,2", "--frames", "15",
                "--most", "2", "--out", str(tmp_path)])  # fmt: skip
    found = json.loads((tmp_path / "frame.json").read_text())
    assert [row["sessions"] for row in found["rows"]] == [1, 2]
    for row in found["rows"]:
        for name in (STOCK, MEMORY):
            times = row[name]
            assert set(times) == set(PARTS)
            for p50, p95, p99 in times.values():
                assert 0 < p50 <= p95 <= p99
            assert times["LM"][0] < times["frame"][0]
            assert times["temporal"][0] + times["depformer"][0] < 1.5 * times["LM"][0]
        assert 1 < row["ratio"]["temporal"][1] < 20
    assert set(found["fit"]) == {STOCK, MEMORY}
    text = (tmp_path / "frame.md").read_text()
    assert capsys.readouterr().out == text
    for words in ("untrained ttt_mlp of configs/tiny.yaml", "not yet run on a GPU", "| commit |",
                  "eval.bench.frame", "![ms a frame](frame.png)"):  # fmt: skip
        assert words in text
    assert {"frame.png", "frame.svg"} <= {p.name for p in tmp_path.iterdir()}


def test_a_shape_of_random_weights(monkeypatch):
    monkeypatch.setattr(frame, "get_mimi", lambda *_, **__: small_mimi())  # the real one is large
    models = of_shape("small", "lact", CPU)
    assert "lact" in models.name
    stock, memory = models.lms[STOCK], models.lms[MEMORY]
    assert isinstance(memory, HybridLMModel)
    assert not isinstance(stock, HybridLMModel)
    own = {id(p) for p in stock.parameters()}
    assert own < {id(p) for p in memory.parameters()}  # 15 GB are held once
    row = as_row(1, in_turn(models, 1, 2 * TURN), STOCK, MEMORY, "cpu")
    assert row["ratio"]["temporal"][1] > 1


def test_a_checkpoint_is_its_own_stock(tmp_path, monkeypatch):
    class Talker:
        lm, mimi, tokenizer, name = small_hybrid(), small_mimi(), small_tokenizer(), "checkpoint x"

    monkeypatch.setattr(frame, "open_talker", lambda *_: Talker)
    models = of_files(parse(["--checkpoint", "x"]), CPU)
    assert not isinstance(models.lms[STOCK], HybridLMModel)
    assert isinstance(models.lms[MEMORY], HybridLMModel)
    assert models.mimis[STOCK] is not models.mimis[MEMORY]
    Talker.lm = small_hybrid()
    with pytest.raises(UserError, match="has a memory"):
        of_files(parse(["--checkpoint", "x", "--memory", "lact"]), CPU)


def test_turns_are_of_equal_length_and_leave_the_models_as_they_were():
    models = small_models()
    clocks = in_turn(models, 2, 20)
    for clock in clocks.values():
        assert {len(times) for times in clock.wall.values()} == {2 * (TURN - 1)}
        assert {len(times) for times in clock.cpu.values()} == {2 * (TURN - 1)}
    assert not any("encode" in vars(mimi) for mimi in models.mimis.values())
    assert not any(lm.is_streaming for lm in models.lms.values())
    assert ratios(clocks, "LM", MEMORY, STOCK).shape == (2,)


def test_a_slower_part_is_seen_where_it_is(monkeypatch):
    models = small_models()
    decode = models.mimis[MEMORY].decode

    def slow(codes):
        until = time.thread_time() + 0.03
        while time.thread_time() < until:
            pass
        return decode(codes)

    monkeypatch.setattr(type(models.mimis[MEMORY]), "decode", lambda self, codes: slow(codes))
    with models.engine(MEMORY, 1) as engine, clocked(engine) as (clock, step):
        for _ in range(3):
            step(np.zeros((1, 1920), np.float32))
    assert min(clock.cpu["decode"]) > 30
    assert np.median(clock.cpu["frame"]) > 30
    assert np.median(clock.cpu["LM"]) < np.median(clock.cpu["decode"])


def test_sessions_fit_by_the_95th_percentile(monkeypatch):
    clock = Clock(CPU)
    monkeypatch.setattr("eval.bench.frame_timing.in_turn", lambda *_: {MEMORY: clock})
    models = small_models()
    clock.wall["frame"] = [20.0] * 96 + [500.0] * 4
    assert fits(models, MEMORY, 1, 100, "wall")
    clock.wall["frame"] = [20.0] * 90 + [81.0] * 10
    assert not fits(models, MEMORY, 1, 100, "wall")

    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("eval.bench.frame_timing.in_turn", no_room)
    assert not fits(models, MEMORY, 1, 100, "wall")


def made_up(lm_ratio):
    times = {part: [10.0, 12.0, 15.0] for part in PARTS}
    more = times | {"temporal": [11.5, 14.5, 18.5]}
    quartiles = {part: [lm_ratio - 0.01, lm_ratio, lm_ratio + 0.01] for part in
                 ("LM", "temporal", "frame")}  # fmt: skip
    return {"sessions": 8, STOCK: times, MEMORY: more, "ratio": quartiles}


@pytest.mark.parametrize(("ratio", "verdict"), [(1.249, "met"), (1.251, "missed")])
def test_the_table_says_what_the_memory_adds_and_whether_that_is_too_much(ratio, verdict, tmp_path):
    rows = [made_up(ratio)]
    assert times_table(rows, STOCK, MEMORY)[2][6] == "1.50 / 2.50 / 3.50"
    assert ratio_table(rows, 1.25)[1][-1] == f"1.25: {verdict}"
    results = {"rows": rows, "fit": {STOCK: 5, MEMORY: 64}, "most": 64, "frames": 9, "model": "m"}
    results["clock"] = "wall"
    text = page(results, STOCK, MEMORY, "frame.png", tmp_path / "frame_7b.md")
    assert "stock 5, with memory 64 or more" in text
    (tmp_path / "frame_7b.md").write_text("there")
    assert "not yet run" not in page(results, STOCK, MEMORY, "x.png", tmp_path / "frame_7b.md")


@pytest.mark.parametrize(
    ("typed", "match"),
    [
        (["--batches", "1,two"], "numbers with commas"),
        (["--batches", "1,0"], "at least 1"),
        (["--frames", "0"], "at least 1"),
        (["--shape", "7b", "--base", "x"], "neither checkpoint nor base"),
        (["--shape", "7b", "--device", "cpu"], "needs a CUDA device"),
        (["--memory", "none"], "invalid choice"),
        (["--clock", "sun"], "invalid choice"),
    ],
)
def test_a_wrong_option_is_one_line(typed, match, capsys):
    with pytest.raises(UserError, match=match):
        frame.main(typed)
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: frame.main(typed))
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.gpu
def test_a_shape_on_a_gpu(tmp_path):
    frame.main(["--shape", "small", "--batches", "1,2", "--frames", "30", "--most", "4", "--out",
                str(tmp_path)])  # fmt: skip
    found = json.loads((tmp_path / "frame_small.json").read_text())
    assert all(row["ratio"]["LM"][1] > 0 for row in found["rows"])
    assert re.search(r"\| machine \| .*CUDA", (tmp_path / "frame_small.md").read_text())
