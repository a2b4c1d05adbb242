"""Manifests of what lies on disk: in which order, and what becomes of broken files."""

import json

import pytest
import soundfile

from eval.panel import read_panel
from finetune.corpora import CORPORA, prepare_corpus
from finetune.corpora.__main__ import main
from finetune.data.manifest import read_manifest
from moshi_ttt.errors import UserError
from tests.finetune.recordings import sound, words


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "ll"
    for book, chapters in [("small/11/emma", "10 2 1"), ("medium/12/emma", "1")]:
        (root / book).mkdir(parents=True)
        for chapter in chapters.split():
            path = sound(root / book / f"part_{chapter}.flac", 0.1 * int(chapter))
            if "11" in book:
                path.with_suffix(".json").write_text(json.dumps({"speaker": "11"}))
    return root


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_librilight(tree, tmp_path, capsys):
    out = tmp_path / "m.jsonl"
    main(["librilight", str(tree), str(out)])
    parts = [f"ll/small/11/emma/part_{n}.flac" for n in (1, 2, 10)]
    assert read(out) == [
        {"path": parts, "duration": 1.3, "speaker": "11"},
        {"path": "ll/medium/12/emma/part_1.flac", "duration": 0.1, "speaker": "12"},
    ]
    assert f"{out}: 2 recordings, 0.00 h" in capsys.readouterr().out
    for ours, theirs in zip(read_manifest(out), read_panel(tree), strict=True):
        assert [f.path for f in ours.files] == [f.path for f in theirs.files]
        assert ours.speaker == theirs.speaker
    elsewhere = tmp_path / "other"
    elsewhere.mkdir()
    main(["librilight", str(tree), str(elsewhere / "m.jsonl")])
    assert read(elsewhere / "m.jsonl")[1]["path"] == str(tree / "medium/12/emma/part_1.flac")
    (tree / "small/11/emma/part_2.flac").write_bytes(b"no audio")
    out.unlink()
    with pytest.raises(UserError, match="1 of 2 recordings cannot be read"):
        main(["librilight", str(tree), str(out)])
    with pytest.raises(UserError, match="no such folder"):
        main(["librilight", str(tree / "x"), str(out)])
    assert not out.exists()


def test_folder(tmp_path, capsys):
    root = tmp_path / "speech"
    for name in ("b/take10.wav", "b/take2.ogg", "a.FLAC", "b/take1.mp3"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        sound(root / name, 0.5)
    words(root / "a.json", ("hey", 0.1, 0.3))
    (root / "notes.txt").write_text("x")
    out = tmp_path / "m.jsonl"
    main(["folder", str(root), str(out)])
    names = ["speech/a.FLAC", "speech/b/take1.mp3", "speech/b/take2.ogg", "speech/b/take10.wav"]
    assert [line["path"] for line in read(out)] == names
    assert len(read_manifest(out)) == 4
    out.unlink()

    (root / "b/take2.ogg").write_bytes(b"no audio")
    soundfile.write(root / "empty.wav", [], 24_000)
    with pytest.raises(UserError, match=r"2 of 5 recordings cannot be read .*--skip-broken"):
        main(["folder", str(root), str(out)])
    assert not out.exists()
    said = capsys.readouterr().err
    assert f"broken: {root / 'b/take2.ogg'}: not readable as audio" in said
    assert f"broken: {root / 'empty.wav'}: the audio is empty" in said
    main(["folder", str(root), str(out), "--skip-broken"])
    assert [line["path"] for line in read(out)] == [names[0], names[1], names[3]]
    assert "3 recordings, 0.00 h; 2 that cannot be read left out" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["daily_talk", "embedded"])
def test_corpora_that_are_fetched_or_made(name, monkeypatch, capsys):
    called = []
    monkeypatch.setattr(f"finetune.corpora.{name}.prepare", lambda: called.append(name))
    main([name])  # the one needs a network, the other minutes
    assert called == [name]
    assert "manifests" in capsys.readouterr().out


def test_what_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/x.wav").write_bytes(b"x")
    out = str(tmp_path / "m.jsonl")
    for argv, message in [
        (["folder", str(tmp_path / "no"), out], "no such folder"),
        (["folder", str(tmp_path / "empty"), out], "no audio under it"),
        (["librilight", str(tmp_path / "empty"), out], r"no \.flac file under it"),
        (["folder", str(tmp_path / "bad"), out, "--skip-broken"], "1 of 1 recordings cannot"),
        (["folder", str(tmp_path / "bad"), str(tmp_path / "n/m.jsonl")], "does not exist"),
        (["nothing"], "invalid choice: 'nothing'"),
        ([], "required: NAME"),
    ]:
        with pytest.raises(UserError, match=message):
            main(argv)
    with pytest.raises(UserError, match=r"data\.corpus 'x' is unknown; known: embedded"):
        prepare_corpus("x")
    assert "kyutai/DailyTalkContiguous" in CORPORA
