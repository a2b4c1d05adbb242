"""A manifest of every kind of recording, in half-second pieces of noise, and its codes."""

import json

import numpy as np
import soundfile

from finetune.encode import main

FILES = {"a": (1.5, 2), "b": (0.7, 1), "c1": (0.41, 1), "c2": (0.9, 1), "c10": (0.3, 1)}
LINES = [
    {"path": "a.wav", "duration": 1.5},
    {"path": ["c1.wav", "c2.wav", "c10.wav"], "duration": 1.61, "speaker": "7"},
    {"path": "b.wav", "duration": 0.7},
]
MAIN = "SPEAKER_MAIN"


def sound(path, seconds, channels=1, seed=0):
    noise = np.random.default_rng(seed).standard_normal((round(seconds * 24_000), channels))
    soundfile.write(path, 0.1 * noise, 24_000)
    return path


def write_manifest(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def words(path, *entries):
    entries = [[word, [start, end], MAIN] for word, start, end in entries]
    path.write_text(json.dumps({"alignments": entries}))


def make(folder):
    """A stereo recording, one of three mono files, a mono one; words beside all but the last."""
    for seed, (name, (seconds, channels)) in enumerate(FILES.items()):
        sound(folder / f"{name}.wav", seconds, channels, seed)
    words(folder / "a.json", ("seven", 0.1, 0.5), ("days", 1.0, 1.3))
    words(folder / "c1.json", ("one", 0.1, 0.45))
    words(folder / "c2.json", ("two", 0.0, 0.3), ("three", 0.5, 0.8))
    words(folder / "c10.json", ("ten", 0.1, 0.3))
    write_manifest(folder / "m.jsonl", LINES)
    return folder


def one(audio, folder, name):
    """A manifest of one file."""
    line = {"path": str(audio / f"{name}.wav"), "duration": FILES[name][0]}
    return write_manifest(folder / f"{name}.jsonl", [line])


def arguments(manifest, out, base, *more):
    return [str(manifest), str(out), "--base", str(base), "--workers", "1", *more]


def encode(manifest, out, base, *more):
    main(arguments(manifest, out, base, *more))
    return out
