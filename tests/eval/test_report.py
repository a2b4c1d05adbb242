import numpy as np
import pytest

from eval.output import next_folder, write_results
from eval.report import (
    arm_table,
    as_markdown,
    as_text,
    main_difference,
    notes,
    range_table,
    render,
    verdict,
)
from eval.scores import KINDS, Item, Scores
from eval.summary import summarise
from moshi_ttt.errors import UserError
from tests.eval.tiny_lm import make_codes

WINDOW = 10


def made_up(arms, count=8, frames=60, spread=0.02):
    """Results in which arm `a` has the mean NLL `arms[a]` beyond the window, and 3.0 within."""
    rng = np.random.default_rng(0)
    items = [Item(f"r{i}", f"s{i}", make_codes(frames)[0]) for i in range(count)]
    scores = {}
    for name, mean in arms.items():
        scores[name] = Scores(ms_per_frame=[1.0, 2.0])
        for kind in KINDS:
            for _ in items:
                nll = np.full(frames, mean)
                nll[:WINDOW] = 3.0
                nll[:] = np.nan if kind == "text" else nll
                scores[name].nll[kind].append(nll + rng.normal(0, spread, frames))
        if name == "kept":
            scores[name].state_norm = {i.name: {"b": 2.0} for i in items}
            scores[name].state_moved = {i.name: {"b": 1.0} for i in items}
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
    arms = {row[0]: row for row in arm_table(results)}
    assert arms["memory kept"][-1] == ""
    assert float(arms["stock base"][2]) == pytest.approx(np.exp(3.2), rel=0.01)
    assert arms["stock base"][4] == "-"


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (3.0, "the memory that is kept predicts codebook 0 better than the one reset every window"),
        (3.2, "the memory that is kept predicts codebook 0 WORSE than the one reset every window"),
        (3.1, "no difference is shown between the memory that is kept and the one reset"),
    ],
)
def test_the_verdict_follows_from_the_numbers(kept, said):
    assert said in verdict(made_up({"kept": kept, "reset": 3.1}))


def test_no_verdict_without_what_it_takes():
    few = verdict(made_up({"kept": 3.0, "reset": 3.1}, count=5))
    assert few.startswith("No verdict: ")
    assert "5 speakers are too few to judge by; it takes 6" in few
    short = verdict(made_up({"kept": 3.0, "reset": 3.1}, frames=30))
    assert short.startswith("No verdict: ")
    assert "no recording reaches frame 40: the longest has 30" in short
    assert verdict(made_up({"trained": 3.0})) == "No verdict: there is nothing to compare with."
    assert "the trained model predicts codebook 0 better than the stock base" in verdict(
        made_up({"base": 3.1, "trained": 3.0})
    )


def test_what_is_missing_is_said():
    results = made_up({"base": 3.0, "kept": 3.0, "reset": 3.1}, frames=30)
    assert notes(results) == [
        "codebook0, codebooks1_7 from 2x-4x, 1x-4x: "
        "no recording reaches frame 40: the longest has 30",
        "codebook0, codebooks1_7 from 4x-end: no recording reaches frame 41: the longest has 30",
        "text: no transcript",
    ]
    assert range_table(results)[4][-1] == "-"
    assert "Not there: codebook0" in render(results, as_text)


def test_baselines_are_arms(tmp_path):
    results = made_up({"base": 3.2, "kept": 3.0, "reset": 3.1, "lora-only": 3.15})
    difference = main_difference(results)
    assert difference is not None
    assert difference["minus"] == "reset"
    assert [row[0] for row in arm_table(results)][-1] == "lora-only"
    files = write_results(results, tmp_path / "out", "a run")
    assert all(file.stat().st_size > 1000 for file in files)
    assert "lora-only" in files[0].read_text()


def test_pictures_of_short_and_long_recordings(tmp_path):
    for frames in (6, 60, 300):
        results = made_up({"base": 3.2, "kept": 3.0, "reset": 3.1}, frames=frames)
        picture = write_results(results, tmp_path / str(frames), "a run")[1]
        assert picture.read_bytes().startswith(b"\x89PNG")


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
