"""Training and scoring from codes that `finetune.encode` made, without Mimi and without audio."""

import json
import shutil
from dataclasses import replace
from itertools import islice

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from eval.panel import make_items, read_panel, shorten, speaker_of
from finetune.data.codes import CodesCache
from finetune.data.loader import Layout, Loader
from finetune.data.manifest import read_manifest, read_sources
from finetune.data.stored import digest_of
from finetune.data.stored_checks import check_codes, needs_codec
from moshi_ttt.errors import UserError
from tests.finetune.recordings import LINES, encode, write_manifest
from tests.finetune.small_run import lines
from tests.small import small_lm, small_mimi


@pytest.fixture
def mine(encoded, tmp_path):
    """A copy of the codes to spoil."""
    return shutil.copytree(encoded, tmp_path / "codes")


def batches(sources, cache, tokenizer, count=6, **more):
    loader = Loader(
        read_sources(sources), cache, tokenizer, Layout.of(small_lm()),
        seconds=0.8, batch_size=2, **more,
    )  # fmt: skip
    return [batch for (batch,) in islice(loader, count)]


def test_batches_are_those_of_the_audio(audio, encoded, tokenizer, tmp_path):
    live = CodesCache(tmp_path / "cache", small_mimi())
    live.prepare(read_manifest(audio / "m.jsonl"))
    wanted = batches(str(audio / "m.jsonl"), live, tokenizer)
    got = batches(str(encoded / "codes.jsonl"), CodesCache(tmp_path / "n", None), tokenizer)
    for a, b in zip(wanted, got, strict=True):
        assert torch.equal(a.sequence, b.sequence)
        assert torch.equal(a.text_mask, b.text_mask)
        assert a.starts == b.starts
    assert any(b.text_mask.any() for b in got)
    assert "a.wav" in {name for b in got for name in b.names}
    text = torch.cat([b.sequence[:, 0].flatten() for b in got])
    assert set(tokenizer.encode("three")) <= set(text.tolist())


def test_audio_and_codes_in_one_run(audio, encoded, tokenizer, tmp_path):
    both = f"{audio / 'm.jsonl'},{encoded / 'codes.jsonl'}"
    sources = read_sources(both)
    file = sources[1].recordings[0].stored.codec_file
    assert needs_codec(sources, file)
    assert not needs_codec(sources[1:], file)
    assert needs_codec(sources[1:], "another file: its codec has to be looked at")
    check_codes(sources, 8, 64)
    cache = CodesCache(tmp_path / "cache", small_mimi())
    assert cache.prepare([r for s in sources for r in s.recordings]) == 5
    first, second = batches(both, cache, tokenizer, 1, shuffle=False)[0].sequence
    assert torch.equal(first, second)
    without = CodesCache(tmp_path / "n", None)
    with pytest.raises(ValueError, match=r"a\.wav is audio, and its codes need a codec"):
        without.prepare(sources[0].recordings)


def test_the_trainer_takes_codes(world, tmp_path, monkeypatch):
    """Without Mimi."""
    found = {}
    for kind in ("audio", "codes"):
        data = {name: world / f"{name}.jsonl" for name in ("train", "eval", "panel")}
        if kind == "codes":
            for name, manifest in data.items():
                data[name] = encode(manifest, tmp_path / name, world.base) / "codes.jsonl"
            monkeypatch.setattr("finetune.train.load_mimi", None)
        run = world.run(
            tmp_path / kind, max_steps=1, do_eval=True, data__train_data=str(data["train"]),
            data__eval_data=str(data["eval"]), eval__librilight_data=str(data["panel"]),
        )  # fmt: skip
        found[kind] = [
            {k: v for k, v in line.items() if "nll" in k}
            for name in ("train", "held_out", "librilight")
            for line in lines(run, name)
        ]
    assert len(found["audio"]) == 3
    assert found["codes"] == found["audio"]


def test_codes_that_do_not_fit_are_refused(audio, encoded, tmp_path):
    sources = read_sources(str(encoded / "codes.jsonl"))
    check_codes(sources, 8, 64)
    where = r"codes\.jsonl:1: (64 )?codes "
    with pytest.raises(UserError, match=where + "of 8 codebooks, but the model has 16"):
        check_codes(sources, 16, 64)
    with pytest.raises(UserError, match=where + "a codebook, but the model knows 32"):
        check_codes(sources, 8, 32)
    check_codes(read_sources(str(audio / "m.jsonl")), 1, 1)
    one, *rest = sources[0].recordings
    other = replace(one, stored=replace(one.stored, codec="f" * 40), where="x.jsonl:9")
    mixed = [sources[0], replace(sources[0], recordings=(*rest, other))]
    with pytest.raises(UserError, match=r"x\.jsonl:9: .*another codec \(ffff.*codes\.jsonl:1"):
        check_codes(mixed, 8, 64)


def test_codes_of_another_mimi_are_not_trained_on(world, tmp_path):
    """Also where it has as many codes: the embedded base's are easily made by mistake."""
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    save_file(dict(small_mimi(seed=3).state_dict()), base / "mimi.safetensors")
    codes = encode(world / "train.jsonl", tmp_path / "codes", base) / "codes.jsonl"
    with pytest.raises(UserError, match=r"codes\.jsonl:1: .*another codec .* than the base's Mimi"):
        world.run(tmp_path / "run", data__train_data=str(codes))


