import json
import re
from pathlib import Path

import numpy as np
import pytest

from eval.arms import BASE, KEPT, OFF, RESET, SHUFFLED, TRAINED, WIDE, Arm
from eval.keep import Found
from eval.output import next_folder, write_results
from eval.report import arm_table, conditions, main_difference, markdown, notes, range_table, render
from eval.scores import KINDS, Item, Scores
from eval.summary import summarise
from eval.tables import as_markdown, as_text
from eval.verdict import difference, findings, verdict
from moshi_ttt.errors import UserError
from tests.eval.tiny_lm import make_codes

WINDOW = 10


ARMS = {arm.name: arm for arm in (BASE, WIDE, KEPT, RESET, SHUFFLED, OFF, TRAINED)} | {
    "lora": Arm("lora", "lora: no memory", "b", Path("lora")),
    "unwritten": Arm("unwritten", "unwritten: trained with writing off", "d", Path("d")),
}


def made_up(arms, count=8, frames=60, spread=0.02, short=0):
    """Results in which arm `a` has the mean NLL `arms[a]` beyond the window, and 3.0 within.

    The first `short` recordings end before the scalar's range does.
    """
    rng = np.random.default_rng(0)
    lengths = [2 * WINDOW if i < short else frames for i in range(count)]
    items = [Item(f"r{i}", f"s{i}", make_codes(n)[0]) for i, n in enumerate(lengths)]
    scores = {}
    for name, mean in arms.items():
        found = []
        for length in lengths:
            nll = {}
            for kind in KINDS:
                values = np.full(length, mean) + rng.normal(0, spread, length)
                values[:WINDOW] = 3.0
                nll[kind] = np.full(length, np.nan) if kind == "text" else values
            norms = ({"b": 2.0}, {"b": 1.0}) if name == "kept" else ({}, {})
            found.append(Found(nll, [1.0, 2.0], *norms))
        scores[ARMS[name]] = Scores(found)
    return summarise(scores, items, WINDOW, training_frames=25)


def test_the_table_has_ranges_and_the_difference():
    results = made_up({"base": 3.2, "kept": 3.0, "reset": 3.1, "off": 4.0})
    rows = range_table(results)
    assert rows[0] == [
        "windows", "frames", "stock base", "memory kept", "memory reset every window",
        "kept - reset [95 %]",
    ]  # fmt: skip
    assert [row[0] for row in rows[1:]] == ["0-1x", "1x-2x", "2x-4x", "1x-4x", "4x-end"]
    assert [row[1] for row in rows[1:]] == ["0-10", "10-20", "20-40", "10-40", "40-end"]
    assert float(rows[4][2]) == pytest.approx(3.2, abs=0.01)
    assert rows[4][5].startswith("-0.10")
    assert len({len(line) for line in as_text(rows).splitlines()[2:]}) == 1
    assert as_markdown(rows).splitlines()[1].count("---") == 6
    arms = {row[1]: row for row in arm_table(results)}
    assert arms["memory kept"][4] == ""
    assert arms["stock base"][0] == "(a)"
    assert float(arms["stock base"][3]) == pytest.approx(np.exp(3.2), rel=0.01)
    assert arms["stock base"][4].startswith("-0.20")
    assert arms["stock base"][6].startswith(("-0.19", "-0.20"))


ALL = {"base": 3.2, "lora": 3.12, "unwritten": 3.11, "kept": 3.0, "reset": 3.1, "shuffled": 3.1}


def test_a_memory_earns_its_claim_by_every_condition():
    results = made_up(ALL | {"shuffled": 3.11})
    assert [f.holds for f in findings(results)] == [True] * 5
    assert verdict(results).startswith("The memory earns its claim beyond the window (1x to 4x")
    assert all(line.startswith("holds: (") for line in conditions(results))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"lora": 2.9}, "does not hold: (b) WORSE than lora: no memory: +0.10"),
        ({"lora": 3.0}, "does not hold: (b) No difference is shown to lora: no memory: "),
        ({"unwritten": 2.9}, "does not hold: (d) WORSE than unwritten"),
        ({"reset": 2.9}, "does not hold: (e) WORSE than memory reset every window"),
        ({"shuffled": 2.9}, "does not hold: (f) WORSE than memory of another recording"),
        (
            {"shuffled": 3.05},
            "does not hold: (f) With another recording's history some of the gain over the reset",
        ),
    ],
)
def test_a_memory_that_fails_a_condition_does_not(change, line):
    results = made_up(ALL | change)
    assert verdict(results).startswith("The memory does NOT earn its claim beyond the window")
    assert any(found.startswith(line) for found in conditions(results)), conditions(results)


