"""The table of what fits where: every number the largest that does, and marked as computed."""

import json
from functools import partial

import pytest

from eval.bench import fits
from eval.bench.fits import CARDS, GIB, USABLE, run_of
from finetune.memory_use import need_of, planned
from finetune.world import Rows
from moshi_ttt.errors import UserError

FEW = ["--memories", "ttt_mlp", "--seconds", "100", "--ranks", "128", "--most", "16"]


def test_the_table_is_written(tmp_path, capsys, monkeypatch):
    plans = {}

    def kept(config, args, width):
        plan = planned(config, args, width)
        plans.setdefault(args.carry_kv, plan)
        return plan

    monkeypatch.setattr(fits, "planned", kept)
    fits.main([*FEW, "--cards", "40", "80", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "fits.json").read_text())
    rows = found["rows"]
    assert len(rows) == 2 * 2 * 2  # cards, GPUs, carry_kv
    batch = {(r["card"], r["gpus"], r["carry_kv"]): r["batch"] for r in rows}
    assert {r["source"] for r in rows} == {"computed"}
    for card, gpus, carried in batch:
        assert batch[card, 1, carried] <= batch[card, 8, carried]
        assert batch[card, gpus, True] <= batch[card, gpus, False]
        assert batch[40, gpus, carried] <= batch[80, gpus, carried]
    run = partial(run_of, "ttt_mlp every:4", 128)
    for row in rows:
        kv, there = row["carry_kv"], USABLE * CARDS[row["card"]] * GIB
        args = run(100.0, kv)
        for more in (0, 1):
            need = need_of(*plans[kv], args, Rows(row["batch"] + more, 1, row["gpus"])).total
            assert more or row["batch"] == 0 or need == row["bytes"]
            if row["batch"] + more > 0 and row["batch"] < 16:
                assert (need <= there) == (more == 0)
    page = (tmp_path / "fits.md").read_text()
    for text in (
        "nothing was measured on a GPU yet", "| 80 GB | ttt_mlp every:4 | 100 s |", "| computed |",
        "| peak |", "- commit: `", "- command: `python -m eval.bench.fits",
    ):  # fmt: skip
        assert text in page
    assert page.startswith(capsys.readouterr().out)


def test_what_makes_no_run_is_the_users_mistake(tmp_path):
    for wrong in (["--gpus", "1"], ["--most", "0"], ["--layers", "every:99"], ["--ranks", "0"]):
        with pytest.raises(UserError):
            fits.main([*FEW, *wrong, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
