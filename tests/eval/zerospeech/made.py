"""Small sets in the published forms, and the command on them."""

import csv

import numpy as np
import soundfile

from eval.zerospeech.__main__ import main

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


def run(task, data, *options):
    main(["--task", task, "--data", str(data), "--encode-workers", "1", "--device", "cpu",
          *map(str, options)])  # fmt: skip


CONFIG = {"n_q": 16, "dep_q": 8}
