"""Lanes and batches: every frame once, on any number of ranks, in an order that can be resumed."""

import json
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.codes import CodesCache
from finetune.data.corpus import segment_frames
from finetune.data.loader import NOTHING, Layout, Loader
from finetune.data.manifest import read_sources
from finetune.data.reading import Reading
from moshi_ttt.errors import UserError
from tests.small import small_lm, small_mimi
from tests.test_lanes import sequence_of

SECONDS = 0.8  # 10 frames
LENGTHS = {"a": (2.0, 2), "b": (0.5, 1), "c": (0.8, 2), "d": (0.85, 1)}  # 25, 7, 10, 11 frames
LAYOUT = Layout.of(small_lm())
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
        text = ",".join(str(folder / part) for part in text.split(","))
        settings = {"seconds": SECONDS, "batch_size": 2, "whole": False, **kwargs}
        given = settings.pop("cache", cache), tokenizer, LAYOUT
        return Loader(read_sources(text), *given, **settings)

    return make


def rows(batch):
    """(name, first frame, frames) of each row."""
    names = [n.rsplit("/", 1)[1][0] for n in batch.names]
    return list(zip(names, batch.starts, batch.frames, strict=True))


def every_frame(segments):
    return Counter((n, start + i) for n, start, length in segments for i in range(length))


def batches(loader, count):
    """The only slot's batch of so many steps."""
    return [batch for (batch,) in islice(loader, count)]


ALL = {(n, i): 1 for n, count in FRAMES.items() for i in range(count)}


def test_a_batch_is_a_piece_of_the_delayed_recording(loader, data, tokenizer):
    """Against moshi's own delays of the whole; text known where it is; nothing past the end."""
    _, cache = data
    batches_of = loader(shuffle=False, batch_size=7)
    (batch,) = batches(batches_of, 1)
    assert batch.sequence.shape == (7, 17, 11)
    assert batch.sequence.dtype == torch.int64
    recordings = {r.files[0].path.stem: (r, c) for c in batches_of.corpora for r in c.recordings}
    for row, (name, start, length) in enumerate(rows(batch)):
        recording, corpus = recordings[name]
        index = corpus.recordings.index(recording)
        codes = corpus.read(index, 0, FRAMES[name]).codes
        assert torch.equal(codes[1:], cache.load(recording).long())
        wanted = sequence_of(small_lm(), codes[None])[0, :, start : start + length + 1]
        assert torch.equal(batch.sequence[row, :, : length + 1], wanted)
        assert (batch.sequence[row, :, length + 1 :] == NOTHING).all()
        known = name in "ab"
        assert batch.text_mask[row].tolist() == [known] * length + [False] * (10 - length)
        if not known:  # padding is fed where no text is known
            assert (batch.sequence[row, 0, 1 : length + 1] == 3).all()
    assert batch.begins.all()
    seven = tokenizer.encode("seven")  # begins in frame 9 and goes on in the next segment
    assert batch.sequence[0, 0, 1:].tolist() == [3] * 8 + [0, seven[0]]
    second = rows(batch).index(("a", 10, 10))
    assert batch.sequence[second, 0].tolist() == seven + [3] * (11 - len(seven))
    assert "a.wav from 0.8 s" in batch.describe()


def test_an_epoch_reads_every_frame_once(loader):
    train = loader("one.jsonl", batch_size=3, seed=4)
    epochs = [[r for b in batches(train, 2) for r in rows(b)] for _ in range(3)]
    for epoch in epochs:  # 6 segments: 2 batches of 3
        assert every_frame(epoch) == {k: 1 for k in ALL if k[0] != "c"}
    assert len({tuple(e) for e in epochs}) > 1


def test_a_batch_may_cross_the_end_of_an_epoch(loader):
    train = loader("one.jsonl", batch_size=4, seed=4)
    seen = [r for b in batches(train, 3) for r in rows(b)]  # 12 segments: 2 epochs
    assert every_frame(seen[:6]) == every_frame(seen[6:]) == {k: 1 for k in ALL if k[0] != "c"}
    assert train.reading.epoch == 2.0


