"""Says what it hears, through PortAudio, for some seconds: tests only.

python -m tests.echo_machine SECONDS RATE CHANNELS
"""

import sys
import time
from dataclasses import replace

import numpy as np

from moshi_ttt.devices import choose_sound
from moshi_ttt.frames import FRAME
from moshi_ttt.sound import SoundCard, sound_running

if __name__ == "__main__":
    seconds, rate, channels = map(int, sys.argv[1:])
    card = SoundCard(*(replace(d, rate=rate, channels=channels) for d in choose_sound()))
    heard, end = np.zeros(FRAME, np.float32), time.monotonic() + seconds
    with sound_running(card) as buffers_ms:
        sys.stderr.write(f"delay {card.delay_ms + buffers_ms:.0f} ms\n")
        sys.stderr.flush()
        while time.monotonic() < end:
            if card.hear(heard, timeout=0.1):
                card.said.put(heard)
        card.ended = True
    sys.stderr.write(card.report() + "\n")
