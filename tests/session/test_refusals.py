"""What does not fit a model is refused with the reason."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moshi_ttt import session, state_file
from moshi_ttt.errors import UserError
from moshi_ttt.hybrid import unsplice
from moshi_ttt.saved_memory import load_memory, save_memory
from moshi_ttt.session import load_session, save_session
from tests.session.sessions import engine_for, run, same, snapshot, stock
from tests.stream.streams import hybrid, noise


def retrained():
    lm = hybrid()
    lm.transformer.layers[1].seq_modeling_block.gate.data[3] += 1e-3
    return lm


OTHERS = {
    "chunk_size": (lambda: hybrid(chunk_size=5), {}, "chunk_size 4, not 5"),
    "family": (lambda: hybrid(memory="ttt_linear"), {}, "memory 'ttt_mlp', not 'ttt_linear'"),
    "base": (lambda: hybrid(seed=1), {}, "belongs to another base model"),
    "weights": (retrained, {}, "belongs to another checkpoint of this base"),
    "rows": (hybrid, {"rows": 2}, "rows 1, here it is 2"),
    "none": (stock, {}, "has no memory|the other has none"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with engine_for(seed=3) as engine:
        run(engine, noise(6))
        save_session(engine, folder / "session")
        save_memory(engine, folder / "memory")
    return folder


REFUSED = [(o, k) for o in OTHERS for k in ("session", "memory") if (o, k) != ("rows", "memory")]


@pytest.mark.parametrize(("other", "kind"), REFUSED)
def test_another_model_is_refused_with_the_reason(saved, kind, other):
    build, options, words = OTHERS[other]
    load = {"session": load_session, "memory": load_memory}[kind]
    with engine_for(build(), **options) as engine:
        run(engine, noise(2, engine.rows))
        before = snapshot(engine)
        with pytest.raises(UserError, match=words):
            load(engine, saved / kind)
        assert same(snapshot(engine), before)


@pytest.mark.parametrize(
    ("save", "load"), [(save_session, load_session), (save_memory, load_memory)]
)
def test_a_file_older_than_a_key_means_its_default(save, load, tmp_path, monkeypatch):
    right, path = state_file._config, tmp_path / "older"

    def older(engine):
        return {k: v for k, v in right(engine).items() if k not in ("write_every", "writing")}

    with engine_for() as engine:
        run(engine, noise(6))
        with monkeypatch.context() as patch:
            patch.setattr(state_file, "_config", older)
            save(engine, path)
        load(engine, path)
    with engine_for(hybrid(write_every=2)) as engine:
        with pytest.raises(UserError, match="write_every 1, not 2"):
            load(engine, path)


def test_another_codec_ends_a_session_but_not_a_memory(saved):
    with engine_for(mimi_seed=1) as engine:
        load_memory(engine, saved / "memory")
        with pytest.raises(UserError, match="another codec"):
            load_session(engine, saved / "session")


def told(old, new, kind="session"):
    """Change what the file says of itself."""

    def spoil(tensors, metadata):
        assert old in metadata[f"moshi_ttt.{kind}"]
        metadata[f"moshi_ttt.{kind}"] = metadata[f"moshi_ttt.{kind}"].replace(old, new)

    return spoil


def filled(name, number):
    return lambda tensors, metadata: tensors[name].fill_(number)


POS = "transformer.layers.0.seq_modeling_block/fast.pos"
W1 = "transformer.layers.0.seq_modeling_block/fast.W1"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (told('"format"', "format", "memory"), "or is broken: "),
        (told('"rows": 1', '"rows": 3', "memory"), "memories of 3 conversations, not of one"),
        (told('"rows"', '"raws"', "memory"), "or is broken: its rows is None"),
        (told('"model": {', '"model": 1, "was": {', "memory"), "or is broken: its model is 1"),
        (told('"base"', '"bass"', "memory"), "belongs to another base model"),
        (told('"chunk_size": 4', '"chunk_size": []', "memory"), "memory of another version"),
        (lambda t, m: t.update({POS: torch.zeros(1)}), r"fast.pos is \(1,\) float32"),
        (lambda t, m: t.update({W1: t[W1].double()}), "float64, not .* float32"),
    ],
)
def test_a_memory_that_was_tampered_with_is_refused(saved, tmp_path, spoil, words):
    spoil_file(saved / "memory", tmp_path / "spoilt", spoil)
    with engine_for() as engine:
        before = snapshot(engine)
        with pytest.raises(UserError, match=words):
            load_memory(engine, tmp_path / "spoilt")
        assert same(snapshot(engine), before)


@pytest.mark.parametrize("number", ["-1", '"x"', "[1]"])
def test_what_a_session_says_of_sampling_is_checked(saved, tmp_path, number):
    spoil_file(saved / "session", tmp_path / "spoilt", told('"temp": 0.8', f'"temp": {number}'))
    with pytest.raises(UserError, match="or is broken: "):
        session.session_sampling(tmp_path / "spoilt")


def spoil_file(path, to, spoil):
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}
    spoil(tensors, metadata)
    save_file(tensors, to, metadata)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t, m: t.pop("gen.cache"), r"gen\.cache is not in both"),
        (lambda t, m: t.update(extra=torch.zeros(1)), "extra is not in both"),
        (
            lambda t, m: t.update({"gen.cache": torch.zeros(2)}),
            r"cache was saved as \(2,\) float32",
        ),
        (lambda t, m: t.update({"gen.offsets": t["gen.offsets"].int()}), r"\(1,\) int32, here"),
        (told('"format": 1', '"format": 9'), "format 9, this version reads 1"),
        (told('.capacity": 20', '.capacity": 21'), "capacity was saved as 21, here it is 20"),
        (told('.k_cross": null', '.k_cross": 1'), "k_cross was saved as 1, here it is None"),
        (told('"cpu"', '"cuda"'), "saved with device cuda, here it is cpu"),
        (lambda t, m: m.clear(), "is not a saved session"),
        (lambda t, m: m.update({"moshi_ttt.session": "[]"}), r"or is broken: it says \[\]"),
        (told('"values"', '"vale"'), "or is broken: its values is None"),
        (told('"frames": 6', '"frames": "6"'), "or is broken: its frames is '6'"),
        (filled("gen.cache", 10**6), "holds what is no token"),
        (filled("gen.cache", -3), "holds what is no token"),
        (filled("gen.initial", 7), r"gen\.initial is not this model's"),
        (filled("rng.cpu", 0), r"rng\.cpu: Invalid"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(saved, tmp_path, spoil, words):
    path = tmp_path / "spoilt"
    spoil_file(saved / "session", path, spoil)
    with engine_for() as engine:
        before = snapshot(engine)
        with pytest.raises(UserError, match=words):
            load_session(engine, path)
        assert same(snapshot(engine), before)


def test_what_is_no_such_file_is_refused(saved, tmp_path):
    with engine_for() as engine:
        with pytest.raises(UserError, match="is not a saved memory"):
            load_memory(engine, saved / "session")
        (tmp_path / "text").write_text("no tensors here")
        with pytest.raises(UserError, match="or is broken"):
            load_session(engine, tmp_path / "text")
        (tmp_path / "cut").write_bytes((saved / "session").read_bytes()[:5000])
        with pytest.raises(UserError, match="or is broken"):
            load_session(engine, tmp_path / "cut")


def test_a_model_without_a_memory_to_keep(tmp_path):
    with engine_for(hybrid(persistent_states=False)) as engine:
        with pytest.raises(UserError, match="keeps nothing"):
            save_memory(engine, tmp_path / "m")
    lm = hybrid()
    unsplice(lm)
    with engine_for(lm) as engine:
        with pytest.raises(UserError, match="has no memory"):
            save_memory(engine, tmp_path / "m")
        save_session(engine, tmp_path / "s")
        wanted = run(engine, noise(3))
        load_session(engine, tmp_path / "s")
        assert torch.equal(run(engine, noise(3))[0], wanted[0])
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