def test_part_of_a_gain_that_another_history_leaves_is_said():
    results = made_up(ALL | {"shuffled": 3.05}, spread=0.001)
    assert any("50% of it; that part is no memory" in line for line in conditions(results))


def test_what_cannot_be_judged_is_open():
    results = made_up({"base": 3.2, "kept": 3.0, "reset": 3.1})
    assert verdict(results).startswith("The claim cannot be judged in full beyond the window")
    assert conditions(results) == [
        "open: (b) cannot be judged: no checkpoint without memory was given.",
        "open: (d) cannot be judged: no checkpoint trained with writing off was given.",
        conditions(results)[2],
        "open: (f) cannot be judged: no shuffled history was scored.",
    ]
    assert conditions(results)[2].startswith("holds: (e) Better than memory reset")


def test_no_verdict_without_what_it_takes():
    few = verdict(made_up({"kept": 3.0, "reset": 3.1}, count=5))
    assert few == "No verdict: 5 speakers are too few to judge by; it takes 6."
    short = verdict(made_up({"kept": 3.0, "reset": 3.1}, frames=30))
    assert short.startswith("No verdict: ")
    assert "no recording reaches frame 40: the longest has 30" in short
    assert verdict(made_up({"trained": 3.0})) == "No verdict: there is nothing to compare with."
    for trained, said in (
        (3.0, "trained model (no memory) predicts codebook 0 better than stock base"),
        (3.2, "trained model (no memory) predicts codebook 0 WORSE than stock base"),
        (3.1, "no difference is shown between trained model (no memory) and stock base"),
    ):
        assert said in verdict(made_up({"base": 3.1, "trained": trained}))


@pytest.mark.parametrize("arms", [ALL, {"base": 3.2, "trained": 3.0}])
def test_speakers_whose_recordings_end_before_the_scalar_are_none_to_judge_by(arms):
    said = "No verdict: 5 speakers are too few to judge by; it takes 6."
    assert verdict(made_up(arms, count=10, short=5)) == said
    assert not verdict(made_up(arms, count=11, short=5)).startswith("No verdict")


def test_a_difference_is_judged_by_the_speakers_that_both_arms_have():
    results = made_up(ALL)
    for name in ("r0", "r1", "r2"):
        results["arms"]["lora"]["recordings"][name]["codebook0"]["1x-4x"] = np.nan
    assert findings(results)[0].holds is None
    assert "5 speakers are too few" in findings(results)[0].text
    assert findings(results)[1].holds


def test_a_difference_has_the_sign_of_its_interval():
    found = difference(made_up(ALL), "kept", "lora")
    assert found is not None
    size = f"{found['mean']:+.4f} nats a frame [{found['low']:+.4f}, {found['high']:+.4f}]"
    assert f"(b) Better than lora: no memory: {size}" in conditions(made_up(ALL))[0]


def test_a_wide_interval_is_no_sign_that_a_gain_was_taken_away():
    """Half of it is left on average, and nothing of it is certain."""
    results = made_up(ALL | {"shuffled": 3.06}, spread=0.001)
    left = difference(results, "shuffled", "reset")
    assert left is not None
    left |= {"low": -0.09, "high": 0.01}
    *others, last = findings(results)
    assert all(f.holds for f in others)
    assert last.holds is None
    assert "cannot be told, half of it may be left: -0.0" in last.text
    assert "cannot be judged in full" in verdict(results)


def test_where_there_is_no_gain_no_history_takes_it_away():
    results = made_up(ALL | {"reset": 3.0, "shuffled": 3.0}, spread=0.2)
    *_, last = findings(results)
    assert last.holds is None
    assert last.text == "(f) There is no gain over the reset for another history to take."
    assert verdict(results).startswith("The memory does NOT earn its claim")


