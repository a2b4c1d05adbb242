"""Bytes and time against length, the command itself at lengths of a second."""

import json

import pytest
import torch

from eval.bench import segment_length
from eval.bench.gpu_model import build
from eval.bench.segment_length import NARROW, Variant, count, dress, needs
from eval.bench.segment_table import holds, judge
from finetune.live_bytes import LiveBytes, kept
from moshi_ttt.errors import UserError
from moshi_ttt.lora import add_lora
from moshi_ttt.memory import MEMORIES

TINY = ["--frames", "64", "256", "--rounds", "1"]


def test_the_command(tmp_path, capsys):
    segment_length.main([*TINY, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "segment_length.json").read_text())
    assert len(found["rows"]) == 2 * 2 * (1 + len(MEMORIES))
    for row in found["rows"]:
        assert 0 < row["kept"] < row["peak"] <= 1.1 * row["estimated"]
        assert row["peak"] >= 0.8 * row["estimated"]
        assert row["seconds"] > 0
        longer = row["memory"] is not None and row["frames"] == 256
        assert (holds(row) is True) == longer
        assert row["layers_growth"] is None or 0 <= row["layers_growth"] < 1.1
    page = (tmp_path / "segment_length.md").read_text()
    for text in ("not yet run on a GPU", "| 256 | no | ttt_mlp |", "| yes |", "- commit: `"):
        assert text in page
    assert page.startswith(capsys.readouterr().out)


def test_a_memory_that_grows_faster_ends_in_status_1(tmp_path, monkeypatch, capsys):
    real = segment_length.count

    def steep(lm, frames):
        found = real(lm, frames)
        return {k: v + 10**6 * frames * hasattr(lm, "ttt_config") for k, v in found.items()}

    monkeypatch.setattr(segment_length, "count", steep)
    with pytest.raises(SystemExit) as stopped:
        segment_length.main([*TINY, "--memories", "ttt_linear", "--out", str(tmp_path)])
    assert stopped.value.code == 1
    assert "faster than the base's" in capsys.readouterr().err
    assert "| NO |" in (tmp_path / "segment_length.md").read_text()


def test_what_does_not_fit_is_a_row_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(segment_length, "available", lambda: 10**6)
    segment_length.main([*TINY, "--memories", "ttt_linear", "lact", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "segment_length.json").read_text())["rows"]
    assert {row["memory"] for row in rows} == {None, "ttt_linear", "lact"}
    left_out = [row for row in rows if row["estimated"] >= 10**6]
    assert left_out
    assert all(row["kept"] is None and row["seconds"] is None for row in left_out)
    assert all(holds(row) is None for row in left_out)
    assert "did not fit: about" in (tmp_path / "segment_length.md").read_text()


@pytest.mark.parametrize("wrong", [["--frames", "48", "24"], ["--rounds", "0"], ["--frames", "0"]])
def test_lengths_that_make_no_sense(wrong, tmp_path):
    with pytest.raises(UserError, match="--frames must grow"):
        segment_length.main([*TINY, *wrong, "--out", str(tmp_path)])


def test_growth_is_that_of_what_the_memory_adds():
    base = {"checkpointing": False, "memory": None}
    rows = [
        base | {"frames": t, "kept": 100 * t, "peak": 200 * t, "layers": 50 * t} for t in (1, 2)
    ]
    added = {"ttt_linear": 5, "ttt_mlp": 120}
    rows += [
        r | {"memory": m, "kept": r["kept"] + a * r["frames"], "peak": r["peak"] + 7}
        for r in rows for m, a in added.items()
    ]  # fmt: skip
    rows += [r | {"checkpointing": True, "kept": None} for r in rows]
    judge(rows)
    grown = {r["memory"]: r for r in rows if r["kept_growth"] is not None}
    assert grown["ttt_linear"]["kept_growth"] == 5 / 100
    assert grown["ttt_linear"]["layers_growth"] == 5 / 50
    assert grown["ttt_linear"]["peak_growth"] == 0
    assert holds(grown["ttt_linear"])
    assert grown["ttt_mlp"]["kept_growth"] == 1.2
    assert holds(grown["ttt_mlp"]) is False
    assert len(grown) == 2


def test_variants_take_turns_on_one_model():
    torch.manual_seed(0)
    lm = build(NARROW, torch.device("cpu"))
    add_lora(lm, NARROW.rank, 2.0)
    first = {}
    for again in (1, 2):
        for variant in (Variant(None, False), Variant("ttt_mlp", False), Variant("ttt_mlp", True)):
            dress(lm, NARROW, variant)
            found = count(lm, 24)
            assert found == first.setdefault(variant, found), again
            assert found["kept"] == pytest.approx(layers_and_more(lm, variant), rel=0.05)


def layers_and_more(lm, variant):
    need = needs(lm, NARROW, 24, variant)
    with kept(lm.parameters()) as saved:
        loss = segment_length.loss_of(lm, 24)
    assert loss.requires_grad
    assert saved.bytes > need["layers"] > 0
    return saved.bytes


def test_live_bytes_are_those_of_tensors_made_inside():
    outside = torch.zeros(1000)
    with LiveBytes() as live:
        view = outside[:10]
        assert live.now == 0
        a = outside + view[0]
        b = a * 2
        assert live.now == 2 * 4000
        del a
        assert live.now == 4000
        b.add_(1)
        del b
    assert live.now == 0
    assert live.peak == 2 * 4000
