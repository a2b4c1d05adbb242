"""Memories kept by name: no name leaves the folder, no save is half done, no two have one name."""

import errno
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
import unicodedata

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moshi_ttt.errors import UserError, run_cli
from moshi_ttt.kept import Keeper, Kept, check_name
from moshi_ttt.kept.__main__ import main
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


# -- names ----------------------------------------------------------------------------------------


@given(st.text(max_size=80) | st.text("./\\\0aA-_ \u0301\u0345ßİ~*\n", max_size=12))
def test_no_name_leaves_the_folder(name):
    kept = Kept("/a/b")
    try:
        mine = check_name(name)
    except UserError:
        with pytest.raises(UserError) as refused:
            kept.path(name)
        assert len(str(refused.value).splitlines()) == 1
        return
    path = kept.path(name)
    assert os.path.normpath(path) == str(path)
    assert path.parent == kept.folder
    assert path.name == f"{mine}.safetensors"
    assert not path.name.startswith(".")
    assert len(os.fsencode(path.name)) <= 212
    assert check_name(mine) == mine
    assert check_name(name.upper()) == check_name(name.upper().lower())
    assert check_name(unicodedata.normalize("NFD", name)) == mine
    assert not {*mine} & {*"/\\\0\n~*"}


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("Anna", "anna"),
        (" Anna   Maria ", "anna maria"),
        ("Jose\u0301", "josé"),
        ("STRASSE", "straße".casefold()),
        ("\u03b1\u0345\u0301", "\u03ac\u03b9"),  # one letter, its marks in another order
        ("हिन्दी", "हिन्दी"),
        ("李雷", "李雷"),
        ("a.b-c_9", "a.b-c_9"),
        ("x" * 64, "x" * 64),
        ("李" * 64, "李" * 64),
    ],
)
def test_a_name_has_one_form(name, form):
    assert check_name(name) == form


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "must not be empty"),
        ("  ", "must not be empty"),
        ("..", "must begin with a letter or a digit"),
        (".anna.lock", "must begin with a letter or a digit"),
        ("-x", "must begin with a letter or a digit"),
        ("../anna", "has '/' in it"),
        ("/etc/passwd", "has '/' in it"),
        ("a\0", r"has '\x00' in it"),
        ("a\nb", r"has '\n' in it"),
        ("a\u200bb", r"has '\u200b' in it"),
        ("\ud800", r"has '\ud800' in it"),
        ("x" * 65, "65 characters"),
        ("x" * 100_000, "100000 characters"),
        ("𠀀" * 51, "204 bytes"),
    ],
)
def test_what_is_no_name(name, words):
    with pytest.raises(UserError) as refused:
        check_name(name)
    assert words in str(refused.value)
    assert len(str(refused.value)) < 250


# -- the folder -----------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path):
    return Kept(tmp_path / "new" / "kept")


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o377])
def test_it_is_its_owners_alone(kept, umask, tmp_path):
    before = os.umask(umask)
    try:
        kept.write("Anna", saved(7))
        kept.export("anna", tmp_path / "mine")
    finally:
        os.umask(before)
    assert stat.S_IMODE(kept.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(kept.path("anna").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) & 0o077 == 0
    assert content(kept.folder) == ["anna.safetensors"]


def test_a_folder_that_is_there_keeps_its_mode(tmp_path):
    tmp_path.chmod(0o755)
    Kept(tmp_path).write("anna", saved(7))
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "anna.safetensors").stat().st_mode) == 0o600


def test_where_the_folder_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.delenv("MOSHI_TTT_MEMORIES", raising=False)
    assert Kept().folder == tmp_path / ".local/share/moshi_ttt/memories"
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert str(Kept().folder) == "/data/moshi_ttt/memories"
    monkeypatch.setenv("MOSHI_TTT_MEMORIES", "~/m")
    assert Kept().folder == tmp_path / "m"
    assert Kept("/x").folder == Kept("/x/").folder != Kept().folder


