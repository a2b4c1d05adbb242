"""The recall probe: its sequences, its sentences, and the command from options to files."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from eval.arms import BASE, KEPT, RESET, Arm
from eval.keep import Found
from eval.modes import writing_off
from eval.panel import make_items, read_panel
from eval.perplexity import score
from eval.recall.__main__ import main
from eval.recall.gains import compare
from eval.recall.hearings import HEARD, Hearings, Plan, delays, plan
from eval.recall.report import gain_table, render, verdict
from eval.scores import Item
from eval.tables import as_text
from finetune.data.codes import CodesCache
from moshi_ttt.base import find_base, load_base
from moshi_ttt.checkpoint import load, save_checkpoint
from moshi_ttt.config import TTTConfig
from moshi_ttt.errors import UserError, run_cli
from moshi_ttt.hybrid import splice
from moshi_ttt.lora import add_lora
from moshi_ttt.tiny import build_base
from tests.eval.test_panel import speak
from tests.eval.tiny_lm import make_codes
from tests.small import randomise_memories

WINDOW = 5
PLAN = Plan(lead_in=5, passage=4, delays=(3, 10))


def made_up_items(count=5, frames=20):
    return [Item(f"r{i}", f"s{i}", make_codes(frames, seed=i)[0]) for i in range(count)]


# -- sequences -------------------------------------------------------------------------------


def place(item, codes):
    """Where a piece is in a recording, None if it is not there."""
    width = codes.shape[1]
    starts = range(item.frames - width + 1)
    return next((s for s in starts if torch.equal(item.codes[:, s : s + width], codes)), None)


@pytest.mark.parametrize("count", [3, 5])
def test_only_what_was_heard_before_differs(count):
    items = made_up_items(count)
    hearings = Hearings(items, PLAN)
    for delay in PLAN.delays:
        passage, speaker, stranger = (hearings.sequences(delay, heard) for heard in HEARD)
        for mine, *same in zip(items, passage, speaker, stranger, strict=True):
            assert {s.frames for s in same} == {PLAN.frames(delay)} == {5 + 4 + delay + 4}
            again = {tuple(s.codes[:, -4:].flatten().tolist()) for s in same}
            around = {
                tuple(torch.cat([s.codes[:, :5], s.codes[:, 9:]], 1).flatten().tolist())
                for s in same
            }
            assert len(again) == len(around) == 1
            before = [s.codes[:, PLAN.first()] for s in same]
            assert [place(mine, b) for b in before] == [4, 0, None]
            assert place(mine, same[0].codes[:, -4:]) == 4
            others = [item for item in items if item is not mine]
            by = [next(o.name for o in others if place(o, part) is not None) for part in (
                same[0].codes[:, :5], before[2], same[0].codes[:, 9 : 9 + delay],
            )]  # fmt: skip
            assert len(set(by)) == min(count - 1, 3)  # leader, stranger, filler
            assert by[1] not in (by[0], by[2])
            assert {s.speaker for s in same} == {mine.speaker}


def test_the_order_of_the_recordings_does_not_matter():
    items = made_up_items()
    forth, back = Hearings(items, PLAN), Hearings(items[::-1], PLAN)
    for heard in HEARD:
        one, other = forth.sequences(10, heard), back.sequences(10, heard)[::-1]
        assert [s.name for s in one] == [s.name for s in other]
        assert all(torch.equal(a.codes, b.codes) for a, b in zip(one, other, strict=True))


def test_short_recordings_follow_each_other_as_filler():
    items = made_up_items(5, frames=8)
    long = Plan(lead_in=5, passage=4, delays=(18,))
    filler = Hearings(items, long).sequences(18, "passage")[0].codes[:, 9:27]
    whole = [filler[:, :8], filler[:, 8:16]]
    names = {item.name for item in items[1:] for part in whole if torch.equal(item.codes, part)}
    assert len(names) == 2
    with pytest.raises(UserError, match="takes 20 frames of other speakers, there are 19 for r0"):
        Hearings(items, replace(long, delays=(3, 20)))


def test_several_passages_of_a_recording():
    items = made_up_items(frames=20)
    hearings = Hearings(items, replace(PLAN, passages=2))
    assert [p.name for p in hearings.pairs][:3] == ["r0, 0", "r0, 8", "r1, 0"]
    first, second = hearings.sequences(3, "passage")[:2]
    assert [place(items[0], s.codes[:, -4:]) for s in (first, second)] == [4, 12]
    with pytest.raises(UserError, match="r0: 24 frames are needed, not 20"):
        Hearings(items, replace(PLAN, passages=3))


def test_too_few_speakers():
    with pytest.raises(UserError, match=r"3 speakers are needed .*, there are 2: s0, s1"):
        Hearings(made_up_items(2), PLAN)
    same = [replace(item, speaker="s") for item in made_up_items()]
    with pytest.raises(UserError, match="there are 1: s"):
        Hearings(same, PLAN)


def test_delays_have_units():
    found = plan(3000, 0.5, delays("2,0.25, 1min,30s"), passages=2)
    assert found == Plan(3000, 1500, (375, 750, 6000), 2)  # a minute is a quarter of this window
    assert (found.shortest, found.longest, found.frames(750)) == (6000, 9000, 6750)
    for wrong in ("", "x", "1,0", "-1", "nan", "inf", "1h"):
        with pytest.raises(Exception, match="is not a list of windows"):
            delays(wrong)


# -- numbers and sentences -------------------------------------------------------------------


def made_up(nll, count=8, delays=(5, 10, 20), noise=0.01):
    """Results in which arm -> (passage, speaker, stranger) NLL, 3.0 at first hearing."""
    rng, plan = np.random.default_rng(0), Plan(10, 4, delays)
    items = made_up_items(count)

    def found(delay, mean):
        values = rng.normal(3.0, noise, plan.frames(delay))
        values[-plan.passage :] += mean - 3.0
        return Found({"codebook0": values, "codebooks1_7": values + 1})

    scores = {
        arm: {
            (delay, heard): [found(delay, mean) for _ in items]
            for delay in plan.delays
            for heard, mean in zip(HEARD, means, strict=True)
        }
        for arm, means in nll.items()
    }
    return compare(scores, items, plan, 10)


def test_gains_are_differences_of_what_was_heard_before():
    results = made_up({BASE: (3.0, 3.0, 3.0), KEPT: (2.5, 2.7, 3.1), RESET: (3.0, 3.0, 3.0)})
    kept = results["arms"]["kept"]["measures"]
    means = {m: kept[m]["codebook0"]["beyond"]["mean"] for m in kept}
    assert means == pytest.approx(
        {"repeat": 0.2, "return": 0.4, "second": 0.5, "nll": 2.5}, abs=0.01
    )
    assert kept["nll"]["codebooks1_7"]["delays"][0]["mean"] == pytest.approx(3.5, abs=0.01)
    assert [d["windows"] for d in results["delays"]] == [0.5, 1, 2]
    assert [d["beyond"] for d in results["delays"]] == [False, True, True]
    (reset,) = (d for d in results["differences"] if d["minus"] == "reset")
    assert reset["measures"]["return"]["codebook0"]["beyond"]["low"] > 0.35
    rows = gain_table(results, "repeat")
    assert rows[0][2:5] == ["0.5", "1", "2"]
    assert rows[2][:2] == ["(c)", "memory kept"]
    assert float(rows[2][3]) == pytest.approx(0.2, abs=0.02)


def test_the_verdict_follows_from_the_numbers():
    flat = (3.0, 3.0, 3.0)
    said = verdict(made_up({BASE: flat, KEPT: (2.5, 2.7, 3.1), RESET: flat}))
    assert len(said) == 2
    assert re.match(r"What was said beyond .* 1, 2 windows.* IS RECALLED by memory kept", said[0])
    assert "more than to each of: stock base, memory reset every window." in said[0]
    assert "Who spoke beyond" in said[1]
    assert "IS RECALLED" in said[1]

    said = verdict(made_up({BASE: flat, KEPT: (2.5, 2.7, 2.6), RESET: (2.4, 2.6, 2.6)}))
    assert "NOT shown to be more than to: memory reset every window (" in said[0]
    assert "makes memory kept WORSE" in said[1]
    assert said[2].startswith(
        "BUT after others have spoken, memory kept predicts the passage worse"
    )
    assert "memory reset every window (+0.1" in said[2]

    noisy = verdict(made_up({BASE: flat, KEPT: flat, RESET: flat}, noise=0.5))
    assert all("no recall is shown by memory kept" in line for line in noisy[:2])
    assert re.search(
        r"\(a delay of 0\.5\) it is worth [+-]0\.\d+ \[.*\] to the stock base\.$", noisy[0]
    )


def test_no_verdict_without_what_it_takes():
    arms = {BASE: (3.0, 3.0, 3.0), KEPT: (2.5, 2.7, 3.1)}
    few = verdict(made_up(arms, count=5))
    assert few == ["No verdict: 5 speakers are too few to judge by; it takes 6."]
    near = made_up(arms, delays=(5,))
    assert verdict(near) == ["No verdict: no delay reaches the window of 10 frames."]
    assert gain_table(near, "repeat")[1][-2] == "-"
    assert verdict(made_up({KEPT: (2.5, 2.7, 3.1)})) == [
        "No verdict: there is nothing to compare with."
    ]
    assert "(b) is missing: no checkpoint without memory was given" in render(near, as_text)


def test_another_memory_is_no_rival():
    better = Arm("other", "other")
    said = verdict(made_up({BASE: (3.0, 3.0, 3.0), KEPT: (2.5, 2.7, 3.1), better: (2.0, 2.7, 3.5)}))
    assert len(said) == 2
    assert "IS RECALLED" in said[0]


# -- the command -----------------------------------------------------------------------------


def save(folder, base, *, memory=True, broken=False):
    lm = load_base(base, dtype=torch.float32)
    add_lora(lm, 2, 2.0)
    if memory:
        splice(lm, TTTConfig(layers="all", chunk_size=4))
        randomise_memories(lm, seed=0)
    if broken:
        with torch.no_grad():
            lm.transformer.layers[0].seq_modeling_block.gate.fill_(float("nan"))
    save_checkpoint(lm, folder, base)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a base of one layer, checkpoints and seven speakers."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("work")
    base = find_base(build_base(folder / "base", dim=32, layers=1, context=WINDOW))
    save(folder / "runs/a/checkpoints/checkpoint_000010", base)
    save(folder / "lora", base, memory=False)
    save(folder / "broken", base, broken=True)
    for i in range(7):
        speak(folder / f"speech/small/{i}/book/part_1.flac", 1.3, seed=i, speaker=str(i))
    return folder


@pytest.fixture
def work(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


def run(*options):
    fixed = ["--data", "speech", "--encode-workers", "1", "--device", "cpu"]
    main([*fixed, "--delays", "0.4,1.2,2", *options])


def test_end_to_end(work, capsys):
    run("--baseline", "lora", "--rows", "2")
    said = capsys.readouterr().out
    assert "7 passages of 7 recordings, 3 delays, 3 sequences each: 945 frames, 5 arms" in said
    out = work / "runs/eval/a-10-recall"
    assert "runs/eval/a-10-recall/recall.png" in said
    assert (out / "recall.png").read_bytes().startswith(b"\x89PNG")
    assert "who spoke, codebook 0" in (out / "report.md").read_text()
    assert "data:image/svg+xml;base64" in (out / "report.html").read_text()
    results = json.loads((out / "results.json").read_text())
    assert list(results["arms"]) == ["base", "lora", "kept", "reset", "off"]
    assert [d["frames"] for d in results["delays"]] == [2, 6, 10]
    assert results["passage_frames"] == 2
    found = {name: arm["measures"] for name, arm in results["arms"].items()}
    assert [e["n"] for e in found["kept"]["repeat"]["codebook0"]["delays"]] == [7, 7, 7]
    # one layer: beyond its window and the codebooks' delay a stock model cannot know it
    for measure in ("repeat", "return"):
        near, *far = (e["mean"] for e in found["base"][measure]["codebook0"]["delays"])
        assert abs(near) > 1e-4
        assert far == pytest.approx([0, 0], abs=1e-6)
        assert abs(found["kept"][measure]["codebook0"]["delays"][1]["mean"]) > 1e-4
    assert "(d) is missing: no checkpoint trained with writing off was given" in said

    hearings = sequences_of(work, results)
    loaded, base = load("runs/a/checkpoints/checkpoint_000010").lm, find_base("base")
    stock = load_base(base, dtype=torch.float32)
    by_score = partial(partial, score, rows=7)
    check(results, "base", hearings, by_score(stock))
    check(results, "kept", hearings, by_score(loaded))
    check(results, "reset", hearings, by_score(loaded, reset_every=WINDOW))
    with writing_off(loaded):
        check(results, "off", hearings, by_score(loaded))


def sequences_of(work, results):
    """The sequences that the command scored, made again in another order."""
    info = find_base("base").info
    cache = CodesCache(work / "data/codes", info.get_mimi("cpu"))
    books = read_panel("speech")
    items = make_items(books, cache, info.get_text_tokenizer())
    lengths = Plan(WINDOW, 2, tuple(d["frames"] for d in results["delays"]))
    items = [replace(item, codes=item.codes[:, : lengths.longest]) for item in items]
    return Hearings(items, lengths)


def check(results, arm, hearings, scored):
    """The command's numbers are those of `score` on each sequence."""
    for k, delay in enumerate(hearings.plan.delays):
        nll = {
            heard: [
                s.values[1].double()
                for s in scored([s.codes.long() for s in hearings.sequences(delay, heard)])
            ]
            for heard in HEARD
        }
        for i, pair in enumerate(hearings.pairs):
            found = results["arms"][arm]["passages"][pair.name]
            last = {heard: nll[heard][i][-2:].mean().item() for heard in HEARD}
            first = nll["passage"][i][5:7].mean().item()
            wanted = {
                "repeat": last["speaker"] - last["passage"],
                "return": last["stranger"] - last["speaker"],
                "second": first - last["passage"],
                "nll": last["passage"],
            }
            for measure, value in wanted.items():
                assert found[measure]["codebook0"][k] == pytest.approx(value, abs=2e-5)