def test_what_is_no_code_is_found_though_its_digest_is_right(encoded, mine, tmp_path):
    (entry, *rest) = map(json.loads, (mine / "codes.jsonl").read_text().splitlines())
    shard = mine / entry["shard"]
    tensors = load_file(shard)
    tensors[entry["key"]][0, 0, 0] = 64
    with safe_open(shard, "pt") as file:
        about = file.metadata()
    save_file(tensors, shard, about)
    entry["sha1"] = digest_of(tensors[entry["key"]])
    (mine / "codes.jsonl").write_text("\n".join(map(json.dumps, [entry, *rest])))
    with pytest.raises(UserError, match=r"holds what is no code: 0 to 63 are"):
        CodesCache(tmp_path / "c", None).prepare(read_manifest(mine / "codes.jsonl"))


def test_what_is_stored_is_compared_with_its_index(encoded, mine, tmp_path):
    stored = read_manifest(mine / "codes.jsonl")
    with pytest.raises(UserError, match=r"jsonl:1: .*another codec .* than the base's Mimi"):
        CodesCache(tmp_path / "c", small_mimi(seed=1)).prepare(stored)
    with pytest.raises(UserError, match=r"jsonl:2: encoded with --mono-side moshi, but here mono"):
        CodesCache(tmp_path / "c", None, mono_side="user").prepare(stored)
    CodesCache(tmp_path / "c", None, mono_side="user").prepare(stored[:1])  # stereo
    cache, shard = CodesCache(tmp_path / "c", None), mine / "codes-00000.safetensors"
    whole = shard.read_bytes()
    for data, message in [
        (whole[:-1] + bytes([whole[-1] ^ 1]), "the codes of silence .* not what was written"),
        (whole[:-500] + bytes([whole[-500] ^ 1]) + whole[-499:], "is not what was written"),
        (whole[:-9], "no such codes there"),
        (b"", "no such codes there"),
    ]:
        shard.write_bytes(data)
        with pytest.raises(UserError, match=rf"codes\.jsonl:\d: .*{message}"):
            cache.prepare(stored)
    shard.unlink()
    with pytest.raises(UserError, match=r"jsonl:1: .*00000\.safetensors: no such codes"):
        cache.prepare(stored)
    with pytest.raises(UserError, match=r"jsonl:1: .*no such file of codes"):
        read_manifest(mine / "codes.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 23}, "frames is 23, but file_frames are 22 together"),
        ({"file_frames": []}, "file_frames must be a list of numbers"),
        ({"file_frames": [0, 22]}, "file_frames must be a positive whole number, got 0"),
        ({"key": None}, "key must be text, got None"),
        ({"codebooks": True}, "codebooks must be a positive whole number, got True"),
        ({"card": "64"}, "card must be a positive whole number, got '64'"),
        ({"channels": 3}, "channels must be 1 or 2, got 3"),
        ({"mono_side": "left"}, "mono_side must be 'moshi' or 'user', got 'left'"),
        ({"duration": 9.0}, r"is 9\.0, but the audio has 1\.760 s"),
        ({"speaker": 3}, "speaker must be text, got 3"),
        ({"path": []}, "no path"),
        ({"alignments": [["a", [9.0, 9.1], "S"]]}, "alignment 0 .* past the end"),
        ({"alignments": 3}, "'alignments' is not a list: 3"),
    ],
)
def test_a_bad_line_of_codes_is_named(mine, change, message):
    found = [json.loads(line) for line in (mine / "codes.jsonl").read_text().splitlines()]
    write_manifest(mine / "codes.jsonl", [found[0], found[1] | change])
    with pytest.raises(UserError, match=rf"codes\.jsonl:2: .*{message}"):
        read_manifest(mine / "codes.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 21, "file_frames": [6, 11, 4]}, r"is \[1, 8, 22\], but the line says"),
        ({"frames": 22, "file_frames": [18, 4]}, "the codes of silence are too few"),
    ],
)
def test_a_line_that_its_shard_contradicts(mine, change, message):
    found = [json.loads(line) for line in (mine / "codes.jsonl").read_text().splitlines()]
    write_manifest(mine / "codes.jsonl", [found[0], found[1] | change])
    with pytest.raises(UserError, match=rf"codes\.jsonl:2: .*{message}"):
        CodesCache("unused", None).prepare(read_manifest(mine / "codes.jsonl"))


def test_an_index_that_changed_while_it_is_used(mine):
    stored = read_manifest(mine / "codes.jsonl")
    write_manifest(mine / "codes.jsonl", LINES)
    with pytest.raises(UserError, match="written anew while it was in use"):
        stored[1].words((22,))


def test_a_panel_of_codes(audio, encoded, tokenizer, tmp_path):
    live, kept = read_panel(audio / "m.jsonl"), read_panel(encoded / "codes.jsonl")
    assert [speaker_of(r) for r in kept] == ["a.wav", "7", "b.wav"]
    assert [r.name for r in kept] == ["a.wav", "c1.wav and 2 more", "b.wav"]
    assert shorten(kept[1], 0.1) == kept[1]
    wanted = make_items(live, CodesCache(tmp_path / "c", small_mimi()), tokenizer)
    got = make_items(kept, CodesCache(tmp_path / "n", None), tokenizer)
    for a, b in zip(wanted, got, strict=True):
        assert torch.equal(a.codes, b.codes)
        assert a.text_known == b.text_known
