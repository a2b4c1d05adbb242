"""A sound card for tests: a PulseAudio of their own, in a folder of its own, for one process tree.

Its loudspeaker can be recorded, and what is played to the sink `room` comes from its microphone. A
user's own PulseAudio is not touched: server, state and configuration are found by environment
variables, which only those who are started with `VirtualSound.env` see.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

APT = "apt-get install pulseaudio pulseaudio-utils libportaudio2 libasound2-plugins"
RATE = 24_000
RAW = ["--raw", "--format=float32le", f"--rate={RATE}", "--channels=1"]
SINK = f"format=float32le rate={RATE} channels=1 channel_map=mono norewinds=1"
# norewinds: a null sink that rewinds renders two seconds ahead while it is idle, and a client of
# ALSA's plugin then waits for as long before its first block is taken.
SCRIPT = f"""
load-module module-native-protocol-unix socket={{socket}} auth-anonymous=1
load-module module-null-sink sink_name=loudspeaker {SINK}
load-module module-null-sink sink_name=room {SINK}
load-module module-remap-source master=room.monitor source_name=microphone
set-default-sink loudspeaker
set-default-source microphone
"""
ASOUNDRC = """
pcm.!default { type pulse
  hint { show on
  description "PulseAudio" } }
ctl.!default { type pulse }
"""


def raised(process: int = 0) -> None:
    """Real time for a process, where the system allows it, whatever else it is busy with."""
    try:
        os.sched_setscheduler(process, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        return


def missing() -> str | None:
    """Why there can be no virtual sound here; None if there can."""
    if any(shutil.which(name) is None for name in ("pulseaudio", "pactl", "pacat", "parec")):
        return f"no PulseAudio: {APT}"
    try:
        import sounddevice
    except OSError:
        return f"no PortAudio: {APT}"
    del sounddevice
    return None


class VirtualSound:
    """A running server.

    Args:
        folder: for its socket, state and the home of those who use it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("PULSE_", "ALSA_"))}
        for name in ("HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "PULSE_RUNTIME_PATH"):
            self.env[name] = str(folder)
        self.env |= {"PULSE_STATE_PATH": str(folder), "PULSE_SERVER": f"unix:{folder}/native"}
        (folder / "script.pa").write_text(SCRIPT.format(socket=folder / "native"))
        (folder / ".asoundrc").write_text(ASOUNDRC)
        self.log = folder / "pulseaudio.log"
        self.server: subprocess.Popen[bytes] | None = None

    @contextmanager
    def running(self) -> Iterator[VirtualSound]:
        options = ["-n", f"--file={self.folder}/script.pa", "--daemonize=no"]
        options += ["--exit-idle-time=-1", "--use-pid-file=no", "--disallow-exit=yes"]
        env = {k: v for k, v in self.env.items() if k != "PULSE_SERVER"}
        with self.log.open("wb") as log:
            self.server = subprocess.Popen(
                ["pulseaudio", *options], env=env, stdout=log, stderr=log
            )
        try:
            until(lambda: self.control("get-default-source") == "microphone", 20, self.log)
            raised(self.server.pid)  # it has given up what it was started with
            yield self
        finally:
            self.server.kill()
            self.server.wait()

    def control(self, *words: str) -> str:
        """What `pactl` says; empty if it fails."""
        done = subprocess.run(["pactl", *words], env=self.env, capture_output=True, text=True)
        return done.stdout.strip()

    def load(self, module: str, *words: str) -> str:
        """Load a module; its number."""
        number = self.control("load-module", module, *" ".join(words).split())
        assert number, f"{module} cannot be loaded"
        return number

    @contextmanager
    def speaking(self, samples: np.ndarray) -> Iterator[subprocess.Popen[bytes]]:
        """Play `samples [N]` into the microphone while the body runs; yields the player."""
        path = self.folder / "spoken.raw"
        path.write_bytes(np.asarray(samples, np.float32).tobytes())
        command = ["pacat", "--playback", "--device=room", "--latency-msec=300", *RAW, str(path)]
        with _started(command, env=self.env) as player:
            yield player

    @contextmanager
    def recording(self, sink: str = "loudspeaker") -> Iterator[Path]:
        """Record what a sink plays while the body runs, to a file of float32."""
        path = self.folder / f"{sink}.raw"
        command = ["parec", f"--device={sink}.monitor", "--latency-msec=50", *RAW]
        with path.open("wb") as out, _started(command, env=self.env, stdout=out):
            until(lambda: path.stat().st_size > 0, 20, self.log)
            yield path


@contextmanager
def _started(command: list[str], **options) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, preexec_fn=raised, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def virtual_sound() -> Iterator[VirtualSound]:
    """A server of one's own; skips the test, with what to install, where there can be none."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with ExitStack() as stack:
        # not pytest's folder: the name of a socket has at most 107 characters
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sound")))
        yield stack.enter_context(VirtualSound(folder).running())


def until(come, seconds: float, log: Path | None = None) -> None:
    """Wait until `come()`; fails, with the end of `log`, after so many seconds."""
    deadline = time.monotonic() + seconds
    while not come():
        if time.monotonic() > deadline:
            raise AssertionError(
                f"has not come in {seconds} s" + (f":\n{log.read_text()[-2000:]}" if log else "")
            )
        time.sleep(0.02)
