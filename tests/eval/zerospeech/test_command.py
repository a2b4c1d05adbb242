"""Clips are scored as if alone; the command from data to report."""

import json

import numpy as np
import pytest
import soundfile
import torch

from eval.perplexity import score
from eval.zerospeech.__main__ import main
from eval.zerospeech.nll import clip_codes, clip_nll, scored_rows
from finetune.data.codes import CodesCache
from moshi_ttt.base import find_base, load_base
from moshi_ttt.checkpoint import save_checkpoint
from moshi_ttt.config import TTTConfig
from moshi_ttt.errors import UserError, run_cli
from moshi_ttt.hybrid import splice
from tests.eval.zerospeech.made import CONFIG, TYPES, lexical, run, sound
from tests.small import small_hybrid, small_lm, small_mimi


def test_a_batch_scores_each_clip_as_if_it_were_alone(clips):
    lm = small_hybrid()
    codes, broken = clip_codes(*clips, text_padding=3)
    assert broken == {}
    assert sorted(clip.shape[-1] for clip in codes.values()) == [2, 2, 5, 5, 7, 10]
    for codebooks in ("0", "all"):
        rows = scored_rows(CONFIG, "moshi", codebooks)
        seen: list[int] = []
        together, lost = clip_nll(lm, codes, rows, batch_size=4, progress=seen.append)
        assert sum(seen) == 2 + 2 + 5 + 5 + 7 + 10
        assert lost == {}
        assert together.keys() == codes.keys()
        for path, clip in codes.items():
            values = score(lm, [clip])[0].values
            alone = values[1:2] if codebooks == "0" else values[1:9]
            assert together[path] == pytest.approx(float(alone.nanmean()), abs=1e-5)
        summed, _ = clip_nll(lm, codes, rows, normalise="sum")
        for path in codes:
            n = codes[path].shape[-1]
            n += 7 * (n - 1) if codebooks == "all" else 0  # their last frames are cut by the delay
            assert summed[path] == pytest.approx(together[path] * n, rel=1e-5)
    assert len(set(together.values())) == 6


def test_the_clip_is_on_one_side_and_silence_on_the_other(clips):
    pairs, cache = clips
    codes, _ = clip_codes(pairs[:1], cache, text_padding=3)
    (clip, *_), path = codes.values(), pairs[0].correct
    silence = small_mimi().encode(torch.zeros(1, 1, 1920 * clip.shape[-1]))[0]
    assert clip[0].eq(3).all()
    assert clip[9:].equal(silence)
    user = CodesCache(cache.folder, small_mimi(), mono_side="user")
    swapped, _ = clip_codes(pairs[:1], user, text_padding=3)
    assert swapped[path][1:9].equal(silence)
    assert swapped[path][9:].equal(clip[1:9])
    with pytest.raises(UserError, match="predicts 8 of 16 codebooks, Moshi's"):
        scored_rows(CONFIG, "user")
    lm = small_lm(dep_q=16).eval()
    both = score(lm, [swapped[path]])[0].values
    found, _ = clip_nll(lm, swapped, scored_rows(CONFIG | {"dep_q": 16}, "user", "0"))
    assert found[path] == pytest.approx(float(both[9].nanmean()), abs=1e-5)


@pytest.mark.parametrize(
    ("task", "data", "items", "pairs", "groups"),
    [
        ("swuggy", "zs", 7, 14, ["all", "in vocabulary", "out of vocabulary", "frequency 1-4",
                                 "frequency 5-19", "frequency 20-99", "frequency 100 or more"]),
        ("sblimp", "zs/syntactic", 12, 24, ["all", *TYPES]),
        ("tstory", "stories", 7, 7, ["all"]),
        ("sstory", "stories/sSC", 7, 7, ["all"]),
    ],
)  # fmt: skip
def test_end_to_end(work, capsys, task, data, items, pairs, groups):
    run(task, data, "--baseline", "runs/lora/checkpoints/checkpoint_000010")
    out = work / f"runs/eval/memory-10-{task}"
    said = capsys.readouterr().out
    assert "runs/memory/checkpoints/checkpoint_000010/consolidated, the newest under runs/" in said
    assert f"{items} items, {pairs} pairs; chance is 50 %" in said
    assert "trained model with memory" in said
    assert (out / "accuracy.png").stat().st_size > 10_000
    results = json.loads((out / "results.json").read_text())
    assert results["verdict"] in said
    assert results["verdict"] in (out / "report.md").read_text()
    assert (results["items"], len(results["pairs"]), results["groups"]) == (items, pairs, groups)
    assert list(results["arms"]) == ["base", "trained", "lora-10"]
    for arm, about in results["arms"].items():
        by_item: dict[str, list[float]] = {}
        for pair in results["pairs"]:
            correct, incorrect = pair["nll"][arm]
            by_item.setdefault(pair["item"], []).append(float(correct < incorrect))
        wanted = np.mean([np.mean(voices) for voices in by_item.values()])
        found = about["accuracy"]["all"]
        assert found["mean"] == pytest.approx(wanted)
        assert found["low"] <= wanted <= found["high"]
    found = {(d["arm"], d["minus"]): d["accuracy"]["all"] for d in results["differences"]}
    lora = found["lora-10", "base"]
    assert found["trained", "lora-10"] == found["trained", "base"]
    assert (lora["mean"], lora["low"], lora["high"]) == (0, 0, 0)  # its B is 0: the base itself
    moved = [pair["nll"]["trained"][0] - pair["nll"]["base"][0] for pair in results["pairs"]]
    assert min(map(abs, moved)) > 0


