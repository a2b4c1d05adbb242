"""`--user`: a conversation starts with a person's memory and saves it, whatever ends it."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
import soundfile
import torch

from moshi_ttt import stream
from moshi_ttt.base import find_base
from moshi_ttt.checkpoint import save_checkpoint
from moshi_ttt.devices import Device
from moshi_ttt.engine import Engine
from moshi_ttt.errors import UserError
from moshi_ttt.kept import Kept, Person, person
from moshi_ttt.saved_memory import SavedMemory, _memory, read_memory
from moshi_ttt.stream import main
from tests.small import small_base, small_hybrid, small_mimi, small_tokenizer

CARD = small_tokenizer().vocab_size()
FRAME, FRAMES, WAIT = 1920, 9, 60.0


def hybrid(**config):
    return small_hybrid(lm={"text_card": CARD}, **config)


def engine_for():
    return Engine(hybrid(), small_mimi(), small_tokenizer(), seed=0)


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """A base, checkpoints of two chunk sizes, and recordings."""
    folder = tmp_path_factory.mktemp("talking")
    base = find_base(small_base(folder / "base"))
    checkpoints = [
        str(save_checkpoint(hybrid(chunk_size=c), folder / f"{c}/checkpoint_000001", base))
        for c in (4, 5)
    ]
    rng = np.random.default_rng(0)
    for name, frames in (("short", FRAMES), ("long", 3000)):
        samples = 0.1 * rng.standard_normal(frames * FRAME)
        soundfile.write(folder / f"{name}.wav", samples, 24_000)
    return types.SimpleNamespace(folder=folder, base=str(folder / "base"), checkpoints=checkpoints)


@pytest.fixture
def here(tmp_path, talking, capsys):
    """Talks to a file, in a folder of one's own."""

    def argv(*more, source="short"):
        files = ["--file", str(talking.folder / f"{source}.wav"), "--out", str(out)]
        where = [] if "--user" not in more else ["--memories", str(kept.folder)]
        model = [] if "--base" in more or "--checkpoint" in more else own
        return [*files, *model, *where, *more]

    def talk(*more):
        """What was said, and the lines about it."""
        main(argv(*more))
        return out.read_bytes(), capsys.readouterr().err.splitlines()

    def refused(*more):
        out.unlink(missing_ok=True)
        with pytest.raises(SystemExit) as left:
            main(argv(*more))
        assert left.value.code == 2
        assert not out.exists()
        err = capsys.readouterr().err
        assert err.count("error: ") == 1
        return err.splitlines()[-1]

    own = ["--checkpoint", talking.checkpoints[0]]
    kept, out = Kept(tmp_path / "kept"), tmp_path / "out.wav"
    return types.SimpleNamespace(kept=kept, argv=argv, talk=talk, refused=refused)


def content(kept):
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in kept.folder.iterdir()}


def test_it_remembers(here, tmp_path):
    plain, _ = here.talk()
    first, said = here.talk("--user", "Anna")
    assert first == plain
    assert "anna is new here" in said
    assert f"saved anna: 0.0 minutes of memory, in {here.kept.path('anna')}" in said
    assert list(content(here.kept)) == ["anna.safetensors"]
    frames = here.kept.find("anna").frames
    here.kept.export("anna", tmp_path / "mine")
    wanted, _ = here.talk("--load-memory", str(tmp_path / "mine"))
    again, said = here.talk("--user", "anna")
    assert again == wanted != plain
    assert any(line.startswith("anna has 0.0 minutes of memory, saved 20") for line in said)
    assert here.kept.find("anna").frames == frames + FRAMES
    assert here.talk("--user", "carl")[0] == plain
    assert sorted(content(here.kept)) == ["anna.safetensors", "carl.safetensors"]


def test_incognito_writes_nothing(here):
    plain, said = here.talk("--incognito", "--user", "anna")
    assert "anna is new here; incognito: nothing will be kept" in said
    assert "incognito: anna is still new here" in said
    assert not here.kept.folder.exists()
    here.talk("--user", "anna")
    before = content(here.kept)
    known, said = here.talk("--incognito", "--user", "anna")
    assert known != plain
    assert "incognito: anna is as it was" in said
    with here.kept.taken("anna"):
        assert here.talk("--incognito", "--user", "anna")[0] == known
    assert content(here.kept) == before
    assert "incognito: nothing is kept" in here.talk("--incognito")[1]