def test_what_is_missing_is_said():
    results = made_up({"base": 3.0, "kept": 3.0, "reset": 3.1}, frames=30)
    assert notes(results) == [
        "codebook0, codebooks1_7 from 2x-4x, 1x-4x: "
        "no recording reaches frame 40: the longest has 30",
        "codebook0, codebooks1_7 from 4x-end: no recording reaches frame 50: the longest has 30",
        "text: no transcript",
    ]
    uneven = notes(made_up({"base": 3.0}, short=1))
    assert "curves end with the shortest recording, of 20 frames; the longest has 60" in uneven
    assert range_table(results)[4][-1] == "-"
    assert "\n- codebook0, codebooks1_7 from 2x-4x" in render(results)
    assert "Not there, or not alike:\n\n- codebook0" in markdown(results, "x", [])


@pytest.mark.usefixtures("undrawn")
def test_a_report_says_how_it_was_made_and_what_was_left_out(tmp_path):
    results = made_up({"base": 3.2, "kept": 3.0, "reset": 3.1})
    results |= {"facts": {"the recordings are": "Moshi's side", "commit": "abc"}}
    results |= {"left_out": ["2 of 10 recordings are shorter"]}
    results |= {"memory_bytes": {"start": 2**30, "end": 3 * 2**20}}
    write_results(results, tmp_path / "out", "a run")
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text().replace("&#x27;", "'")
        assert "Moshi's side" in text
        assert "abc" in text
        assert "2 of 10 recordings are shorter" in text
        assert "Memory at start and end: 1,024 and 3 MiB." in text


@pytest.mark.usefixtures("undrawn")
def test_baselines_are_arms(tmp_path):
    results = made_up({"base": 3.2, "kept": 3.0, "reset": 3.1, "lora": 3.15})
    difference = main_difference(results)
    assert difference is not None
    assert difference["minus"] == "reset"
    assert [row[1] for row in arm_table(results)][-1] == "lora: no memory"
    write_results(results, tmp_path / "out", "a run")
    assert "lora: no memory" in (tmp_path / "out/report.md").read_text()


@pytest.mark.usefixtures("undrawn")
def test_the_page_needs_nothing_but_itself(tmp_path):
    results = made_up(ALL) | {"facts": {"command": "<b>a & b</b>"}, "failed": []}
    write_results(results, tmp_path / "out", "a <run>")
    page = (tmp_path / "out/report.html").read_text()
    assert 'name="viewport"' in page
    assert page.count('src="data:image/svg+xml;base64,') == 5
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert "&lt;b&gt;a &amp; b&lt;/b&gt;" in page
    assert "a &lt;run&gt;" in page
    assert page.count("<table>") == page.count("</table>") == 5
    assert "does NOT earn" in page or "earns its claim" in page


@pytest.mark.usefixtures("undrawn")
def test_what_failed_is_in_every_form(tmp_path):
    failed = [{"name": "5/book", "reason": "part_1.flac: not readable as audio"}]
    results = made_up(ALL) | {"failed": failed}
    write_results(results, tmp_path / "out", "x")
    for name in ("report.md", "report.html", "results.json"):
        assert "part_1.flac: not readable as audio" in (tmp_path / "out" / name).read_text(), name


@pytest.mark.parametrize("frames", [6, 300])
def test_pictures_of_short_and_long_recordings(tmp_path, frames):
    files = write_results(made_up(ALL | {"wide": 4.0}, frames=frames), tmp_path, "a run")
    assert all(file.stat().st_size > 1000 for file in files)
    for name in ("nll_by_position", "differences", "scalar", "arms"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()[:500]
    assert json.loads((tmp_path / "results.json").read_text())["window_frames"] == WINDOW


@pytest.mark.usefixtures("undrawn")
def test_results_are_not_overwritten(tmp_path):
    out = tmp_path / "runs/eval/x"
    assert next_folder(None, out) == out
    write_results(made_up({"kept": 3.0, "reset": 3.1}), out, "x")
    assert next_folder(None, out) == out.with_name("x-2")
    with pytest.raises(UserError, match="holds results already"):
        next_folder(str(out), out)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a folder that can be written"):
        next_folder(str(tmp_path / "file/x"), out)