def test_what_is_found_listed_exported_and_deleted(kept, tmp_path):
    assert list(kept.list()) == []
    assert kept.find("anna") is None
    began = time.time()
    kept.write("Carl", saved(1))
    kept.write("anna", saved(750))
    anna = kept.find("ANNA")
    assert (anna.name, anna.frames, anna.seconds, anna.broken) == ("anna", 750, 60.0, None)
    assert anna.size == anna.path.stat().st_size > 80
    assert began - 1 < anna.saved < time.time() + 1
    assert [m.name for m in kept.list()] == ["anna", "carl"]
    kept.export("anna", tmp_path / "mine")
    assert (tmp_path / "mine").read_bytes() == anna.path.read_bytes()
    with pytest.raises(UserError, match=r"mine exists; --force writes over it"):
        kept.export("carl", tmp_path / "mine")
    assert (tmp_path / "mine").read_bytes() == anna.path.read_bytes()
    kept.export("carl", tmp_path / "mine", force=True)
    assert (tmp_path / "mine").read_bytes() == kept.path("carl").read_bytes()
    assert kept.delete("anna") == anna
    assert [m.name for m in kept.list()] == ["carl"]
    for call in (kept.get, kept.delete, lambda name: kept.export(name, tmp_path / "no")):
        with pytest.raises(UserError, match=r"nothing is kept for 'anna' in .*; there is: carl$"):
            call("anna")
    assert content(tmp_path) == ["mine", "new", "new/kept", "new/kept/carl.safetensors"]


def test_a_link_is_refused_and_its_target_stays(kept, tmp_path):
    target = tmp_path / "target.safetensors"
    kept.write("carl", saved(3))
    kept.path("carl").rename(target)
    (kept.folder / "anna.safetensors").symlink_to(target)
    (kept.folder / "bob.safetensors").mkdir()
    before = target.read_bytes()
    for name, words in (("anna", "is a symbolic link"), ("bob", "is not a file")):
        for call in (
            kept.path, kept.find, kept.get, kept.delete,
            lambda n: kept.export(n, tmp_path / "mine"), lambda n: kept.write(n, saved(9)),
        ):  # fmt: skip
            with pytest.raises(UserError, match=words):
                call(name)
    (kept.folder / ".dora.lock").symlink_to(target)
    with pytest.raises(UserError, match="symbolic"), kept.taken("dora"):
        pass
    (kept.folder / ".dora.tmp").symlink_to(tmp_path)
    with pytest.raises(OSError, match="exists"):
        kept.write("dora", saved(9))
    assert target.read_bytes() == before
    assert list(kept.list()) == []
    assert [p.name for p in kept.strangers()] == ["anna.safetensors", "bob.safetensors"]


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        kept = Kept(folder)
        with pytest.raises(UserError, match=r"Not a directory|is not a folder"):
            kept.list()
        with pytest.raises(UserError, match=r"Not a directory|is not a folder"), kept.taken("anna"):
            pass


# -- one conversation a name ----------------------------------------------------------------------


def test_two_conversations_cannot_have_one_name(kept):
    with kept.taken("Anna"):
        with pytest.raises(UserError, match=rf"another conversation.*\(process {os.getpid()} on "):
            with kept.taken("anna"):
                pass
        with kept.taken("carl"):
            pass
        kept.write("anna", saved(1))
        with pytest.raises(UserError, match="another conversation"):
            kept.delete("anna")
        assert kept.find("anna").frames == 1
    with kept.taken("anna"):
        pass
    assert content(kept.folder) == ["anna.safetensors"]


def test_a_full_disk_does_not_keep_a_memory_from_being_deleted(kept, monkeypatch):
    kept.write("anna", saved(1))

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("moshi_ttt.files.socket.gethostname", full)
    kept.delete("anna")
    assert content(kept.folder) == []


def test_deleting_takes_along_what_a_killed_process_left(kept):
    with pytest.raises(UserError, match="nothing is kept for 'anna'"):
        kept.delete("anna")
    assert not kept.folder.exists()
    kept.write("anna", saved(1))
    (kept.folder / ".anna.tmp").mkdir()
    (kept.folder / ".anna.tmp" / "memory").write_text("half")
    (kept.folder / ".anna.lock").write_text("process 1 on a machine")
    kept.delete("anna")
    assert content(kept.folder) == []


