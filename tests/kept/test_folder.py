"""Memories kept by name: no name leaves the folder, and it is its owner's."""

import os
import stat
import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moshi_ttt.errors import UserError
from moshi_ttt.kept import Kept, check_name
from tests.kept.keeping import content, saved


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
