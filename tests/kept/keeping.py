"""What the tests of kept memories have in common."""

import time

import torch

from moshi_ttt.saved_memory import SavedMemory

WAIT = 20.0
ABOUT = {"format": 1, "rows": 1, "ttt": None, "model": {}}


def saved(frames, size=10):
    """A memory that has lived through so many frames, and holds nothing but their number."""
    tensors = {
        "a/fast.w": torch.full((1, size), float(frames)),
        "a/fast.pos": torch.tensor([frames]),
    }
    return SavedMemory(tensors, ABOUT)


def content(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def until(condition):
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)