def test_a_memory_brought_along_is_for_somebody_new(here, tmp_path):
    here.talk("--user", "anna")
    mine = str(tmp_path / "mine")
    here.kept.export("anna", mine)
    second, _ = here.talk("--user", "anna")
    brought, said = here.talk("--user", "carl", "--load-memory", mine)
    assert brought == second
    assert "carl is new here" in said
    anna, carl = (read_memory(here.kept.path(name)) for name in ("anna", "carl"))
    assert all(torch.equal(anna.tensors[k], carl.tensors[k]) for k in anna.tensors)
    before = content(here.kept)
    assert "anna has 0.0 minutes of memory" in here.refused("--user", "anna", "--load-memory", mine)
    assert content(here.kept) == before


def test_another_model_is_refused_and_the_memory_stays(here, talking):
    here.talk("--user", "anna")
    before = content(here.kept)
    for more in ([], ["--incognito"]):
        why = here.refused("--user", "anna", "--checkpoint", talking.checkpoints[1], *more)
        assert "chunk_size 4, not 5; it stays as it is: take another --user" in why
    for name in ("anna", "carl"):
        why = here.refused("--user", name, "--base", talking.base)
        assert "the model has no memory" in why
    assert content(here.kept) == before


def test_a_name_is_in_one_conversation(here):
    with here.kept.taken("anna"):
        why = here.refused("--user", "Anna")
        assert "anna is in another conversation: end that one, or take another name" in why
        assert f"(process {os.getpid()} on " in why
        here.talk("--user", "carl")


def test_a_broken_memory_is_refused(here):
    here.talk("--user", "anna")
    here.kept.path("anna").write_bytes(here.kept.path("anna").read_bytes()[:500])
    before = content(here.kept)
    assert "or is broken" in here.refused("--user", "anna")
    assert content(here.kept) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--user", "../anna"], "has '/' in it"),
        (["--user", ""], "must not be empty"),
        (["--user", "a", "--load-session", "x"], "leave out --user"),
        (["--incognito", "--save-memory", "x"], "--incognito keeps nothing"),
        (["--incognito", "--save-session", "x"], "--incognito keeps nothing"),
        (["--memories", "x"], "--memories goes with --user"),
    ],
)
def test_what_contradicts_itself(here, options, words):
    assert words in here.refused(*options)
    assert not here.kept.folder.exists()


# -- whatever ends it -----------------------------------------------------------------------------

HASTY = """
import sys
from moshi_ttt import stream
from moshi_ttt.kept import person
person.SAVE_SECONDS = 0.1
stream.main(sys.argv[1:])
"""


def once_saved(kept, then, over=lambda: False):
    """Call `then` when a conversation has saved 20 frames or more; True if it came to that."""
    end = time.monotonic() + WAIT
    while time.monotonic() < end and not over():
        found = kept.find("anna")
        if found is not None and found.frames >= 20:
            then()
            return True
        time.sleep(0.02)
    return False