@pytest.mark.usefixtures("undrawn")
def test_it_goes_on_where_it_was(work, capsys, tmp_path):
    out = tmp_path / "o"
    few = ["--out", str(out), "--max-items", "3", "--delays", "1"]
    run(*few)
    results = json.loads((out / "results.json").read_text())
    files = {file: file.stat().st_mtime_ns for file in (out / "nll").iterdir()}
    (out / "results.json").unlink()
    next(iter(files)).unlink()
    capsys.readouterr()
    run(*few)
    assert f"going on: {len(files) - 1} scores may be in" in capsys.readouterr().out
    again = json.loads((out / "results.json").read_text())
    assert again["arms"] == results["arms"]
    changed = [file for file, time in files.items() if file.stat().st_mtime_ns != time]
    assert changed == [next(iter(files))]


def test_a_checkpoint_without_memory(work, tmp_path):
    run("--checkpoint", "lora", "--out", str(tmp_path / "o"))
    results = json.loads((tmp_path / "o/results.json").read_text())
    assert list(results["arms"]) == ["base", "trained"]
    difference = results["differences"][0]["measures"]["repeat"]["codebook0"]
    assert difference["beyond"]["mean"] == 0.0  # lora_B is 0


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--max-items", "2"], r"3 speakers are needed .*, there are 2: "),
        (
            ["--passage-windows", "9"],
            r"as long as 1 x two passages, and the window \(7.2 s\); the ",
        ),
        (["--passages", "9"], r"as long as 9 x two passages, .* \(2.88 s\); the longest of 7 is"),
        (["--delays", "1,60"], "takes 300 frames of other speakers, there are"),
        (["--delays", "soon"], "argument --delays: 'soon' is not a list of windows"),
        (["--passage-windows", "0"], "must be positive, got 0"),
        (["--checkpoint", "nowhere"], "nowhere is not a checkpoint"),
        (["--wrong"], "unrecognized arguments: --wrong"),
    ],
)
def test_bad_input_is_one_line_and_status_2(work, capsys, options, line, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: run("--out", str(tmp_path / "o"), *options))
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(line, error), error
    assert not (tmp_path / "o").exists()


