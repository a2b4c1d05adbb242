"""`python -m finetune.check`: report, exit status, duplicates, and what a hostile user gives."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file

from finetune.check.command import main, parse
from finetune.check.findings import KINDS
from moshi_ttt.errors import UserError
from tests.finetune.check.made import LEFT, RATE, dialogue, manifest, voice, words, write

ROOT = Path(__file__).parents[3]


def findings(*args):
    """Kinds and details of what is found, by the JSON."""
    out = Path(args[0]).parent / "out.json"
    ready = main([*map(str, args), "--json", str(out)])
    told = json.loads(out.read_text())
    assert told["ready"] == ready
    return [(f["kind"], f["detail"]) for f in told["findings"]], told


def found(*args):
    return [kind for kind, _ in findings(*args)[0]]


def test_ready(tmp_path, capsys):
    lines = [write(tmp_path, f"{i}.wav", dialogue(i), words()) for i in range(2)]
    path = manifest(tmp_path, lines[0], "", lines[1])
    assert main([str(path)])
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == (
        "manifest recordings hours mono stereo transcripts words SPEAKER_MAIN".split()
    )
    assert out[2].split()[1:] == ["2", "0.00", "0.00", "0.00", "2", "24", "100%"]
    assert out[4] == "durations     min 8.0 s, median 8.0 s, max 8.0 s"
    assert out[5].strip() == "under 10 s: 2"
    assert out[6] == "sample rates  2 at 16000 Hz"
    assert out[-1] == "ready"


def test_not_ready(tmp_path, capsys):
    good = write(tmp_path, "a.wav", dialogue(), words())
    swapped = write(tmp_path, "b.wav", dialogue(1)[:, ::-1], words())
    path = manifest(tmp_path, good, swapped, {"path": "c.wav", "duration": 1})
    assert not main([str(path), "--duration-sec", "10"])
    out = capsys.readouterr().out
    assert f"{path}:2  b.wav  in 100% of 12 words" in out
    assert KINDS["swapped channels"].advice in out
    assert f"{path}:3  c.wav" in out
    assert "8.0 s, the segment 10 s" in out
    assert out.endswith("not ready: 2 problems in 2 files (2 notes)\n")
    assert [line.split() for line in out.splitlines() if line.startswith("error ")] == [
        ["error", "file", "missing", "1"],
        ["error", "swapped", "channels", "1"],
    ]


def test_numbers_for_machines(tmp_path):
    one = write(tmp_path, "a.wav", dialogue(), words() + words(LEFT, "SPEAKER_USER"))
    other = write(tmp_path, "b.wav", voice(LEFT, 40.0))
    path = manifest(tmp_path, one, other)
    _, told = findings(path)
    s = told["summary"]
    assert s["hours"] * 3600 == pytest.approx(48)
    assert s["hours_by_channels"] == pytest.approx({"mono": 40 / 3600, "stereo": 8 / 3600})
    assert s["seconds"] == {"min": 8.0, "median": 24.0, "max": 40.0}
    assert (s["transcripts"], s["words"], s["main_share"]) == (1, 24, pytest.approx(0.5))
    assert {k: n for k, n in s["histogram"].items() if n} == {"under 10 s": 1, "from 30 s": 1}
    assert told["manifests"][str(path)] == s
    assert told["counts"] == {"no transcript": 1}
    assert told["findings"][0]["line"] == 2
    assert told["findings"][0]["severity"] == "note"


def test_long_lists_are_cut(tmp_path, capsys):
    path = manifest(tmp_path, *({"path": f"{i}.wav", "duration": 1} for i in range(25)))
    assert not main([str(path)])
    out = capsys.readouterr().out
    assert out.count("file missing") == 2
    assert ":20  19.wav" in out
    assert ":21  20.wav" not in out
    assert "... and 5 more (--all)" in out
    main([str(path), "--all"])
    assert ":25  24.wav" in capsys.readouterr().out


def test_durations(tmp_path):
    said = [8.05, 8.2, None, -1, "8", True, float("nan"), 10**400]
    one = write(tmp_path, "a.wav", dialogue(), words())
    path = manifest(tmp_path, *(one | {"duration": s} for s in said))
    told, _ = findings(path)
    off = [detail for kind, detail in told if kind == "duration"]
    assert off[0] == "is 8.2, but the audio has 8.000 s"
    assert len(off) == 7
    assert all("must be a positive number" in detail for detail in off[1:])


def test_duplicates(tmp_path):
    one = write(tmp_path, "a.wav", dialogue(), words())
    pcm, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    copy = write(tmp_path, "b.flac", pcm, words())
    other = write(tmp_path, "c.wav", dialogue(1), words())
    link = {"path": "../" + tmp_path.name + "/a.wav", "duration": 8.0}
    path = manifest(tmp_path, one, copy, other, link)
    told, _ = findings(path)
    assert told == [
        ("twice", f"the same sound as a.wav in {path}:1"),
        ("twice", f"the same file is in {path}:1"),
    ]
    held_out = manifest(tmp_path, copy, other, name="eval.jsonl")
    told, _ = findings(manifest(tmp_path, one, other), held_out)
    assert told == [
        ("in two manifests", f"the same sound as a.wav in {path}:1"),
        ("in two manifests", f"the same file is in {path}:2"),
    ]
    twice = {"path": ["c.wav", "c.wav"], "duration": 16.0}
    assert found(manifest(tmp_path, twice)) == ["twice"]


def test_silence_is_no_duplicate(tmp_path):
    lines = [write(tmp_path, f"{i}.wav", np.zeros(RATE)) for i in range(2)]
    assert set(found(manifest(tmp_path, *lines))) == {"silent", "no transcript"}


def test_a_recording_of_several_files(tmp_path):
    for i in range(3):
        write(tmp_path, f"{i}.wav", dialogue(i), words())
    write(tmp_path, "mono.wav", voice(LEFT))
    three = {"path": ["0.wav", "1.wav", "2.wav"], "duration": 24.0}
    assert findings(manifest(tmp_path, three))[1]["summary"]["seconds"]["max"] == 24.0
    assert found(manifest(tmp_path, three)) == []
    assert found(manifest(tmp_path, three), "--duration-sec", "20") == []
    mixed = {"path": ["0.wav", "mono.wav"], "duration": 16.0}
    assert found(manifest(tmp_path, mixed)) == ["channels differ", "some transcripts"]
    gone = {"path": ["0.wav", "gone.wav"], "duration": 16.0}
    assert found(manifest(tmp_path, gone)) == ["file missing"]
    assert found(manifest(tmp_path, three | {"duration": 8.0})) == ["duration"]


def test_a_manifest_of_codes(tmp_path):
    codes = {k: torch.zeros(2, 8, 100, dtype=torch.int16) for k in ("k0", "k1", "k2", "k3")}
    save_file(codes, tmp_path / "s.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    size = {"channels": 2, "codebooks": 8, "frames": 100, "duration": 8.0}

    def line(i, **other):
        return {"path": f"{i}.wav", "shard": "s.safetensors", "key": f"k{i}"} | size | other

    good = [line(0, alignments=words()), line(1)]
    path = manifest(tmp_path, *good)
    _, told = findings(path)
    assert told["counts"] == {"encoded already": 2, "no transcript": 1}
    assert told["summary"]["hours_by_channels"]["stereo"] * 3600 == pytest.approx(16.0)
    assert (told["summary"]["transcripts"], told["summary"]["main_share"]) == (1, 1.0)
    spoilt = [
        line(2, frames=99),
        line(7),
        line(3, shard="gone.safetensors"),
        line(4, shard="bad.safetensors"),
        line(5, key=None),
        line(3, duration=-1, path="x.wav"),
        line(2, alignments=[["a", [7.0, 9.0], "SPEAKER_MAIN"]], path="y.wav"),
        line(1, path="renamed.wav"),
    ]
    _, told = findings(path, manifest(tmp_path, *spoilt, name="eval.jsonl"))
    errors = [(f["line"], f["kind"]) for f in told["findings"] if f["severity"] == "error"]
    assert errors == [
        *((i, "codes missing") for i in range(1, 6)),
        (6, "duration"),
        (7, "words past the end"),
        (8, "in two manifests"),
    ]


def test_tokenizer(tmp_path, tokenizer):
    model = tmp_path / "t.model"
    model.write_bytes(tokenizer.serialized_model_proto())
    alignments = [["日本", *entry[1:]] for entry in words()]
    path = manifest(tmp_path, write(tmp_path, "a.wav", dialogue(), alignments))
    assert findings(path, "--tokenizer", model)[0] == [
        ("unknown to the tokenizer", "1 different words: '日本'")
    ]
    assert found(path) == []
    for bad in (tmp_path / "none", path):
        with pytest.raises(UserError, match=r"--tokenizer .*(no such file|not a sentencepiece)"):
            main([str(path), "--tokenizer", str(bad)])


def test_broken_audio(tmp_path):
    whole = write(tmp_path, "a.wav", dialogue(), words())
    data = (tmp_path / "a.wav").read_bytes()
    nan = dialogue().astype(np.float32)
    nan[9, 0] = np.nan
    write(tmp_path, "none.wav", np.zeros((0, 2)))
    write(tmp_path, "nan.wav", nan, words(), subtype="FLOAT")
    write(tmp_path, "three.wav", np.zeros((RATE, 3)))
    (tmp_path / "cut.wav").write_bytes(data[:9000])
    (tmp_path / "noise.wav").write_bytes(b"\0\1no audio" * 100)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "a.raw").write_bytes(data)
    names = "none.wav three.wav cut.wav noise.wav empty.wav folder.wav a.raw gone.wav".split()
    names += ["x" * 5000, "\udcff.wav", "a.wav/b.wav"]
    lines = [{"path": name, "duration": 8.0} for name in ["nan.wav", *names]]
    told, _ = findings(manifest(tmp_path, *lines, whole))
    assert [kind for kind, _ in told] == [
        "not finite", "file broken", "too many channels", *["file broken"] * 5, "file missing",
        "file broken", "file missing", "file missing",
    ]  # fmt: skip
    assert told[0][1] == "1 of its samples; the first is 9 of left (Moshi)"
    assert "0 samples" in told[1][1]
    assert "truncated" in told[3][1]
    assert "File name too long" in told[9][1]


def test_one_sample(tmp_path):
    path = manifest(tmp_path, write(tmp_path, "a.wav", np.full(1, 0.5)))
    assert set(found(path)) == {"silent", "DC offset", "no transcript"}


def test_broken_lines(tmp_path):
    good = write(tmp_path, "a.wav", dialogue(), words())
    lines = [
        "{", "[1, 2]", "null", '{"path": 3}', '{"path": []}', '{"path": ["a.wav", 3]}',
        '{"path": ""}', '{"path": "a.wav", "speaker": 7}', "[" * 100_000, "1" * 5_000,
        '{"path": "a\\u0000b.wav"}', json.dumps(good),
    ]  # fmt: skip
    path = manifest(tmp_path, *lines)
    with path.open("ab") as file:
        file.write(b'{"path": "\xff\xfe.wav"}\r\n')
    _, told = findings(path)
    assert told["counts"] == {"broken line": 12}
    assert [f["line"] for f in told["findings"]] == [*range(1, 12), 13]
    assert told["summary"]["hours"] * 3600 == pytest.approx(8.0)


def test_names_of_all_the_world(tmp_path, capsys):
    lines = [
        write(tmp_path, f"{n}.wav", dialogue(i)) for i, n in enumerate("日本 é 🎤 a\nb".split(" "))
    ]
    path = manifest(tmp_path, *lines, {"path": "\udcff.wav", "duration": 1}, name="données.jsonl")
    assert not main([str(path)])
    out = capsys.readouterr().out
    assert "日本.wav" in out
    assert "\\udcff.wav" in out


def test_wrong_use(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "garbage").write_bytes(np.random.default_rng(0).bytes(100_000))
    good = manifest(tmp_path, write(tmp_path, "a.wav", dialogue(), words()))
    for args, message in [
        ([], "required"),
        (["gone.jsonl"], "no such manifest"),
        ([str(tmp_path / "empty")], r"has no \.jsonl file"),
        ([str(tmp_path / "garbage")], "not a manifest but a binary file"),
        ([str(tmp_path / "a.wav")], "not a manifest but a binary file"),
        ([str(good), str(good)], "named twice"),
        ([str(good), "--duration-sec", "0"], "must be positive"),
        ([str(good), "--duration-sec", "x"], "invalid"),
        ([str(good), "--jso", "x"], "unrecognized"),
        ([str(good), "--json", str(tmp_path)], "is a folder"),
    ]:
        with pytest.raises(UserError, match=message):
            main(args)


def test_a_folder_and_an_empty_manifest(tmp_path):
    manifest(tmp_path, write(tmp_path, "a.wav", dialogue(), words()))
    (tmp_path / "n.jsonl").write_text("\n  \n")
    told = tmp_path / "out.json"
    assert not main([str(tmp_path), "--json", str(told)])
    assert [f["kind"] for f in json.loads(told.read_text())["findings"]] == ["no recordings"]


def test_a_process_of_its_own_that_can_say_ascii_only(tmp_path):
    folder = manifest(tmp_path, write(tmp_path, "é.wav", dialogue())).parent
    done = subprocess.run(
        [sys.executable, "-m", "finetune.check", "m.jsonl"],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        capture_output=True, text=True, encoding="utf-8", check=False, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "ready (1 note)"), done.stderr
    assert "\\xe9.wav" in done.stdout


def test_exit_status(tmp_path, monkeypatch, capsys):
    def command(path):
        monkeypatch.setattr(sys, "argv", ["check", str(path)])
        with pytest.raises(SystemExit) as end:
            runpy.run_module("finetune.check", run_name="__main__")
        return end.value.code, *capsys.readouterr()

    status, out, _ = command(manifest(tmp_path, write(tmp_path, "a.wav", dialogue()), "{"))
    assert (status, out.splitlines()[-1]) == (1, "not ready: 1 problem in 1 file (1 note)")
    gone = tmp_path / "gone.jsonl"
    assert command(gone) == (2, "", f"error: {gone}: no such manifest\n")


def test_help(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    out = capsys.readouterr().out
    assert "Exit status: 0 ready" in out
    assert "--duration-sec" in out


def test_all_that_can_be_found_has_an_advice_of_one_line():
    for kind, (severity, advice) in KINDS.items():
        assert severity in ("error", "note"), kind
        assert 10 < len(advice) < 80, kind
