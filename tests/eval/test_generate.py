"""Free running: the measures by hand, the model left alone, the command from options to files."""

import json
import math
import re
import types
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from eval.generate.__main__ import main
from eval.generate.measures import (
    JUDGED,
    MEASURES,
    counted_entropy,
    distinct,
    level,
    measured,
    said_before,
    silence,
    summarise,
)
from eval.generate.report import verdict
from eval.generate.running import Plan, Run, entropy_of, run_free
from moshi_ttt.base import find_base, load_base
from moshi_ttt.checkpoint import load, save_checkpoint
from moshi_ttt.engine import Engine, Sampling
from moshi_ttt.errors import run_cli
from moshi_ttt.frame_times import FrameTimes
from moshi_ttt.lora import add_lora
from moshi_ttt.states import attach_ttt_states, save_ttt_states
from tests.small import (
    CARD,
    CONTEXT,
    small_base,
    small_hybrid,
    small_lm,
    small_mimi,
    small_tokenizer,
)

TEXT_CARD = small_tokenizer().vocab_size()


# -- measures ---------------------------------------------------------------------------------


def test_repetition_by_hand():
    codes = np.array([1, 2, 1, 2, 1, 2])
    assert [distinct(codes, n) for n in (1, 2, 3, 4)] == [2 / 6, 2 / 5, 2 / 4, 2 / 3]
    assert distinct(np.full(10, 7), 2) == 1 / 9
    assert distinct(np.arange(10) * 1000, 4) == 1.0
    assert math.isnan(distinct(codes[:2], 3))


def test_what_was_said_before_by_hand():
    earlier, now = np.array([5, 6, 7]), np.array([6, 7, 5, 6])
    assert said_before(now, earlier, 1) == 1.0
    assert said_before(now, earlier, 2) == 2 / 3  # 67 and 56, but 75 only across the border
    assert said_before(now, earlier, 3) == 0.0
    assert math.isnan(said_before(now, earlier, 4))  # nothing of four was said
    assert math.isnan(said_before(now, earlier[:0], 1))


def test_entropies_by_hand():
    assert counted_entropy(np.array([3, 3, 3])) == 0.0
    assert counted_entropy(np.array([1, 2, 3, 4])) == pytest.approx(math.log(4))
    logits = torch.tensor([[0.0, 0.0, 0.0, -math.inf], [math.log(3.0), 0.0, -99.0, -99.0]])
    drawn = entropy_of(logits, Sampling(temp=1.0, top_k=0))
    p = 0.75
    wanted = [math.log(3), -p * math.log(p) - (1 - p) * math.log(1 - p)]
    assert drawn.tolist() == pytest.approx(wanted)
    assert entropy_of(logits, Sampling(temp=1.0, top_k=1)).tolist() == [0.0, 0.0]
    assert float(entropy_of(logits, Sampling(temp=1e9, top_k=2))[1]) == pytest.approx(math.log(2))


def test_level_and_silence_by_hand():
    assert level(np.full(5, 0.01)) == pytest.approx(-20.0)  # an RMS of 0.1
    assert level(np.array([0.02, 0.0])) == pytest.approx(-20.0)
    assert level(np.zeros(5)) == -math.inf
    assert silence(np.array([0.0, 0.9e-5, 1.1e-5, 1.0])) == 0.5  # -50 dBFS is a power of 1e-5


def plan_of(frames=24, bin_frames=6, streams=2, heard=0, **sampling):
    return Plan(frames, bin_frames, 20, streams, 3, Sampling(**sampling), 0.1 * torch.randn(heard))


def made_run(codes, power, entropy=2.0, norms=None):
    codes = np.asarray(codes)
    shape = codes.shape
    norms = {} if norms is None else norms
    return Run(
        codes, np.broadcast_to(entropy, shape), np.broadcast_to(power, shape), norms, norms,
        FrameTimes(), [],
    )  # fmt: skip


def test_measures_by_bin_say_what_is_missing():
    run = made_run(
        [[-2, 1, 2, 3, 1, 2, 3, 1, 2, 3]],
        [[0.01] * 4 + [0.0] * 4 + [0.01] * 2],
        norms={"a": np.array([[3.0, 6.0]]), "b": np.array([[4.0, 8.0]])},
    )
    found = measured(run, plan_of(10, 4, 1))
    values = {name: v["streams"][0] for name, v in found["measures"].items()}
    assert values["distinct_1"][:2] == [1.0, 3 / 4]
    assert values["before_2"][1] == 2 / 3  # 31 is new
    assert values["silence"][:2] == [0.0, 1.0]
    assert values["level_dbfs"][0] == pytest.approx(-20.0)
    assert math.isnan(values["level_dbfs"][1])
    assert values["state_norm"][:2] == [5.0, 10.0]
    assert all(math.isnan(v[2]) for v in values.values())
    why = found["missing"]
    assert why["level_dbfs"]["2"] == "stream 1 is digital silence: minus infinity"
    assert why["before_4"]["1"] == "nothing was said before"
    assert {why[name]["3"] for name in MEASURES} == {"only 2 of 4 frames"}