def test_what_cannot_be_read_is_left_out_and_named(work, tmp_path, capsys):
    root = lexical(tmp_path / "zs")
    dev = root / "lexical/dev"
    (dev / "w0A1.wav").unlink()
    (dev / "w1A1.wav").write_bytes(b"")
    whole = (dev / "w2A0.wav").read_bytes()
    (dev / "w2A0.wav").write_bytes(whole[:-100])
    soundfile.write(dev / "w3A0.wav", np.full(4000, np.nan), 16_000, "FLOAT")  # its header is fine
    sound(dev / "w4A0.wav", 1, channels=2)
    text = (dev / "gold.csv").read_text().splitlines()
    (dev / "gold.csv").write_text("\n".join([*text, "9,lonely,A,3,x,x,x,1"]))
    with pytest.raises(SystemExit) as stopped:
        run("swuggy", root, "--out", tmp_path / "out", "--codes-cache", tmp_path / "codes")
    assert stopped.value.code == 1
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert len(results["pairs"]) == 14 - 5
    assert results["items"] == 7  # voice B is left
    for part, line in zip(
        ["9, voice A has 1 correct and 0 incorrect", "w0A1.wav: no such audio file",
         "w1A1.wav: the file is empty", "w2A0.wav: truncated", "w3A0.wav: sample 0 of channel 0",
         "w4A0.wav: 2 channels; a clip has one"],
        results["left_out"], strict=True,
    ):  # fmt: skip
        assert part in line
    said = capsys.readouterr().out
    assert "Left out (6):" in said
    assert "0, voice A: " in said

    before = {(p["item"], p["voice"]): p["nll"] for p in results["pairs"]}
    run("swuggy", lexical(tmp_path / "again"), "--max-items", "3", "--out", tmp_path / "fewer")
    fewer = json.loads((tmp_path / "fewer/results.json").read_text())
    assert fewer["items"] == 3
    for pair in fewer["pairs"]:
        if wanted := before.get((pair["item"], pair["voice"])):
            for arm, both in pair["nll"].items():
                assert both == pytest.approx(wanted[arm], abs=1e-5)


def test_nothing_usable(work, tmp_path, capsys):
    root = lexical(tmp_path / "zs", items=2, clips=False)
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: run("swuggy", root, "--out", tmp_path / "out"))
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: no pair can be scored; 8 problems, first: 0, voice A: ")
    assert line.endswith("w0A1.wav: no such audio file")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--task", "swuggy"], "--data is missing: sWUGGY is published at zerospeech.com"),
        (["--task", "tstory"], "github.com/slp-rl/SpokenStoryCloze; expected is tSC/<number>_"),
        (["--task", "sblimp", "--data", "nowhere"], "--data nowhere is no folder: sBLIMP is"),
        (["--task", "sblimp", "--data", "base"], "--data base has no gold.csv: sBLIMP is"),
        (["--task", "sstory", "--data", "base"], "--data base has no clips: sStoryCloze is"),
        (["--task", "words"], "argument --task: invalid choice: 'words'"),
        (["--data", "zs"], "the following arguments are required: --task"),
        (["--task", "swuggy", "--data", "zs", "--batch-size", "0"], "must be at least 1, got 0"),
        (["--task", "swuggy", "--data", "zs", "--side", "user"], "has no NLL: --side moshi"),
        (["--task", "swuggy", "--data", "zs", "--checkpoint", "no"], "no is not a checkpoint"),
        (["--task", "swuggy", "--data", "zs", "--baseline", "zs"], "zs is not a checkpoint"),
        (["--task", "swuggy", "--data", "zs", "--baseline", "elsewhere"], "to another base"),
        (["--task", "swuggy", "--data", "zs", "--baseline", "runs/lora/checkpoints/"
          "checkpoint_000010", "--baseline", "runs/lora/checkpoints/checkpoint_000010"],
         "names must differ"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_status_2(work, capsys, options, line):
    before = sorted(path for path in work.rglob("*") if "codes" not in path.parts)
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: main(["--device", "cpu", *options]))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert line in error
    assert sorted(path for path in work.rglob("*") if "codes" not in path.parts) == before


def test_no_checkpoint_at_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no checkpoint under runs/"):
        main(["--task", "swuggy", "--data", str(lexical(tmp_path, clips=False))])
    with pytest.raises(UserError, match="--data is missing: sWUGGY is published"):
        main(["--task", "swuggy"])


def test_a_model_that_is_broken(work, tmp_path):
    lm = load_base(find_base("base"), dtype=torch.float32)
    splice(lm, TTTConfig(layers="all", chunk_size=4, num_heads=2))
    with torch.no_grad():
        for layer in lm.transformer.layers:
            layer.seq_modeling_block.gate.fill_(float("nan"))
    save_checkpoint(lm, tmp_path / "broken", find_base("base"))
    options = ["--checkpoint", tmp_path / "broken", "--out", tmp_path / "out"]
    with pytest.raises(UserError, match=r"no pair can be scored; 14 .*: the NLL of codebook"):
        run("tstory", "stories", *options)
    assert not (tmp_path / "out").exists()


def test_a_clip_whose_nll_is_no_number_is_named(clips):
    codes, _ = clip_codes(*clips, text_padding=3)
    lm = small_lm().eval()
    path = next(iter(codes))
    with torch.no_grad():
        lm.text_emb.weight[5] = float("nan")
    odd = codes | {path: codes[path].clone().index_fill_(0, torch.tensor(0), 5)}
    found, lost = clip_nll(lm, odd, scored_rows(CONFIG, "moshi"), batch_size=6)
    assert list(lost) == [path]
    assert found.keys() == codes.keys() - {path}
    whole, _ = clip_nll(lm, codes, scored_rows(CONFIG, "moshi"))
    assert found == pytest.approx({p: whole[p] for p in found}, abs=1e-5)
