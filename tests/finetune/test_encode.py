"""`finetune.encode`: what is stored is what encoding on the fly gives, whoever did it, and when."""

import json
import pickle
import shutil
import signal
from multiprocessing import Pipe

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open

from finetune.data.codes import CodesCache
from finetune.data.encoding import mimi_fingerprint
from finetune.data.manifest import read_manifest
from finetune.encode import command, main
from moshi_ttt.errors import UserError
from tests.finetune import encode_process
from tests.finetune.recordings import (
    LINES,
    MAIN,
    arguments,
    encode,
    one,
    sound,
    words,
    write_manifest,
)
from tests.small import small_mimi


@pytest.fixture
def mine(audio, tmp_path):
    """A copy of the audio to spoil; times of change and all."""
    return shutil.copytree(audio, tmp_path / "audio")


def content(folder):
    """Every file that a run leaves."""
    assert not list((folder / ".parts").iterdir())
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}


def index(out):
    return [json.loads(line) for line in (out / "codes.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("side", ["moshi", "user"])
def test_codes_are_those_of_encoding_on_the_fly(audio, base, encoded, tmp_path, side):
    out = encoded
    if side == "user":
        out = encode(audio / "m.jsonl", tmp_path / "user", base, "--mono-side", side)
    recordings, stored = read_manifest(audio / "m.jsonl"), read_manifest(out / "codes.jsonl")
    cache = CodesCache(tmp_path / "cache", small_mimi(), mono_side=side)
    cache.prepare(recordings)
    without = CodesCache(tmp_path / "nothing", None, mono_side=side)
    assert without.prepare(stored) == 0
    assert not (tmp_path / "nothing").exists()
    assert [r.channels for r in stored] == [2, 1, 1]
    for live, kept in zip(recordings, stored, strict=True):
        whole = cache.load(live)
        assert len(whole.unique()) > 10
        assert torch.equal(without.load(kept), whole)
        assert without.file_frames(kept) == cache.file_frames(live)
        for start, stop in [(0, 3), (2, 9), (5, 8), (4, 4), (6, 99)]:
            got = without.load(kept, start, stop)
            assert torch.equal(got, whole[:, start:stop])
            assert torch.equal(cache.load(live, start, stop), got)
        assert kept.words(without.file_frames(kept)) == live.words(cache.file_frames(live))
        assert kept.duration == pytest.approx(live.duration)
        assert kept.speaker == live.speaker


def test_a_recording_of_several_files_is_each_from_a_fresh_codec(audio, tmp_path):
    book = read_manifest(audio / "m.jsonl")[1]
    each = [r for n in ("c1", "c2", "c10") for r in read_manifest(one(audio, tmp_path, n))]
    cache = CodesCache(tmp_path / "cache", small_mimi())
    cache.prepare([book, *each])
    assert cache.file_frames(book) == (6, 12, 4)
    assert torch.equal(cache.load(book), torch.cat([cache.load(r) for r in each], -1))
    found = book.words((6, 12, 4))
    assert [w.text for w in found] == ["one", "two", "three", "ten"]
    starts = [0.1, 0.48 + 0.0, 0.48 + 0.5, 1.44 + 0.1]  # 6 frames, 18 frames before
    assert [w.start for w in found] == pytest.approx(starts)
    assert found[3].end == pytest.approx(1.44 + 0.3)


def test_the_index_says_what_is_where(encoded):
    a, c, b = index(encoded)
    assert [a["path"], c["path"], b["path"]] == [line["path"] for line in LINES]
    assert (c["frames"], c["file_frames"], c["channels"]) == (22, [6, 12, 4], 1)
    assert (a["codebooks"], a["card"], a["mono_side"]) == (8, 64, "moshi")
    assert a["alignments"][0] == ["seven", [0.1, 0.5], MAIN]
    assert b["alignments"] is None
    assert len({line["codec"] for line in (a, b, c)}) == 1
    with safe_open(encoded / c["shard"], "pt") as shard:
        assert set(shard.keys()) == {a["key"], b["key"], c["key"], "silence"}
        assert shard.get_slice("silence").get_shape() == [1, 8, 12]
        assert shard.get_slice(c["key"]).get_dtype() == "I16"
    assert set(content(encoded)) == {".lock", "codes-00000.safetensors", "codes.jsonl"}


@pytest.fixture
def small_shards(monkeypatch):
    """A shard takes 600 bytes of codes: each recording gets its own."""
    monkeypatch.setattr("finetune.encode.MIB", 600)
    return ("--shard-mib", "1")


def test_shards_have_a_size(audio, base, tmp_path, small_shards):
    out = encode(audio / "m.jsonl", tmp_path / "out", base, *small_shards)
    assert [line["shard"][6:11] for line in index(out)] == ["00000", "00001", "00001"]


def test_killed_and_started_again_it_ends_the_same(audio, base, encoded, tmp_path):
    out = tmp_path / "out"
    typed = arguments(audio / "m.jsonl", out, base)
    # three parts, a shard, the index: killed at the 2nd part, at the shard, at the index
    for die_at, parts, shards in [(2, 1, 0), (3, 3, 0), (2, 3, 1)]:
        process = encode_process.start(typed, die_at=die_at)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert len(list(out.glob(".parts/[!.]*"))) == parts
        assert len(list(out.glob("codes-*"))) == shards
        assert not (out / "codes.jsonl").exists()
    main(typed)
    assert content(out) == content(encoded)


def test_ranks_at_once(audio, base, encoded, tmp_path):
    out = tmp_path / "out"
    ranks = [
        encode_process.start(
            arguments(audio / "m.jsonl", out, base), RANK=str(rank), WORLD_SIZE="2"
        )
        for rank in range(2)
    ]
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    assert content(out) == content(encoded)


def test_other_ranks_go_on_where_these_ended(audio, base, encoded, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    encode(audio / "m.jsonl", out, base)
    assert "rank 1 of 3: done; " in capsys.readouterr().out
    assert not (out / "codes.jsonl").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        encode(audio / "m.jsonl", out, base)
    assert "rank 1 of 2: 1 recordings, 1 of them there already" in capsys.readouterr().out
    assert content(out) == content(encoded)
    for rank, world, message in [("2", "2", "RANK is 2"), ("x", "2", "RANK must be a number")]:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(UserError, match=message):
            encode(audio / "m.jsonl", out, base)


def test_several_processes_get_the_same_codec(audio, base, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr("finetune.encode.encode_jobs", lambda *a: given.append(a) or [])
    with pytest.raises(UserError, match="audio changed while it was encoded"):
        encode(audio / "m.jsonl", tmp_path / "out", base, "--workers", "3")
    ((_, mimi, load_mimi, workers),) = given
    assert workers == 3
    again = pickle.loads(pickle.dumps(load_mimi))()
    assert mimi_fingerprint(again) == mimi_fingerprint(mimi)


def test_a_worker_ends_with_its_parent():
    ours, theirs = Pipe()
    encode_process.orphan(theirs).join()
    assert ours.recv() == "up"
    assert ours.poll(10)
    with pytest.raises(EOFError):
        ours.recv()


def test_done_is_done(audio, base, encoded, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(encoded, tmp_path / "out")
    monkeypatch.setattr("finetune.encode.encode_jobs", None)
    monkeypatch.setattr("finetune.encode.encode_recording", None)
    encode(audio / "m.jsonl", out, base)
    assert content(out) == content(encoded)
    assert "3 of 3 recordings" in capsys.readouterr().out


def test_broken_audio_is_named_and_the_rest_goes_on(mine, base, tmp_path, capsys, monkeypatch):
    whole = (mine / "b.wav").read_bytes()
    samples = np.zeros((24_000, 1), np.float32)
    samples[7] = np.nan
    soundfile.write(mine / "nan.wav", samples, 24_000, subtype="FLOAT")
    (mine / "b.wav").write_bytes(whole[:9000])
    more = [{"path": "gone.wav", "duration": 1.0}, {"path": "nan.wav", "duration": 1.0}]
    manifest = write_manifest(mine / "m.jsonl", LINES + more)
    out = tmp_path / "out"
    argv = arguments(manifest, out, base)
    monkeypatch.setattr("sys.argv", ["encode", *argv])
    with pytest.raises(SystemExit) as status:
        command()
    assert status.value.code == 2
    said = capsys.readouterr().err
    assert f"broken: {manifest}:3: " in said
    assert "truncated" in said
    assert f"broken: {manifest}:5: {mine / 'nan.wav'}: sample 7 of channel 0 is nan" in said
    assert "error: 3 of 5 recordings are broken and not in codes.jsonl: " in said
    assert [line["path"] for line in index(out)] == ["a.wav", LINES[1]["path"]]
    before = (out / "codes-00000.safetensors").read_bytes()

    (mine / "b.wav").write_bytes(whole)  # mended: what was there stays as it is
    with pytest.raises(UserError, match=r"2 of 5 .*m\.jsonl:4, .*m\.jsonl:5"):
        main(argv)
    assert [line["shard"][6:11] for line in index(out)] == ["00000", "00000", "00001"]
    assert (out / "codes-00000.safetensors").read_bytes() == before


def test_a_rank_with_broken_audio_leaves_the_verdict_to_the_last(
    mine, base, tmp_path, monkeypatch, capsys
):
    (mine / "a.wav").write_bytes(b"no audio")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):  # a.wav is rank 0's
        monkeypatch.setenv("RANK", rank)
        argv = arguments(mine / "m.jsonl", tmp_path / "out", base)
        if rank == "0":  # an exit status would make torchrun end the others
            main(argv)
            assert "m.jsonl:1: " in capsys.readouterr().err
        else:
            with pytest.raises(UserError, match=r"1 of 3 recordings .*m\.jsonl:1"):
                main(argv)


def test_audio_may_go_and_words_may_come(mine, base, tmp_path):
    out = encode(mine / "m.jsonl", tmp_path / "out", base)
    before = index(out)
    (mine / "a.wav").unlink()
    words(mine / "b.json", ("nine", 0.1, 0.4))
    encode(mine / "m.jsonl", out, base)
    after = index(out)
    assert after[:2] == before[:2]
    assert after[2] == before[2] | {"alignments": [["nine", [0.1, 0.4], MAIN]]}
    sound(mine / "b.wav", 0.5, seed=9)  # other audio: other codes
    write_manifest(mine / "m.jsonl", [*LINES[:2], {"path": "b.wav", "duration": 0.5}])
    encode(mine / "m.jsonl", out, base)
    assert (index(out)[2]["frames"], index(out)[2]["shard"][6:11]) == (7, "00001")


def test_a_part_that_is_broken_is_made_again(audio, base, encoded, tmp_path, monkeypatch):
    out, typed = tmp_path / "out", arguments(audio / "m.jsonl", tmp_path / "out", base)
    process = encode_process.start(typed, die_at=3)
    process.join()
    part = next(out.glob(".parts/[!.]*"))
    part.write_bytes(part.read_bytes()[:-3] + b"abc")
    with pytest.raises(UserError, match=r"was broken .* and is removed: run again"):
        main(typed)
    main(typed)
    assert content(out) == content(encoded)


def test_what_is_refused(audio, base, encoded, tmp_path):
    def refused(message, *argv):
        with pytest.raises(UserError, match=message):
            main([*map(str, argv), "--base", str(base)])

    manifest = audio / "m.jsonl"
    refused("required: OUT", manifest)
    refused("no such manifest", audio / "x.jsonl", tmp_path)
    refused("these are codes already", encoded / "codes.jsonl", tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    refused("no recordings", tmp_path / "empty.jsonl", tmp_path)
    (tmp_path / "bad.jsonl").write_text("{}\n")
    refused(r"bad\.jsonl:1: no path", tmp_path / "bad.jsonl", tmp_path)
    refused("no folder for codes", manifest, audio / "a.wav")
    refused("must be at least 1, got 0", manifest, tmp_path, "--workers", "0")
    out = shutil.copytree(encoded, tmp_path / "out")
    other = one(audio, tmp_path, "b")
    refused(r"has 3 recordings that .*b\.jsonl lacks", other, out)
    (out / "codes-00000.safetensors").unlink()
    refused("no such file of codes", manifest, out)
    with pytest.raises(UserError, match="no such folder, and not a hub repository"):
        main([str(manifest), str(tmp_path / "n"), "--base", "nowhere"])
    with pytest.raises(UserError, match=r"base /nowhere: .*hub cannot be reached or has no such"):
        main([str(manifest), str(tmp_path / "n"), "--base", "/nowhere"])
