"""`python -m moshi_ttt.stream`, and all that its engine hears and says in a folder: tests only.

python -m tests.telling_stream FOLDER --mic ...
"""

import sys
from pathlib import Path

import numpy as np

from moshi_ttt.engine import Engine
from moshi_ttt.stream import main

step = Engine.step
heard, said = [], []  # in memory: a disk may take longer than a frame


def telling(engine, pcm, mask=None):
    frame = step(engine, pcm, mask)
    heard.append(np.array(pcm, np.float32))
    said.append(frame.pcm[0].numpy().copy())
    return frame


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    Engine.step = telling
    try:
        main(sys.argv[2:])
    finally:
        np.concatenate(heard).tofile(folder / "heard.raw")
        np.concatenate(said).tofile(folder / "said.raw")