def test_what_was_learned_outlives_a_killed_process(here):
    command = [sys.executable, "-c", HASTY, *here.argv("--user", "anna", source="long")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as talk:
        try:
            assert once_saved(here.kept, talk.kill, lambda: talk.poll() is not None)
        finally:
            talk.kill()
    assert here.kept.find("anna").frames >= 20
    with here.kept.taken("anna"):  # the name is free, and what a killed save left is gone
        assert sorted(content(here.kept)) == [".anna.lock", "anna.safetensors"]


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_an_ended_conversation_is_saved_first(here, capsys, monkeypatch, ending):
    monkeypatch.setattr(person, "SAVE_SECONDS", 0.1)
    over = threading.Event()
    ends = threading.Thread(
        target=once_saved, args=(here.kept, lambda: os.kill(os.getpid(), ending), over.is_set)
    )
    ends.start()
    with pytest.raises(SystemExit) as left:
        main(here.argv("--user", "anna", source="long"))
    over.set()
    ends.join()
    err = capsys.readouterr().err
    assert left.value.code == 128 + ending
    heard = int(err.partition(" frames (")[0].rpartition("\n")[2])
    assert here.kept.find("anna").frames == heard + 1  # and its initial tokens
    assert "\nsaved anna: " in err
    assert list(content(here.kept)) == ["anna.safetensors"]


@pytest.mark.parametrize("disk", ["free", "full"])
def test_what_was_learned_before_the_sound_card_failed(here, monkeypatch, capsys, disk):
    def breaks(engine, card, reporter, each, stop):
        for frame in torch.zeros(FRAMES, FRAME):
            each(engine.step(frame))
        raise UserError("the sound card broke")

    monkeypatch.setattr(stream, "converse", breaks)
    monkeypatch.setattr(stream, "choose_sound", lambda *_: [Device(0, "a device", 24_000, 1)] * 2)
    if disk == "full":
        monkeypatch.setattr(SavedMemory, "write", full)
    argv = here.argv("--user", "anna")
    with pytest.raises(SystemExit) as left:
        main(["--mic", *argv[4:]])
    assert left.value.code == 2
    err = capsys.readouterr().err
    if disk == "full":
        assert err.endswith(
            "error: the sound card broke; and anna could not be saved: no space left on the "
            "device: [Errno 28] No space left on device; nothing is kept\n"
        )
        assert here.kept.find("anna") is None
    else:
        assert "\nsaved anna: " in err
        assert err.endswith("error: the sound card broke\n")
        assert here.kept.find("anna").frames >= FRAMES


def full(self, path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_said_and_the_conversation_goes_on(here, monkeypatch, capsys):
    here.talk("--user", "anna")
    before = content(here.kept)
    monkeypatch.setattr(person, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(SavedMemory, "write", full)
    with Person(here.kept, "anna") as anna, engine_for() as engine:
        anna.begin(engine)
        for n, frame in enumerate(torch.zeros(5, FRAME)):
            engine.step(frame)
            anna.frame()
            end = time.monotonic() + WAIT
            while anna._keeper._work is None or not anna._keeper._work.done():
                assert time.monotonic() < end, n
                time.sleep(0.001)
        with pytest.raises(UserError, match=r"^anna could not be saved: no space left"):
            anna.end()
    said = capsys.readouterr().err
    assert said.count("anna could not be saved: no space left on the device: ") == 5
    assert said.count("anna stays as saved 20") == 5
    assert content(here.kept) == before


@pytest.mark.parametrize("known", [False, True])
def test_a_memory_that_broke_does_not_take_the_place_of_a_good_one(here, capsys, known):
    if known:
        here.talk("--user", "anna")
        before = content(here.kept)
    with Person(here.kept, "anna") as anna, engine_for() as engine:
        anna.begin(engine)
        for n, frame in enumerate(0.1 * torch.randn(12, FRAME)):
            engine.step(frame)
            anna.frame()
            if n == 5:
                for tensor in _memory(engine, 0).values():
                    if tensor.is_floating_point():
                        tensor.fill_(float("inf"))
        assert engine.diverged[0] == 1
        anna.end()
    said = capsys.readouterr().err
    if known:
        assert content(here.kept) == before
        assert "the memory was no longer finite and started over: no more of this" in said
        assert "anna stays as saved 20" in said
    else:
        assert "saved anna" in said  # what it has learned since, as nothing better is there


def test_nothing_heard_nothing_saved(here, capsys):
    with Person(here.kept, "anna") as anna, engine_for() as engine:
        anna.begin(engine)
        anna.end()
    assert "no frame was heard: nothing was saved for anna" in capsys.readouterr().err
    assert content(here.kept) == {}
    shutil.rmtree(here.kept.folder)
    with Person(here.kept, "anna"), pytest.raises(ZeroDivisionError):
        raise ZeroDivisionError
    assert content(here.kept) == {}
