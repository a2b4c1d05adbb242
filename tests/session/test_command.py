"""Sessions and memories through the command line."""

import os
import subprocess
import sys
import types

import numpy as np
import pytest
import soundfile

from moshi_ttt.base import find_base
from moshi_ttt.checkpoint import save_checkpoint
from moshi_ttt.frames import FRAME
from moshi_ttt.memory import MEMORIES
from moshi_ttt.stream import main
from tests.small import small_base
from tests.stream.streams import hybrid


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talking")
    base = find_base(small_base(folder / "base"))
    out = save_checkpoint(hybrid(), folder / "checkpoint_000001", base)
    rng = np.random.default_rng(0)
    samples = 0.1 * rng.standard_normal(17 * FRAME + 555)
    for name, part in {
        "all": samples,
        "1": samples[: 7 * FRAME],
        "2": samples[7 * FRAME :],
    }.items():
        soundfile.write(folder / f"{name}.wav", part, 24_000, subtype="FLOAT")
    return types.SimpleNamespace(root=folder, checkpoint=str(out))


def test_a_file_cut_in_two_is_the_whole(talking, tmp_path, capsys):
    """Sampled, and the second half in a process of its own."""
    kept, how = str(tmp_path / "kept"), ["--seed", "7", "--temp", "1.1"]

    def argv(name, *more):
        files = [
            "--file",
            str(talking.root / f"{name}.wav"),
            "--out",
            str(tmp_path / f"{name}.wav"),
        ]
        return [*files, "--checkpoint", talking.checkpoint, *more]

    main(argv("all", *how))
    whole_text = capsys.readouterr().out
    main(argv("1", *how, "--save-session", kept))
    first_text = capsys.readouterr().out
    environment = {k: v for k, v in os.environ.items() if k != "NO_TORCH_COMPILE"}
    command = [sys.executable, "-m", "moshi_ttt.stream", *argv("2", "--load-session", kept)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert first_text.rstrip("\n") + done.stdout == whole_text
    whole, first, second = (
        soundfile.read(tmp_path / f"{name}.wav", dtype="int16")[0] for name in ("all", "1", "2")
    )
    assert len(whole) == 17 * FRAME + 555
    assert np.array_equal(np.concatenate([first, second]), whole)
    assert whole.std() > 30


@pytest.mark.parametrize("family", list(MEMORIES))
def test_a_kept_memory_through_the_command_line(talking, tmp_path, capsys, family):
    base = find_base(talking.root / "base")
    checkpoint = save_checkpoint(hybrid(memory=family), tmp_path / "checkpoint_000001", base)

    def argv(*more):
        files = ["--file", str(talking.root / "1.wav"), "--out", str(tmp_path / "out.wav")]
        return [*files, "--checkpoint", str(checkpoint), *more]

    main(argv("--save-memory", str(tmp_path / "kept")))
    before = (tmp_path / "out.wav").read_bytes()
    assert f"saved {tmp_path / 'kept'}" in capsys.readouterr().err
    main(argv("--load-memory", str(tmp_path / "kept")))
    assert (tmp_path / "out.wav").read_bytes() != before


def test_a_session_can_go_on_with_another_seed(talking, tmp_path):
    def voice(name, *more):
        out = tmp_path / "out.wav"
        files = ["--file", str(talking.root / f"{name}.wav"), "--out", str(out)]
        main([*files, "--checkpoint", talking.checkpoint, *more])
        return out.read_bytes()

    kept = str(tmp_path / "kept")
    voice("1", "--save-session", kept)
    first = voice("1", "--load-session", kept)
    assert voice("1", "--load-session", kept) == first
    other = voice("1", "--load-session", kept, "--seed", "8")
    assert other != first
    assert voice("1", "--load-session", kept, "--seed", "8") == other