def test_without_shuffle_the_order_is_the_manifests(loader):
    train = loader("one.jsonl", batch_size=6, shuffle=False)
    first, second = map(rows, batches(train, 2))
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
        return [r for b in batches(loader(seed=seed), 20) for r in rows(b)]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_weights_are_kept_exactly(loader):
    train = loader("one.jsonl:3,two.jsonl:1", batch_size=4)
    for batch in batches(train, 10):
        assert Counter(n == "c" for n, *_ in rows(batch)) == {False: 3, True: 1}
    state = train.state_dict()
    assert state.pop("data")
    assert state == {"drawn": [30, 10], "segments": [30, 10], "lanes": [None] * 4}


@pytest.mark.parametrize("whole", [False, True])
def test_a_state_goes_on_where_it_was_taken(loader, whole):
    train = loader("one.jsonl:0.7,two.jsonl:0.3", batch_size=3, seed=9, whole=whole)
    list(islice(train, 5))
    state = json.loads(json.dumps(train.state_dict()))
    wanted = batches(train, 6)
    other = loader("one.jsonl:0.7,two.jsonl:0.3", batch_size=3, seed=9, whole=whole)
    other.load_state_dict(state)
    for batch, got in zip(wanted, batches(other, 6), strict=True):
        assert rows(got) == rows(batch)
        assert torch.equal(got.sequence, batch.sequence)
        assert torch.equal(got.begins, batch.begins)
    for bad, match in (("one.jsonl", "data are not the same"), ("one.jsonl,two.jsonl", "weights"),
                       ("one.jsonl:0.7,two.jsonl:0.3", "2 lanes")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            loader(bad).load_state_dict(state)


@pytest.mark.parametrize("change", ["added", "reordered", "transcript", "moved"])
def test_a_state_goes_on_in_the_same_data_only(loader, data, tmp_path, change):
    """Or lanes would go on in another recording; where the files lie does not matter."""
    folder, _ = data
    train = loader("one.jsonl", whole=True)
    list(islice(train, 2))
    for file in folder.glob("*.*"):
        shutil.copyfile(file, tmp_path / file.name)
    lines = (tmp_path / "one.jsonl").read_text().splitlines()
    if change == "added":
        lines.append((tmp_path / "two.jsonl").read_text())
    if change == "reordered":
        lines = lines[::-1]
    if change == "transcript":
        words = [["nine", [0.75, 1.2], "SPEAKER_MAIN"]]
        (tmp_path / "a.json").write_text(json.dumps({"alignments": words}))
    (tmp_path / "one.jsonl").write_text("\n".join(lines))
    other = loader(str(tmp_path / "one.jsonl"), whole=True)
    if change == "moved":
        other.load_state_dict(train.state_dict())
        assert torch.equal(next(other)[0].sequence, next(train)[0].sequence)
        return
    with pytest.raises(ValueError, match="data are not the same"):
        other.load_state_dict(train.state_dict())


def test_taking_a_state_changes_nothing(loader):
    one, two = loader(seed=3, whole=True), loader(seed=3, whole=True)
    for _ in range(4):
        two.state_dict()
        assert torch.equal(next(one)[0].sequence, next(two)[0].sequence)


# -- lanes -----------------------------------------------------------------------------------------


def test_a_lane_reads_recordings_from_end_to_end(loader):
    train = loader("one.jsonl", whole=True, shuffle=False, batch_size=2)
    found = [[(*r, bool(new)) for r, new in zip(rows(b), b.begins, strict=True)]
             for b in batches(train, 4)]  # fmt: skip
    assert [lane[0] for lane in found] == [
        ("a", 0, 10, True), ("a", 10, 10, False), ("a", 20, 5, False), ("a", 0, 10, True),
    ]  # fmt: skip
    assert [lane[1] for lane in found] == [
        ("b", 0, 7, True), ("d", 0, 10, True), ("d", 10, 1, False), ("b", 0, 7, True),
    ]  # fmt: skip


def test_segments_joined_are_the_delayed_recording(loader):
    train = loader("two.jsonl,one.jsonl", whole=True, shuffle=False, batch_size=1, seconds=0.32)
    steps = batches(train, 40)
    heard = {}
    for batch in steps:
        ((name, start, length),) = rows(batch)
        heard.setdefault(name, []).append((start, batch.sequence[0, :, : length + 1]))
    for corpus in train.corpora:
        for index, recording in enumerate(corpus.recordings):
            codes = corpus.read(index, 0, corpus.lengths[index]).codes
            whole = sequence_of(small_lm(), codes[None])[0]
            for start, piece in heard[Path(recording.name).stem]:
                assert torch.equal(piece, whole[:, start : start + piece.shape[1]])


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("whole", [False, True])
@given(
    lengths=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=7), min_size=1, max_size=2),
    slots=st.integers(1, 2), batch_size=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_ranks_share_files_without_overlap_or_omission(
    world, whole, lengths, slots, batch_size, seed
):
    """Any number of files; every epoch of a corpus is every frame once; lanes are the world's."""
    lanes, frames = world * slots * batch_size, 8

    def reading():
        given = {"lanes": lanes, "segment_frames": frames, "whole": whole, "shuffle": True}
        return Reading(lengths, [1.0] * len(lengths), seed=seed, **given)

    one = reading()
    heard = [Counter() for _ in lengths]
    last: list = [None] * lanes
    for _ in range(2 * max(map(sum, lengths))):
        for lane, piece in enumerate(one.advance()):
            assert 0 < piece.stop - piece.start <= frames
            before = last[lane]
            if piece.begins:
                ends = piece.start == 0 if whole else piece.start % frames == 0
                assert ends
                assert before is None or not whole or (
                    before.stop == lengths[before.corpus][before.recording]
                )  # fmt: skip
            else:
                assert whole
                assert piece[:3] == (before.corpus, before.recording, before.stop)
            last[lane] = piece
            for frame in range(piece.start, piece.stop):
                heard[piece.corpus][piece.recording, frame] += 1
    for corpus, counts in enumerate(heard):  # epochs: no frame is two behind another, but the open
        total = {(r, f) for r, n in enumerate(lengths[corpus]) for f in range(n)}
        assert set(counts) <= total
        drawn = one.drawn[corpus]
        full = drawn // len(one.passages[corpus])
        begun = -(-drawn // len(one.passages[corpus]))
        unread = [p for p in one.lanes if p is not None and p.corpus == corpus]
        for place in total:
            late = sum(p.recording == place[0] and p.next <= place[1] < p.stop for p in unread)
            assert full - late <= counts[place] <= begun
    assert reading().advance() == reading().advance()


def test_ranks_and_slots_cut_the_same_lanes(loader):
    """Whatever the layout, lane by lane the same is read."""

    def lanes(world, slots, batch_size):
        loaders = [
            loader(whole=True, seed=5, rank=r, world=world, slots=slots, batch_size=batch_size)
            for r in range(world)
        ]
        return [
            [r for one in loaders for b in next(one) for r in rows(b)] for _ in range(8)
        ]  # fmt: skip

    want = lanes(1, 1, 4)
    assert want == lanes(4, 1, 1) == lanes(2, 2, 1) == lanes(1, 2, 2) == lanes(2, 1, 2)
    assert want != lanes(1, 1, 4)[::-1]


def test_a_state_goes_on_on_another_number_of_ranks(loader):
    one = loader(whole=True, seed=5, batch_size=4)
    list(islice(one, 3))
    state = one.state_dict()
    (want,) = batches(one, 1)
    found = []
    for rank in range(2):
        two = loader(whole=True, seed=5, batch_size=1, slots=2, rank=rank, world=2)
        two.load_state_dict(state)
        found += [b.sequence for b in next(two)]
    assert torch.equal(torch.cat(found), want.sequence)


def test_a_user_who_reads_has_no_text_of_moshis(loader, data):
    folder, made = data
    cache = CodesCache(made.folder, made.mimi, mono_side="user")
    (batch,) = batches(loader("one.jsonl", shuffle=False, batch_size=6, cache=cache), 1)
    mono = rows(batch).index(("b", 0, 7))
    assert not batch.text_mask[mono].any()
    assert (batch.sequence[mono, 0, 1:8] == 3).all()
    assert batch.text_mask[0].all()  # stereo: the left side is Moshi's
    assert folder


def test_no_source_is_an_error(data, tokenizer):
    with pytest.raises(UserError, match="no recordings"):
        Loader([], data[1], tokenizer, LAYOUT, seconds=1.0, batch_size=1)


@pytest.mark.parametrize(
    ("seconds", "frames"), [(10.0, 125), (0.8, 10), (0.81, 11), (0.01, 1), (100, 1250), (2.4, 30)]
)
def test_seconds_to_frames(seconds, frames):
    assert segment_frames(seconds) == frames