# -- verdict ----------------------------------------------------------------------------------


def judged(streams, fall, frames=16):
    """Two arms, of which one's entropy falls by that much a bin."""
    plan, rng = plan_of(frames, 4, streams), np.random.default_rng(0)
    arms = {}
    for name in ("base", "kept"):
        bins = np.repeat(np.arange(frames // 4), 4)
        slope = bins * (fall if name == "kept" else 0.0)
        noise = 0.001 * bins * (-1.0) ** np.arange(streams)[:, None]  # half rise, half fall
        codes = rng.integers(0, 9, (streams, frames))
        arms[name] = {"label": f"the {name}", "broken": "", "files": []}
        arms[name] |= measured(made_run(codes, 0.01, 3.0 - slope + noise), plan)
    return summarise(arms, plan, "base")


def test_a_verdict_follows_from_the_numbers():
    results = judged(8, 0.5)
    found = results["arms"]["kept"]["change"]["entropy"]
    assert found["mean"] == pytest.approx(-1.5, abs=0.02)
    assert found["first"] == pytest.approx(3.0, abs=0.02)
    assert found["low"] < found["mean"] < found["high"] < 0
    assert results["arms"]["kept"]["against"]["entropy"]["mean"] == pytest.approx(-1.5, abs=0.03)
    assert results["arms"]["base"]["against"] == {}
    said = verdict(results)
    assert "(8 streams), what may be decay: the kept: its entropy falls by 1.5 nats. " in said
    assert "Less what the base does in the same time: the kept: its entropy falls by 1.5" in said
    calm = verdict(judged(8, 0.0))
    assert "(8 streams), no decay is shown. Less what the base does" in calm
    assert "none is shown either" in calm


def test_no_verdict_where_there_is_nothing_to_judge_by():
    few = judged(2, 0.5)
    assert verdict(few) == "No verdict: 2 streams are too few to judge by; it takes 6."
    change = few["arms"]["kept"]["change"]["entropy"]
    assert math.isnan(change["low"])
    assert change["reason"] == "2 streams are too few for an interval (it takes 6)"
    assert math.isfinite(few["arms"]["kept"]["change"]["entropy"]["last"])
    one_bin = judged(8, 0.5, frames=4)
    assert verdict(one_bin).startswith("No verdict: there is one whole bin only")
    for m in JUDGED:
        change = one_bin["arms"]["kept"]["change"][m]
        assert math.isnan(change["mean"])
        assert math.isnan(change["last"])
        assert change["reason"] == "there is one whole bin only"


# -- sampling ---------------------------------------------------------------------------------


def hybrid():
    return small_hybrid(lm={"text_card": TEXT_CARD})


def talk(folder, lm=None, mode="kept", plan=None, progress=None):
    parts = (lm or hybrid(), small_mimi(), small_tokenizer(), mode, plan or plan_of())
    return run_free(*parts, folder / "voice", progress)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Where a run of nothing out of the ordinary has written, and the run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("plain")
    return folder, talk(folder)


def test_it_samples_as_the_engine_does(plain):
    folder, run = plain
    with Engine(hybrid(), small_mimi(), small_tokenizer(), rows=2, seed=3) as engine:
        said = [
            (f.tokens[:, 1], f.pcm.clone())
            for f in (engine.step(np.zeros((2, 1, 1920))) for _ in range(24))
        ]
    codes, pcm = zip(*said, strict=True)
    assert np.array_equal(run.codes, torch.stack(codes, 1).numpy())
    assert (run.entropy > 0).all()
    assert (run.entropy <= math.log(CARD)).all()
    assert len(np.unique(run.entropy)) > 40  # no copy of one number
    power = torch.stack([p.double().square().mean(1) for p in pcm], 1)
    assert np.array_equal(run.power, power.numpy())
    assert run.files == [f"{folder.name}/voice-{n}.{k}" for n in (1, 2) for k in ("flac", "txt")]
    for n in (1, 2):
        kept, rate = soundfile.read(folder / f"voice-{n}.flac", dtype="float32")
        assert rate == 24_000
        assert np.abs(kept - torch.cat(pcm, 1)[n - 1].clamp(-1, 1).numpy()).max() < 1e-4
    assert (folder / "voice-1.txt").read_text().startswith("[00:00.00]")
    assert not list(folder.glob("*.wav"))
    assert run.times.count == 24


def test_how_the_memory_is_run(tmp_path, plain):
    _, kept = plain
    reset, off = (talk(tmp_path, mode=mode) for mode in ("reset", "off"))
    assert np.array_equal(kept.entropy[:, :19], reset.entropy[:, :19])
    assert (kept.entropy[:, 19] != reset.entropy[:, 19]).all()  # position 20, the window
    assert not np.array_equal(kept.codes, off.codes)
    (name, *_) = kept.state_moved
    assert kept.state_moved[name].shape == (2, 4)
    assert (kept.state_moved[name] > 0).all()
    assert (off.state_moved[name] == 0).all()
    assert len(np.unique(off.state_norm[name])) == 1
    whole = replace(plan_of(bin_frames=24), window=24)  # reset one frame before the bin ends
    assert (talk(tmp_path, mode="reset", plan=whole).state_moved[name] > 0).all()
    stock = talk(tmp_path, small_lm(text_card=TEXT_CARD).eval())
    assert stock.state_norm == {}
    with pytest.raises(ValueError, match="has no memory"):
        talk(tmp_path, small_lm(text_card=TEXT_CARD).eval(), "reset")
    with pytest.raises(ValueError, match="'shuffled'"):
        talk(tmp_path, mode="shuffled")


def test_the_user_is_heard(tmp_path, plain):
    _, silent = plain
    spoken = talk(tmp_path, plan=plan_of(heard=30_000))
    assert not np.array_equal(silent.entropy, spoken.entropy)


class Stop(Exception):
    pass


def test_the_model_is_left_as_it_was_and_a_killed_run_keeps_what_it_has(tmp_path, plain):
    lm, count = hybrid(), 0
    attach_ttt_states(lm, 2)

    def stop(frames):
        nonlocal count
        count += frames
        if count == 15:
            raise Stop

    before = save_ttt_states(lm)
    weights = {k: v.clone() for k, v in lm.state_dict().items()}
    torch.manual_seed(5)
    random = torch.get_rng_state()
    with pytest.raises(Stop):
        talk(tmp_path, lm, "off", progress=stop)
    wav, _ = soundfile.read(tmp_path / "voice-2.wav")
    assert len(wav) == 15 * 1920
    assert "\n[00:00.96]" in (tmp_path / "voice-2.txt").read_text()
    first = talk(tmp_path, lm)
    assert torch.equal(torch.get_rng_state(), random)
    after = save_ttt_states(lm)
    for name, block in before.items():
        assert block["lanes"]
        assert block["streaming"] is None is after[name]["streaming"]
        assert all(torch.equal(t, after[name]["lanes"][k]) for k, t in block["lanes"].items())
    assert all(torch.equal(v, weights[k]) for k, v in lm.state_dict().items())
    assert not lm.is_streaming
    assert not lm._streaming_detached
    assert not lm.linears[0]._forward_hooks
    folder, fresh = plain
    for kind in ("codes", "entropy", "power"):
        assert np.array_equal(getattr(first, kind), getattr(fresh, kind))
    for file in ("voice-1.flac", "voice-2.txt"):
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()
    other = talk(tmp_path, plan=replace(plan_of(), seed=4))
    assert not np.array_equal(first.codes, other.codes)


# -- the command ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, a checkpoint with memory and one without, and a recording."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("work")
    base = find_base(small_base(folder / "base"))
    checkpoint = folder / "runs/a/checkpoints/checkpoint_000001"
    save_checkpoint(hybrid(), checkpoint, base)
    lm = load_base(base, dtype=torch.float32)
    add_lora(lm, 2, 2.0)
    save_checkpoint(lm, folder / "lora", base)
    soundfile.write(folder / "heard.wav", 0.1 * np.random.default_rng(0).random(20_000), 24_000)
    return types.SimpleNamespace(root=folder, base=base, checkpoint=checkpoint)


@pytest.fixture
def work(made, monkeypatch):
    monkeypatch.chdir(made.root)
    return made


SHORT = ("--checkpoint", "runs/a/checkpoints/checkpoint_000001", "--device", "cpu")
SHORT += ("--minutes", "0.02", "--bin-seconds", "0.32")


def test_end_to_end(work, capsys, tmp_path):
    out = tmp_path / "out"
    options = (*SHORT, "--streams", "2", "--baseline", "lora", "--prompt", "heard.wav")
    main([*options, "--out", str(out)])
    said = capsys.readouterr().out
    assert "5 arms, 2 streams of 15 frames" in said
    assert "No verdict: 2 streams are too few to judge by" in said
    results = json.loads((out / "results.json").read_text())
    assert list(results["arms"]) == ["base", "lora", "kept", "reset", "off"]
    assert results["reference"] == "lora"
    assert (results["window_frames"], results["heard_frames"]) == (CONTEXT, 11)
    assert results["quarter"] == {"first": [1, 1], "last": [3, 3]}
    kept = results["arms"]["kept"]
    assert kept["measures"]["entropy"]["mean"][3] is None
    assert kept["missing"]["entropy"] == {"4": "only 3 of 4 frames"}
    assert set(kept["blocks"]["state_moved"]) == {
        f"transformer.layers.{i}.seq_modeling_block" for i in (0, 1)
    }
    assert results["arms"]["base"]["missing"]["state_norm"]["all"] == "the model has no memory"
    assert results["arms"]["off"]["measures"]["state_moved"]["mean"][:3] == [0.0, 0.0, 0.0]
    assert "shuffled" not in said
    for file in kept["files"]:
        assert (out / file).stat().st_size > 0
    page = (out / "report.html").read_text()
    assert 'href="voices/kept-2.flac"' in page
    assert "data:audio" not in page
    assert "| memory kept |" in (out / "report.md").read_text()
    assert (out / "generate.png").stat().st_size > 10_000


@pytest.mark.usefixtures("undrawn")
def test_a_checkpoint_without_memory(work, capsys, tmp_path):
    out = str(tmp_path / "o")
    main(["--checkpoint", "lora", *SHORT[2:], "--streams", "1", "--temp", "1", "--out", out])
    results = json.loads((tmp_path / "o/results.json").read_text())
    assert list(results["arms"]) == ["base", "trained"]
    assert results["sampling"]["temp"] == 1.0
    same = [arm["measures"]["entropy"]["mean"] for arm in results["arms"].values()]
    assert same[0] == same[1]  # lora_B is 0


def test_a_model_that_is_broken(work, capsys, tmp_path):
    loaded = load(work.checkpoint)
    with torch.no_grad():
        for layer in loaded.lm.transformer.layers:
            layer.seq_modeling_block.gate.fill_(float("nan"))
    save_checkpoint(loaded.lm, tmp_path / "broken", loaded.base)
    out = tmp_path / "o"
    with pytest.raises(SystemExit) as stopped:
        main(["--checkpoint", str(tmp_path / "broken"), *SHORT[2:], "--out", str(out)])
    assert stopped.value.code == 1
    results = json.loads((out / "results.json").read_text())
    why = "the model's output is no number at frame 0, stream 1"
    assert results["arms"]["kept"]["missing"]["entropy"]["1"] == why
    assert results["arms"]["kept"]["missing"]["state_norm"] == dict.fromkeys("1234", why)
    assert results["arms"]["kept"]["measures"]["entropy"]["mean"] == [None] * 4
    assert results["arms"]["base"]["measures"]["entropy"]["mean"][0] > 0
    assert "NOT JUDGED, their output broke: memory kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--minutes", "0"], "argument --minutes: must be positive, got 0"),
        (["--minutes", "0.004"], "--minutes 0.004 is shorter than a bin of 0.32 s"),
        (["--streams", "0"], "argument --streams: must be at least 1, got 0"),
        (["--temp", "0"], "argument --temp: must be positive, got 0"),
        (["--top-k", "-1"], "top_k must not be negative, got -1"),
        (["--prompt", "nowhere.wav"], "nowhere.wav: no such audio file"),
        (["--prompt", "heard.wav", "--minutes", "0.01"], "heard.wav is as long as --minutes 0.01"),
        (["--checkpoint", "nowhere"], "nowhere is not a checkpoint"),
        (["--baseline", "base"], "--baseline base is not a checkpoint"),
        (["--out", "heard.wav"], "is not a folder that can be written"),
        (["--arms", "base"], "unrecognized arguments: --arms"),
        (["--device", "tpu"], "device"),
    ],
)
def test_bad_input_is_one_line_and_status_2(work, capsys, options, line):
    before = sorted(work.root.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: main([*SHORT, *options]))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(line, error), error
    assert sorted(work.root.rglob("*")) == before
