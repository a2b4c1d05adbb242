"""Segments and batches: every frame once, in an order that can be resumed."""

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import soundfile
import torch

from finetune.data.codes import CodesCache
from finetune.data.corpus import segment_frames
from finetune.data.loader import Loader
from finetune.data.manifest import read_sources
from moshi_ttt.errors import UserError
from tests.small import small_mimi

SECONDS = 0.8  # 10 frames
LENGTHS = {"a": (2.0, 2), "b": (0.5, 1), "c": (0.8, 2), "d": (0.85, 1)}  # 25, 7, 10, 11 frames
FRAMES = {"a": 25, "b": 7, "c": 10, "d": 11}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two manifests, four recordings; `a` and `b` have words."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, (seconds, channels) in LENGTHS.items():
        noise = 0.1 * rng.standard_normal((int(seconds * 24_000), channels))
        soundfile.write(folder / f"{name}.wav", noise, 24_000)
    words = [["seven", [0.75, 1.2], "SPEAKER_MAIN"]]
    (folder / "a.json").write_text(json.dumps({"alignments": words}))
    words = [["three", [0.1, 0.4], "SPEAKER_MAIN"]]
    (folder / "b.json").write_text(json.dumps({"alignments": words}))
    for manifest, names in (("one", "abd"), ("two", "c")):
        lines = [json.dumps({"path": f"{n}.wav", "duration": LENGTHS[n][0]}) for n in names]
        (folder / f"{manifest}.jsonl").write_text("\n".join(lines))
    cache = CodesCache(folder / "codes", small_mimi())
    cache.prepare([r for s in read_sources(str(folder)) for r in s.recordings])
    return folder, cache


@pytest.fixture
def loader(data, tokenizer):
    folder, cache = data

    def make(text="one.jsonl,two.jsonl", **kwargs):
        text = ",".join(f"{folder}/{part}" for part in text.split(","))
        settings = {"seconds": SECONDS, "batch_size": 2, **kwargs}
        return Loader(read_sources(text), settings.pop("cache", cache), tokenizer, **settings)

    return make


def rows(batch):
    """(name, first frame, frames) of each row."""
    names = [n.rsplit("/", 1)[1][0] for n in batch.names]
    return list(zip(names, batch.starts, batch.frames, strict=True))


def every_frame(segments):
    return Counter((n, start + i) for n, start, length in segments for i in range(length))


ALL = {(n, i): 1 for n, count in FRAMES.items() for i in range(count)}


def test_a_batch_is_codes_text_and_nothing_past_the_end(loader, data, tokenizer):
    _, cache = data
    batches_of = loader(shuffle=False, batch_size=7)
    batch = next(iter(batches_of))
    assert batch.codes.shape == (7, 17, 10)
    assert batch.codes.dtype == torch.int64
    recordings = {r.files[0].path.stem: r for c in batches_of.corpora for r in c.recordings}
    for row, (name, start, length) in enumerate(rows(batch)):
        wanted = cache.load(recordings[name], start, start + length).long()
        assert torch.equal(batch.codes[row, 1:, :length], wanted)
        assert (batch.codes[row, :, :length] >= 0).all()
        assert (batch.codes[row, :, length:] == -1).all()
        known = name in "ab"
        assert batch.text_mask[row].tolist() == [known] * length + [False] * (10 - length)
        if not known:  # padding is fed where no text is known
            assert (batch.codes[row, 0, :length] == 3).all()
    seven = tokenizer.encode("seven")  # begins in frame 9 and goes on in the next segment
    assert batch.codes[0, 0].tolist() == [3] * 8 + [0, seven[0]]
    rest = seven[1:]
    second = rows(batch).index(("a", 10, 10))
    assert batch.codes[second, 0].tolist() == rest + [3] * (10 - len(rest))
    assert "a.wav from 0.8 s" in batch.describe()


def test_an_epoch_reads_every_frame_once(loader):
    train = loader("one.jsonl", batch_size=3, seed=4)
    epochs = [[r for b in islice(train, 2) for r in rows(b)] for _ in range(3)]
    for epoch in epochs:  # 6 segments: 2 batches of 3
        assert every_frame(epoch) == {k: 1 for k in ALL if k[0] != "c"}
    assert len({tuple(e) for e in epochs}) > 1


def test_a_batch_may_cross_the_end_of_an_epoch(loader):
    train = loader("one.jsonl", batch_size=4, seed=4)
    seen = [r for b in islice(train, 3) for r in rows(b)]  # 12 segments: 2 epochs
    assert every_frame(seen[:6]) == every_frame(seen[6:]) == {k: 1 for k in ALL if k[0] != "c"}
    assert train.epoch == 2.0


def test_without_shuffle_the_order_is_the_manifests(loader):
    train = loader("one.jsonl", batch_size=6, shuffle=False)
    first, second = rows(next(train)), rows(next(train))
    assert first == second
    assert [r[:2] for r in first] == [
        ("a", 0),
        ("a", 10),
        ("a", 20),
        ("b", 0),
        ("d", 0),
        ("d", 10),
    ]


def test_the_order_is_the_seeds(loader):
    def order(seed):
        return [r for b in islice(loader(seed=seed), 20) for r in rows(b)]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_weights_are_kept_exactly(loader):
    train = loader("one.jsonl:3,two.jsonl:1", batch_size=4)
    for batch in islice(train, 10):
        assert Counter(n == "c" for n, *_ in rows(batch)) == {False: 3, True: 1}
    assert train.state_dict() == {"drawn": [30, 10]}


def test_a_state_goes_on_where_it_was_taken(loader):
    train = loader("one.jsonl:0.7,two.jsonl:0.3", batch_size=3, seed=9)
    list(islice(train, 5))
    state = json.loads(json.dumps(train.state_dict()))
    wanted = [next(train) for _ in range(6)]
    other = loader("one.jsonl:0.7,two.jsonl:0.3", batch_size=3, seed=9)
    other.load_state_dict(state)
    for batch in wanted:
        got = next(other)
        assert rows(got) == rows(batch)
        assert torch.equal(got.codes, batch.codes)
    with pytest.raises(ValueError, match="1 corpora"):
        loader("one.jsonl").load_state_dict(state)


def test_taking_a_state_changes_nothing(loader):
    one, two = loader(seed=3), loader(seed=3)
    for _ in range(4):
        two.state_dict()
        assert torch.equal(next(one).codes, next(two).codes)


def test_a_user_who_reads_has_no_text_of_moshis(loader, data):
    folder, made = data
    cache = CodesCache(made.folder, made.mimi, mono_side="user")
    batch = next(iter(loader("one.jsonl", shuffle=False, batch_size=6, cache=cache)))
    mono = rows(batch).index(("b", 0, 7))
    assert not batch.text_mask[mono].any()
    assert (batch.codes[mono, 0, :7] == 3).all()
    assert batch.text_mask[0].all()  # stereo: the left side is Moshi's
    assert folder


def test_no_source_is_an_error(data, tokenizer):
    with pytest.raises(UserError, match="no recordings"):
        Loader([], data[1], tokenizer, seconds=1.0, batch_size=1)


@pytest.mark.parametrize(
    ("seconds", "frames"), [(10.0, 125), (0.8, 10), (0.81, 11), (0.01, 1), (100, 1250), (2.4, 30)]
)
def test_seconds_to_frames(seconds, frames):
    assert segment_frames(seconds) == frames
