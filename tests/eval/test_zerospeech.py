"""The spoken-language sets: their formats, who wins a pair, and the command, on sets made here."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from eval.perplexity import score
from eval.zerospeech.__main__ import main
from eval.zerospeech.nll import clip_codes, clip_nll, scored_rows
from eval.zerospeech.report import render, summarise, verdict
from eval.zerospeech.sets import Pair, read_pairs
from finetune.data.codes import CodesCache
from moshi_ttt.base import find_base, load_base
from moshi_ttt.checkpoint import save_checkpoint
from moshi_ttt.config import TTTConfig
from moshi_ttt.errors import UserError, run_cli
from moshi_ttt.hybrid import splice
from moshi_ttt.lora import add_lora
from tests.small import randomise_memories, small_base, small_hybrid, small_lm, small_mimi

LEXICAL = "id,filename,voice,frequency,word,phones,length,correct".split(",")
SYNTACTIC = "id,filename,voice,type,subtype,transcription,correct".split(",")
FREQUENCIES = [0, 1, 7, 20, 100, 4, 250]
TYPES = ["agreement", "binding", "ellipsis"]
STORY = "a1b2-{:02d}"


def sound(path, seed, seconds=0.4, channels=1, rate=16_000):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).normal(0, 0.1, (int(seconds * rate), channels))
    soundfile.write(path, noise, rate)


def gold(path, columns, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="x")
        writer.writeheader()
        writer.writerows(rows)


def lexical(root, items=7, voices=("A", "B"), clips=True):
    """sWUGGY as published: words first, then their non-words, which have no frequency."""
    rows = [
        {"id": i, "filename": f"w{i}{v}{c}", "voice": v, "correct": c,
         "frequency": FREQUENCIES[i] if c else ""}
        for c in (1, 0) for i in range(items) for v in voices
    ]  # fmt: skip
    gold(root / "lexical/dev/gold.csv", LEXICAL, rows)
    for seed, row in enumerate(rows if clips else ()):
        sound(root / f"lexical/dev/{row['filename']}.wav", seed, 0.2 + seed % 5 / 10)
    return root


def syntactic(root, clips=True):
    """sBLIMP as published: its ids start anew with every subtype; a transcription has commas."""
    rows = [
        {"id": i, "filename": f"s{t}{s}{i}{v}{c}.wav", "voice": v, "type": t, "subtype": s,
         "transcription": 'so "she" said, who', "correct": c}
        for t in TYPES for s in ("one", "two") for i in range(2) for v in "AB" for c in (0, 1)
    ]  # fmt: skip
    gold(root / "syntactic/dev/gold.csv", SYNTACTIC, rows)
    for seed, row in enumerate(rows if clips else ()):
        sound(root / f"syntactic/dev/{row['filename']}", seed, 0.3)
    return root


def stories(folder, items=7, clips=True):
    for i in range(items):
        for c, label in enumerate(("correct", "incorrect")):
            path = folder / f"{2 * i + c}_{STORY.format(i)}_{label}.wav"
            folder.mkdir(parents=True, exist_ok=True)
            sound(path, 2 * i + c, 0.3 + i % 3 / 5) if clips else path.touch()
    return folder.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a base, two checkpoints of it, one of another base, and all four sets."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("work")
    base = find_base(small_base(folder / "base"))
    for name, seed in (("lora", None), ("memory", 1)):
        lm = load_base(base, dtype=torch.float32)
        add_lora(lm, 2, 2.0)
        if seed is not None:
            splice(lm, TTTConfig(layers="all", chunk_size=4, num_heads=2))
            randomise_memories(lm, seed=seed)
        save_checkpoint(lm, folder / f"runs/{name}/checkpoints/checkpoint_000010", base)
    os.utime(folder / "runs/memory/checkpoints/checkpoint_000010/consolidated/ttt.json")
    other = find_base(small_base(folder / "other", seed=1))
    lm = load_base(other, dtype=torch.float32)
    add_lora(lm, 2, 2.0)
    save_checkpoint(lm, folder / "elsewhere", other)
    lexical(folder / "zs")
    syntactic(folder / "zs")
    stories(folder / "stories/tSC")
    stories(folder / "stories/sSC")
    return folder


@pytest.fixture
def work(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


def run(task, data, *options):
    main(["--task", task, "--data", str(data), "--encode-workers", "1", "--device", "cpu",
          *map(str, options)])  # fmt: skip


# formats


@pytest.mark.parametrize("part", ["", "lexical", "lexical/dev"])
def test_words_pair_with_the_non_word_of_their_id_and_voice(tmp_path, part):
    pairs, problems = read_pairs("swuggy", lexical(tmp_path, clips=False) / part)
    assert problems == []
    assert len(pairs) == 14
    dev = tmp_path / "lexical/dev"
    assert pairs[3] == Pair(
        "1", "B", dev / "w1B1.wav", dev / "w1B0.wav", ("in vocabulary", "frequency 1-4")
    )
    groups = {pair.item: pair.groups[-1] for pair in pairs}
    assert list(groups.values()) == [
        "out of vocabulary", "frequency 1-4", "frequency 5-19", "frequency 20-99",
        "frequency 100 or more", "frequency 1-4", "frequency 100 or more",
    ]  # fmt: skip


def test_gold_beside_the_folder_of_clips(tmp_path):
    lexical(tmp_path, items=1)
    dev = tmp_path / "lexical/dev"
    (dev / "gold.csv").rename(tmp_path / "lexical/gold.csv")
    for root in (tmp_path, tmp_path / "lexical"):
        assert read_pairs("swuggy", root)[0][0].correct == dev / "w0A1.wav"


def test_no_frequency_no_bands(tmp_path):
    rows = [{"id": 1, "filename": f"w{c}", "voice": "A", "correct": c} for c in (0, 1)]
    gold(tmp_path / "gold.csv", [c for c in LEXICAL if c != "frequency"], rows)
    assert read_pairs("swuggy", tmp_path)[0][0].groups == ()


@pytest.mark.parametrize("part", ["", "syntactic", "syntactic/dev"])
def test_sentences_pair_within_their_subtype(tmp_path, part):
    pairs, problems = read_pairs("sblimp", syntactic(tmp_path, clips=False) / part)
    assert problems == []
    assert len(pairs) == 24
    assert len({pair.item for pair in pairs}) == 12
    dev = tmp_path / "syntactic/dev"
    assert pairs[1] == Pair(
        "agreement/one/0", "B", dev / "sagreementone0B1.wav", dev / "sagreementone0B0.wav",
        ("agreement",),
    )  # fmt: skip


def test_stories_pair_by_name(tmp_path):
    root = stories(tmp_path / "tSC", items=3, clips=False)
    stories(tmp_path / "sSC", items=2, clips=False)
    for data in (root, root / "tSC"):
        pairs, problems = read_pairs("tstory", data)
        assert problems == []
        assert [pair.item for pair in pairs] == [STORY.format(i) for i in range(3)]
        assert pairs[1].correct.name == "2_a1b2-01_correct.wav"
        assert pairs[1].incorrect.name == "3_a1b2-01_incorrect.wav"
    assert len(read_pairs("sstory", root)[0]) == 2
    plain = tmp_path / "plain"
    plain.mkdir()
    for label in ("correct", "incorrect"):
        (plain / f"12_{label}.wav").touch()
    assert read_pairs("sstory", plain)[0][0].item == "12"


def test_halves_alone_and_twice_are_left_out(tmp_path):
    rows = [
        {"id": i, "filename": f"w{n}", "voice": "A", "correct": c, "frequency": 1}
        for n, (i, c) in enumerate([(1, 1), (1, 0), (2, 1), (3, 1), (3, 1), (3, 0)])
    ]
    gold(tmp_path / "gold.csv", LEXICAL, rows)
    pairs, problems = read_pairs("swuggy", tmp_path)
    assert [pair.item for pair in pairs] == ["1"]
    assert problems == [
        f"{tmp_path}/gold.csv:4: 2, voice A has 1 correct and 0 incorrect clips; it takes one of "
        "each",
        f"{tmp_path}/gold.csv:7: 3, voice A has 2 correct and 1 incorrect clips; it takes one of "
        "each",
    ]
    root = stories(tmp_path / "tSC", items=2, clips=False)
    (root / "tSC/1_a1b2-00_incorrect.wav").unlink()
    (root / "tSC/notes.wav").touch()
    pairs, problems = read_pairs("tstory", root)
    assert len(pairs) == 1
    assert "notes.wav: its name does not end in" in problems[0]
    assert "a1b2-00 has 1 correct and 0 incorrect clips" in problems[1]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("id,filename\n", "has no column 'voice': sWUGGY has id, filename, voice, word, correct"),
        ("", "has no column 'id'"),
        ("id,filename,voice,word,correct\n1,a,A,x,yes\n", "gold.csv:2: correct is 'yes', not 0"),
        ("id,filename,voice,word,correct\n1,,A,x,1\n", "gold.csv:2: filename is empty"),
        ("id,filename,voice,word,correct\n", "has no clips: sWUGGY is published at zerospeech"),
        (
            "id,filename,voice,word,correct,frequency\n1,a,A,x,1,often\n",
            "gold.csv:2: frequency is 'often', not a number",
        ),
        (b"id,filename,voice,word,correct\n\xff", "gold.csv is not a csv file"),
    ],
)
def test_a_broken_gold_file(tmp_path, content, line):
    text = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "gold.csv").write_bytes(text)
    with pytest.raises(UserError, match=line):
        read_pairs("swuggy", tmp_path)


def test_one_set_is_not_taken_for_another(tmp_path):
    lexical(tmp_path, clips=False)
    syntactic(tmp_path, clips=False)
    with pytest.raises(UserError, match="has no column 'word': sWUGGY has"):
        read_pairs("swuggy", tmp_path / "syntactic/dev")
    with pytest.raises(UserError, match="has no column 'type'"):
        read_pairs("sblimp", tmp_path / "lexical/dev")
    stories(tmp_path / "stories/tSC", clips=False)
    with pytest.raises(UserError, match="has no clips: sStoryCloze is"):
        read_pairs("sstory", tmp_path / "stories")
    with pytest.raises(UserError, match="is another set's folder: sStoryCloze is"):
        read_pairs("sstory", tmp_path / "stories/tSC")
    assert len(read_pairs("tstory", tmp_path / "stories")[0]) == 7


# who wins


def hand_made():
    """Item 1: one voice right, one wrong; item 2: a tie; item 3: right; NLLs of the base."""
    p = {name: Path(name) for name in "abcdefgh"}
    pairs = [
        Pair("1", "A", p["a"], p["b"], ("in vocabulary",)),
        Pair("1", "B", p["c"], p["d"], ("in vocabulary",)),
        Pair("2", "A", p["e"], p["f"], ("out of vocabulary",)),
        Pair("3", "A", p["g"], p["h"], ("in vocabulary",)),
    ]
    base = dict(zip(p.values(), [1.0, 2.0, 3.0, 2.5, 4.0, 4.0, 0.5, 0.6], strict=True))
    return pairs, base, p


def test_voices_are_averaged_and_ties_count_half():
    pairs, base, p = hand_made()
    trained = base | {p["c"]: 2.0, p["g"]: 0.7}  # item 1 gains half a point, item 3 is lost
    results = summarise(pairs, {"base": base, "trained": trained}, {"base": "b", "trained": "t"})
    accuracy = {
        arm: {g: (found["mean"], found["n"]) for g, found in about["accuracy"].items()}
        for arm, about in results["arms"].items()
    }
    assert accuracy["base"] == {
        "all": ((0.5 + 0.5 + 1) / 3, 3),
        "in vocabulary": (0.75, 2),
        "out of vocabulary": (0.5, 1),
    }
    assert accuracy["trained"]["all"][0] == pytest.approx((1 + 0.5 + 0) / 3)
    (difference,) = results["differences"]
    assert difference["accuracy"]["all"]["mean"] == pytest.approx((0.5 + 0 - 1) / 3)
    assert difference["accuracy"]["out of vocabulary"] == {
        "mean": 0.0, "low": None, "high": None, "n": 1,
        "reason": "one item only: no interval",
    }  # fmt: skip
    assert results["pairs"][1]["nll"] == {"base": [3.0, 2.5], "trained": [2.0, 2.5]}
    assert "too few to judge by" in verdict(results)
    json.dumps(results, allow_nan=False)
    results |= {"title": "x", "scoring": "y", "left_out": [f"line {i}" for i in range(30)]}
    assert "Left out (30):\nline 0" in render(results, str)
    assert "line 19\nand 10 more" in render(results, str)


def decided(base, trained):
    """Results of as many items as there are letters; r is right, w wrong."""
    n = len(base)
    pairs = [Pair(str(i), "", Path(f"{i}c"), Path(f"{i}i")) for i in range(n)]
    nll = {
        arm: {Path(f"{i}i"): 1.0 for i in range(n)}
        | {Path(f"{i}c"): 0.0 if letter == "r" else 2.0 for i, letter in enumerate(text)}
        for arm, text in (("base", base), ("trained", trained))
    }
    labels = {"base": "stock base", "trained": "trained model"}
    return summarise(pairs, nll, labels)


@pytest.mark.parametrize(
    ("base", "trained", "said"),
    [
        ("r" * 30, "r" * 15 + "w" * 15, "The trained model COSTS accuracy: -50.0 points [-"),
        ("r" * 5 + "w" * 25, "r" * 30, "costs nothing, it gains: +83.3 points [+"),
        ("r" * 27 + "w" * 3, "r" * 27 + "w" * 3, "costs nothing: it decides all 30 items as"),
        ("r" * 28 + "w" * 2, "w" + "r" * 28 + "w", "costs nothing measurable: +0.0 points [-10.0"),
        ("rw" * 15, "wr" + "rw" * 14, "Nothing is shown: the stock base is not above chance"),
        ("rrrrr", "rrrrr", "No verdict: 5 items are too few"),
    ],
)
def test_the_verdict_follows_from_the_numbers(base, trained, said):
    assert said in verdict(decided(base, trained))


# scores


CONFIG = {"n_q": 16, "dep_q": 8}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Five clips of different lengths, a memory that has learnt nothing yet, and a cache."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(6):
        sound(folder / f"{i}.wav", i, 0.16 + 0.2 * (i % 4))
    pairs = [Pair(str(i), "", folder / f"{i}.wav", folder / f"{i + 1}.wav") for i in range(0, 6, 2)]
    return pairs, CodesCache(folder / "codes", small_mimi())


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


# the command


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