def test_a_recording_that_cannot_be_read(work, capsys, tmp_path):
    shutil.copytree("speech", tmp_path / "speech")
    broken = tmp_path / "speech/small/3/book/part_1.flac"
    broken.write_bytes(b"not audio")
    with pytest.raises(SystemExit) as stopped:
        run("--data", str(tmp_path / "speech"), "--delays", "1", "--out", str(tmp_path / "o"))
    assert stopped.value.code == 1
    said = capsys.readouterr().out
    assert "NOT ALL IS THERE: 1 recordings could not be read" in said
    results = json.loads((tmp_path / "o/results.json").read_text())
    assert (len(results["items"]), results["failed"][0]["name"]) == (6, "3/book")
    assert "3/book was left out" in (tmp_path / "o/report.md").read_text()


def test_a_model_that_is_broken(work, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run("--checkpoint", "broken", "--delays", "1", "--out", str(tmp_path / "o"))
    assert stopped.value.code == 1
    assert "63 scores are no number" in capsys.readouterr().out
    results = json.loads((tmp_path / "o/results.json").read_text())
    kept = results["arms"]["kept"]
    assert len(kept["broken"]) == 3 * 7
    assert kept["measures"]["repeat"]["codebook0"]["beyond"]["reason"] == "an NLL is no number"
    assert results["arms"]["base"]["measures"]["repeat"]["codebook0"]["beyond"]["n"] == 7
