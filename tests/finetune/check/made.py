"""Made conversations: noise in syllables where somebody speaks, a low floor elsewhere."""

import json

import numpy as np
import soundfile

RATE = 16_000
SECONDS = 8.0
LEFT = [(0.5, 2.0), (4.0, 5.5)]
RIGHT = [(2.3, 3.7), (6.0, 7.5)]


def voice(turns, seconds=SECONDS, seed=0, rate=RATE, level=0.1):
    """One side `[N]`, speaking in its turns (start, end)."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * rate)) / rate
    loud = sum(((a <= t) & (t < b)).astype(float) for a, b in turns) if turns else 0 * t
    syllables = 0.15 + np.abs(np.sin(2 * np.pi * 2 * t))
    floor = 1e-4 * rng.standard_normal(len(t))
    return loud * syllables * level * rng.standard_normal(len(t)) + floor


def dialogue(seed=0, **kwargs):
    """Two sides that take turns, `[N, 2]`."""
    return np.stack(
        [voice(LEFT, seed=2 * seed, **kwargs), voice(RIGHT, seed=2 * seed + 1, **kwargs)], 1
    )


def words(turns=LEFT, speaker="SPEAKER_MAIN"):
    """Alignments with a word every 0.25 s of the turns."""
    starts = [a + 0.25 * k for a, b in turns for k in range(int((b - a) / 0.25))]
    return [[f"w{i}", [s, s + 0.2], speaker] for i, s in enumerate(starts)]


def write(folder, name, samples, alignments=None, rate=RATE, **kwargs):
    """An audio file, and its transcript if there is one; returns its line of a manifest."""
    path = folder / name
    soundfile.write(path, samples, rate, **kwargs)
    if alignments is not None:
        path.with_suffix(".json").write_text(json.dumps({"alignments": alignments}))
    return {"path": name, "duration": len(samples) / rate}


def manifest(folder, *lines, name="m.jsonl"):
    """A manifest of entries, or of raw text."""
    path = folder / name
    text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
    path.write_text(text, encoding="utf-8")
    return path
