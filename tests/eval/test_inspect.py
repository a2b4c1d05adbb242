"""A recording through the memories' window: readings, picture, report, and mistakes."""

import json
import math

import numpy as np
import pytest
import soundfile
import torch

from eval.heat import PANELS, heat_map
from eval.inspect import grids_of, listen, main
from eval.perplexity import score
from eval.scores import Item
from moshi_ttt.base import find_base, load_base
from moshi_ttt.checkpoint import save_checkpoint
from moshi_ttt.errors import UserError
from moshi_ttt.monitor import CallMonitor
from moshi_ttt.states import ttt_blocks
from tests.small import small_base, small_hybrid, small_tokenizer
from tests.test_hybrid import codes_for

LAYER = "transformer.layers.1"


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A base, checkpoints with a memory and without, and sounds."""
    folder = tmp_path_factory.mktemp("inspect")
    base = find_base(small_base(folder / "base"))
    card = small_tokenizer().vocab_size()
    lm = small_hybrid(lm={"text_card": card}, memory="lact")
    save_checkpoint(lm, folder / "lact", base)
    with torch.no_grad():
        next(iter(ttt_blocks(lm).values())).gate.zero_()
    save_checkpoint(lm, folder / "closed", base)
    save_checkpoint(load_base(base, dtype=torch.float32), folder / "plain", base)
    forgetful = small_hybrid(lm={"text_card": card}, persistent_states=False)
    save_checkpoint(forgetful, folder / "forgetful", base)
    rng = np.random.default_rng(0)
    for name, seconds, channels in (("two", 17.0, 2), ("one", 12.0, 1), ("short", 0.5, 1)):
        sound = 0.1 * rng.standard_normal((int(seconds * 24_000), channels))
        soundfile.write(folder / f"{name}.wav", sound, 24_000)
    return folder


def run(there, checkpoint, audio, out, *more):
    main([
        str(there / checkpoint), str(there / audio), "--out", str(out), "--device", "cpu",
        "--codes-cache", str(there / "codes"), *more,
    ])  # fmt: skip
    return json.loads((out / "results.json").read_text())


def test_readings_are_those_of_the_calls_and_scoring_does_not_notice():
    lm = small_hybrid()
    codes = codes_for(lm, 1, 50)[0]
    item = Item("a", "a", codes)
    (want,) = score(lm, [codes], frames_per_call=8)
    readings = listen(lm, item, 8, 2)
    (after,) = score(lm, [codes], frames_per_call=8)
    assert torch.equal(want.values.nan_to_num(), after.values.nan_to_num())
    assert [r.at for r in readings] == [0, 16, 32]  # 48: two frames are left, and no write
    looking, other = CallMonitor(lm), []
    with looking.watching():
        score(
            lm, [codes], frames_per_call=8,
            progress=lambda _: (other.append(looking.reading(0)), looking.arm()),
        )  # fmt: skip
    for reading, one in zip(readings, other[::2], strict=False):
        for name, values in reading.layers.items():
            for key, value in values.items():
                assert np.array_equal(value, one.layers[name][key], equal_nan=True), key
    moved = [r.layers[LAYER]["moved"][0] for r in readings]
    assert 0 < moved[0] < moved[1]


def test_grids_have_a_row_a_head_and_the_gain_is_before_minus_after():
    lm = small_hybrid(memory="atlas")
    readings = listen(lm, Item("a", "a", codes_for(lm, 1, 32)[0]), 8, 1)
    grids, rows = grids_of(readings)
    assert {"loss_before", "gain", "momentum", "alpha", "share"} <= set(grids)
    assert not {"ns_min", "m"} & set(grids)
    assert rows["gain"] == [f"layer {i} head {h}" for i in (0, 1) for h in (0, 1)]
    assert rows["share"] == ["layer 0", "layer 1"]
    values = readings[2].layers[LAYER]
    assert grids["gain"][3, 2] == values["loss_before"][1] - values["loss_after"][1]
    assert grids["share"][1, 2] == values["memory"] / values["attention"]
    assert grids["gain"].shape == (4, 4)


@pytest.mark.parametrize(("layers", "heads"), [(2, 2), (3, 8)])
def test_any_numbers_can_be_drawn(layers, heads):
    names = [f"layer {4 * i} head {h}" for i in range(layers) for h in range(heads)]
    grids = {name: np.full((layers * heads, 3), 0.5) for name in PANELS}
    grids["gain"][0] = math.nan
    grids["update"][:] = 0.0
    figure = heat_map(
        grids, dict.fromkeys(PANELS, names), [0, 8, 16, 20], np.full((2, 22), -80.0), "x"
    )
    figure.draw_without_rendering()
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert len(panels) == len(PANELS) + 1
    assert len({axes.get_xlim() for axes in panels}) == 1
    labels = [label.get_text() for label in panels[0].get_yticklabels()]
    assert labels == (names if len(names) <= 12 else ["layer 0", "layer 4", "layer 8"])


@pytest.mark.parametrize("audio", ["one.wav", "two.wav"])
def test_the_command(there, tmp_path, capsys, audio):
    out = tmp_path / "out"
    found = run(there, "lact", audio, out)
    said = capsys.readouterr()
    assert "nothing wrong was found" in said.out
    assert "listening" in said.err
    frames = {"one.wav": 150, "two.wav": 213}[audio]
    assert [r["frame"] for r in found["readings"]] == list(range(0, frames, 100))
    assert found["findings"] == []
    assert (out / "memory.png").stat().st_size > 10_000
    text = (out / "report.md").read_text()
    assert "Nothing wrong was found" in text
    assert "![heads over time](memory.png)" in text
    rows = [line for line in text.splitlines() if line.startswith("| layer")]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1


@pytest.mark.usefixtures("undrawn")
def test_the_left_channel_is_moshi_and_the_right_one_the_user(there, tmp_path):
    mono, rate = soundfile.read(there / "one.wav", always_2d=True)
    silence = np.zeros_like(mono)
    soundfile.write(there / "left.wav", np.concatenate([mono, silence], 1), rate)
    soundfile.write(there / "right.wav", np.concatenate([silence, mono], 1), rate)
    left, right = (run(there, "lact", f"{x}.wav", tmp_path / x) for x in ("left", "right"))
    moshi = run(there, "lact", "one.wav", tmp_path / "moshi", "--side", "moshi")
    user = run(there, "lact", "one.wav", tmp_path / "user")
    assert left["readings"] == moshi["readings"] != user["readings"] == right["readings"]
    assert (left["facts"]["side"], user["facts"]["side"]) == ("left Moshi, right user", "user")
    with pytest.raises(
        UserError, match=r"--side user is of a mono recording; .*left\.wav is stereo"
    ):
        run(there, "lact", "left.wav", tmp_path / "out", "--side", "user")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("undrawn")
def test_what_is_wrong_is_said_and_readings_may_be_denser(there, tmp_path, capsys):
    found = run(there, "closed", "one.wav", tmp_path / "out", "--every", "0.1")
    assert [r["frame"] for r in found["readings"]] == [0, 100]  # not within a call
    sentence = "layer 0: the gate is closed, mean |tanh(gate)| = 0: nothing is heard"
    assert found["findings"] == [sentence]
    assert sentence in capsys.readouterr().out
    assert sentence in (tmp_path / "out" / "report.md").read_text()


def test_bad_input_is_refused_before_anything_is_written(there, tmp_path):
    out = tmp_path / "out"
    (there / "text.wav").write_text("words")
    for checkpoint, audio, match in (
        ("lact", "none.wav", "none.wav"),
        ("lact", "text.wav", "text.wav: not readable as audio"),
        ("lact", "short.wav", r"short.wav is 0.50 s long: two writes of this memory take 0.64 s"),
        ("plain", "one.wav", "has no memory that keeps a state"),
        ("forgetful", "one.wav", "has no memory that keeps a state"),
        ("nothing", "one.wav", "nothing is not a checkpoint"),
    ):
        with pytest.raises(UserError, match=match):
            run(there, checkpoint, audio, out)
    with pytest.raises(UserError, match="--every"):
        main(["a", "b", "--every", "0"])
    assert not out.exists()