HOLD = """
import sys, time
from moshi_ttt.kept import Kept
with Kept(sys.argv[1]).taken("anna"):
    print("taken", flush=True)
    time.sleep(600)
"""


def test_a_killed_process_lets_go(kept):
    command = [sys.executable, "-c", HOLD, str(kept.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "taken\n"
            with pytest.raises(UserError, match=f"process {other.pid} on "), kept.taken("anna"):
                pass
        finally:
            other.kill()
    with kept.taken("anna"):
        pass
    assert content(kept.folder) == []


def test_many_threads_have_a_name_one_at_a_time(kept):
    inside, most, turns = 0, 0, 0

    def visit():
        nonlocal inside, most, turns
        while turns < 200:
            try:
                with kept.taken("anna"):
                    inside += 1
                    most = max(most, inside)
                    time.sleep(0)
                    inside -= 1
                    turns += 1
            except UserError:
                continue

    threads = [threading.Thread(target=visit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert (most, inside) == (1, 0)
    assert turns >= 200


# -- saving ---------------------------------------------------------------------------------------

SAVE = """
import sys
from pathlib import Path
from moshi_ttt.kept import Keeper, Kept
from tests.test_kept import saved
kept = Kept(sys.argv[1])
with kept.taken("anna"):
    keeper, n = Keeper(kept, "anna"), 0
    while True:
        n += 1
        keeper.offer(saved(n, size=300_000))
        if n == 1:
            while keeper.saved_at is None and keeper.error is None: pass
            print("saved", flush=True)
"""


def test_killed_at_any_moment_the_file_is_whole(kept):
    left, numbers, rng = [], set(), random.Random(0)
    while len(left) < 2 or (not any(left) and len(left) < 8):
        command = [sys.executable, "-c", SAVE, str(kept.folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
            try:
                assert other.stdout.readline() == "saved\n"
                time.sleep(rng.uniform(0.02, 0.1))
            finally:
                other.send_signal(signal.SIGKILL)
        left.append((kept.folder / ".anna.tmp").exists())
        values = load_file(kept.path("anna"))["a/fast.w"].unique()
        assert len(values) == 1
        assert int(values) == kept.find("anna").frames
        numbers.add(int(values))
        with kept.taken("anna"):
            assert content(kept.folder) == [".anna.lock", "anna.safetensors"]
    assert any(left)  # some were killed in the middle of a save
    assert max(numbers) > 1


class Other(SavedMemory):
    """One that does something else before it writes."""

    def __init__(self, frames, first):
        like = saved(frames)
        super().__init__(like.tensors, like.about)
        object.__setattr__(self, "first", first)

    def write(self, path):
        self.first(path)
        super().write(path)


def test_the_newest_wins_and_nobody_waits(kept):
    gate, began, told = threading.Event(), [], []

    def slow(n):
        return Other(n, lambda _: began.append(n) or gate.wait(WAIT))

    keeper = Keeper(kept, "Anna", lambda: told.append(keeper.frames))
    keeper.offer(slow(1))
    until(lambda: began == [1])
    start = time.monotonic()
    for n in range(2, 500):
        keeper.offer(slow(n))
    assert time.monotonic() - start < WAIT / 2
    assert began == [1]
    assert keeper.saved_at is None
    gate.set()
    until(lambda: told == [1, 499])
    keeper.close(saved(500))
    assert began == [1, 499]
    assert told == [1, 499, 500]
    assert kept.find("anna").frames == keeper.frames == 500
    assert time.time() - keeper.saved_at < WAIT
    assert keeper.error is None


def full(frames):
    def write(path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    return Other(frames, write)


def broken(frames):
    def write(path):
        raise RuntimeError("nobody foresaw this")

    return Other(frames, write)


def test_a_full_disk_leaves_the_old_one_and_the_conversation_goes_on(kept):
    told = []
    keeper = Keeper(kept, "anna", lambda: told.append(keeper.error))
    keeper.offer(saved(1))
    until(lambda: len(told) == 1)
    keeper.offer(full(2))
    until(lambda: len(told) == 2)
    assert told[0] is None
    assert "no space left on the device" in told[1]
    assert kept.find("anna").frames == keeper.frames == 1
    assert content(kept.folder) == ["anna.safetensors"]
    keeper.offer(saved(3))
    until(lambda: len(told) == 3)
    assert keeper.error is None
    keeper.close(full(4))
    assert "no space left" in keeper.error
    assert kept.find("anna").frames == 3


def test_an_error_that_nobody_foresaw_is_not_kept_quiet(kept):
    keeper = Keeper(kept, "anna")
    with pytest.raises(RuntimeError, match="nobody foresaw"):
        keeper.close(broken(1))
    keeper = Keeper(kept, "anna")
    keeper.offer(broken(1))
    until(lambda: keeper._work.done())
    with pytest.raises(RuntimeError, match="nobody foresaw"):
        keeper.offer(saved(2))
    with pytest.raises(RuntimeError, match="nobody foresaw"):
        keeper.close()


# -- the command line -----------------------------------------------------------------------------


def call(capsys, *argv):
    """Exit status, stdout and stderr."""
    status = 0
    try:
        run_cli(lambda: main(list(argv)))
    except SystemExit as left:
        status = left.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_commands(kept, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MOSHI_TTT_MEMORIES", str(kept.folder))
    assert call(capsys, "list") == (0, f"nothing is kept in {kept.folder}\n", "")
    assert not kept.folder.exists()
    kept.write("anna", saved(9000))
    kept.write("李 雷", saved(75))
    kept.path("broken").write_text("no")
    for name, header in {"header": "{", "kind": "[1]", "model": '{"format": 1, "rows": 1}'}.items():
        save_file({"a/fast.pos": torch.tensor([1])}, kept.path(name), {"moshi_ttt.memory": header})
    about = {"moshi_ttt.memory": json.dumps(ABOUT)}
    save_file({"a/fast.pos": torch.tensor([1.0, 2.0])}, kept.path("position"), about)
    for name in ("header", "kind", "model", "position"):
        assert kept.get(name).broken, name  # and the others can still be listed
        kept.delete(name)
    (kept.folder / "Anna.safetensors").write_text("")
    os.utime(kept.path("anna"), (1e9, 1e9))
    status, out, _ = call(capsys, "list")
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(1e9))
    assert status == 0
    assert out.splitlines()[:2] == [
        "name     minutes  saved                  MiB",
        f"anna        12.0  {when}      0.00",
    ]
    assert "\nbroken    broken  2" in out
    assert "\n李 雷          0.1  2" in out
    assert "broken.safetensors is broken: " in out
    assert "Anna.safetensors is nobody's" in out
    mine = str(tmp_path / "mine")
    assert call(capsys, "export", "Anna", mine)[0] == 0
    status, out, err = call(capsys, "export", "Anna", mine)
    assert (status, out) == (2, "")
    assert err == f"error: {mine} exists; --force writes over it\n"
    status, out, _ = call(capsys, "export", "Anna", mine, "--force")
    assert out.startswith(f"exported anna (12.0 minutes of memory, saved {when}) to {mine}")
    assert "is broken" in call(capsys, "export", "broken", str(tmp_path / "no"))[2]
    assert call(capsys, "delete", "broken")[1].startswith("deleted broken (a broken memory, ")
    status, out, _ = call(capsys, "delete", "anna")
    assert out == f"deleted anna (12.0 minutes of memory, saved {when}) from {kept.folder}\n"
    status, out, err = call(capsys, "delete", "anna")
    assert status == 2
    assert err.endswith("; there is: 李 雷\n")
    assert len(err.splitlines()) == 1
    other = str(tmp_path / "other")
    assert call(capsys, "list", "--memories", other)[1] == f"nothing is kept in {other}\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "required: COMMAND"),
        (["lits"], "invalid choice: 'lits'"),
        (["delete"], "required: NAME"),
        (["delete", "../x"], "has '/' in it"),
        (["export", "anna"], "required: FILE"),
    ],
)
def test_mistakes_are_one_line(kept, capsys, monkeypatch, argv, words):
    monkeypatch.setenv("MOSHI_TTT_MEMORIES", str(kept.folder))
    status, out, err = call(capsys, *argv)
    assert (status, out) == (2, "")
    assert words in err
    assert len(err.splitlines()) == 1
