"""A conversation saved and loaded goes on to the bit; a memory alone starts a new one."""

import os
import subprocess
import sys
import types

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moshi_ttt import session, state_file
from moshi_ttt.base import find_base
from moshi_ttt.checkpoint import save_checkpoint
from moshi_ttt.engine import Engine, Sampling, memory_norms
from moshi_ttt.errors import UserError
from moshi_ttt.hybrid import unsplice
from moshi_ttt.memory import MEMORIES
from moshi_ttt.saved_memory import load_memory, save_memory
from moshi_ttt.session import load_session, save_session
from moshi_ttt.states import save_ttt_states
from moshi_ttt.stream import main
from tests.small import small_base, small_hybrid, small_lm, small_mimi, small_tokenizer

CARD = small_tokenizer().vocab_size()
FRAME = 1920
CUT = 26  # beyond the attention window, in the middle of a chunk


def hybrid(seed=0, **config):
    return small_hybrid(seed=seed, lm={"text_card": CARD}, **config)


def engine_for(lm=None, mimi_seed=0, **options):
    return Engine(lm or hybrid(), small_mimi(seed=mimi_seed), small_tokenizer(), **options)


def noise(frames, rows=1):
    generator = torch.Generator().manual_seed(0)
    return 0.1 * torch.randn(frames, rows, 1, FRAME, generator=generator)


def run(engine, frames):
    said = [(f.pcm.clone(), f.tokens.clone()) for f in map(engine.step, frames)]
    return torch.cat([pcm for pcm, _ in said], 1), torch.stack([t for _, t in said], 2)


def snapshot(engine):
    tensors, values = session._split(session._live(engine))
    return {k: t.clone() for k, t in tensors.items()}, values, torch.get_rng_state()


def same(a, b):
    return (
        a[1] == b[1]
        and torch.equal(a[2], b[2])
        and all(torch.equal(a[0][k], b[0][k]) for k in a[0])
    )


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("device", DEVICES)
def test_a_loaded_session_goes_on_to_the_bit(tmp_path, device, greedy, rows):
    sampling, frames, path = Sampling(greedy=greedy), noise(CUT + 9, rows), tmp_path / "s"

    def start(seed):
        models = hybrid().to(device), small_mimi().to(device)
        return Engine(*models, small_tokenizer(), sampling=sampling, rows=rows, seed=seed)

    with start(3) as engine:
        fresh = snapshot(engine)
        run(engine, frames[:CUT])
        save_session(engine, path)
        moved = snapshot(engine)
        wanted = run(engine, frames[CUT:])
    still = [k for k in fresh[0] if torch.equal(fresh[0][k], moved[0][k]) and fresh[0][k].numel()]
    assert all(k.endswith((".exec_mask", ".first", ".initial")) for k in still)
    with start(4) as engine:
        run(engine, noise(3, rows))
        places = {k: v.data_ptr() for k, v in session._split(session._live(engine))[0].items()}
        load_session(engine, path)
        assert same(snapshot(engine), moved)
        assert engine.frames == CUT
        after = session._split(session._live(engine))[0]
        assert {k: v.data_ptr() for k, v in after.items()} == places  # as a CUDA graph needs it
        again = run(engine, frames[CUT:])
    assert torch.equal(again[0], wanted[0])
    assert torch.equal(again[1], wanted[1])
    assert session.session_sampling(path) == sampling
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_what_is_left_out_of_a_session_would_be_missed(tmp_path):
    """With any part of it as in a fresh stream, another voice speaks."""
    frames, path = noise(CUT + 6), tmp_path / "s"
    with engine_for(seed=3) as engine:
        fresh = session._split(session._live(engine))[0]
        fresh = {k: v.clone() for k, v in fresh.items()} | {"rng.cpu": torch.get_rng_state()}
        run(engine, frames[:CUT])
        save_session(engine, path)
        wanted = run(engine, frames[CUT:])
        with safe_open(path, "pt") as file:
            metadata, saved = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}
        for part in (
            "mimi",
            "gen",
            "lm.transformer.layers.0.self_attn",
            "seq_modeling_block",
            "rng",
        ):
            mixed = {k: fresh[k] if part in k else v for k, v in saved.items()}
            save_file(mixed, path, metadata)
            load_session(engine, path)
            assert not torch.equal(run(engine, frames[CUT:])[0], wanted[0]), part


def test_a_value_of_unknown_kind_is_an_error():
    with engine_for() as engine:
        engine.gen._streaming_state.surprise = {"a": 1}
        with pytest.raises(TypeError, match=r"gen\.surprise is a dict"):
            session._live(engine)


# -- a memory -------------------------------------------------------------------------------------


def first_logits(engine, frame):
    seen = []
    engine.gen.on_text_logits_hook = lambda logits: seen.append(logits.clone())
    engine.step(frame)
    return seen[0]


@pytest.mark.parametrize("family", list(MEMORIES))
def test_a_kept_memory_starts_another_conversation(tmp_path, family):
    path, frame = tmp_path / "m", noise(1)[0]
    with engine_for(hybrid(memory=family), seed=3) as engine:
        run(engine, noise(CUT))
        save_memory(engine, path)
        kept = save_ttt_states(engine.lm)
        norms = memory_norms(engine.lm)
    with engine_for(hybrid(memory=family), seed=3) as engine:
        fresh = first_logits(engine, frame)
    with engine_for(hybrid(memory=family), seed=3) as engine:
        before = save_ttt_states(engine.lm)
        load_memory(engine, path)
        now = save_ttt_states(engine.lm)
        assert memory_norms(engine.lm) == norms
        other = first_logits(engine, frame)
    assert (fresh - other).abs().max() > 1e-3
    for block, state in kept.items():
        tensors = state["streaming"]
        assert tensors["fast.pos"].item() % 4  # in the middle of a chunk
        assert all(torch.equal(t, now[block]["streaming"][n]) for n, t in tensors.items())
        for n, t in tensors.items():
            assert not t.numel() or not torch.equal(t, before[block]["streaming"][n]), n


# -- refusals -------------------------------------------------------------------------------------


def stock(seed=0):
    return small_lm(seed=seed, text_card=CARD).eval()


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


# -- through the command line ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talking")
    base = find_base(small_base(folder / "base"))
    out = save_checkpoint(hybrid(), folder / "checkpoint_000001", base)
    rng = np.random.default_rng(0)
    samples = 0.1 * rng.standard_normal(17 * FRAME + 555)
    for name, part in {
        "all": samples,
        "1": samples[: 7 * FRAME],
        "2": samples[7 * FRAME :],
    }.items():
        soundfile.write(folder / f"{name}.wav", part, 24_000, subtype="FLOAT")
    return types.SimpleNamespace(root=folder, checkpoint=str(out))


def test_a_file_cut_in_two_is_the_whole(talking, tmp_path, capsys):
    """Sampled, and the second half in a process of its own."""
    kept, how = str(tmp_path / "kept"), ["--seed", "7", "--temp", "1.1"]

    def argv(name, *more):
        files = [
            "--file",
            str(talking.root / f"{name}.wav"),
            "--out",
            str(tmp_path / f"{name}.wav"),
        ]
        return [*files, "--checkpoint", talking.checkpoint, *more]

    main(argv("all", *how))
    whole_text = capsys.readouterr().out
    main(argv("1", *how, "--save-session", kept))
    first_text = capsys.readouterr().out
    environment = {k: v for k, v in os.environ.items() if k != "NO_TORCH_COMPILE"}
    command = [sys.executable, "-m", "moshi_ttt.stream", *argv("2", "--load-session", kept)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert first_text.rstrip("\n") + done.stdout == whole_text
    whole, first, second = (
        soundfile.read(tmp_path / f"{name}.wav", dtype="int16")[0] for name in ("all", "1", "2")
    )
    assert len(whole) == 17 * FRAME + 555
    assert np.array_equal(np.concatenate([first, second]), whole)
    assert whole.std() > 30


@pytest.mark.parametrize("family", list(MEMORIES))
def test_a_kept_memory_through_the_command_line(talking, tmp_path, capsys, family):
    base = find_base(talking.root / "base")
    checkpoint = save_checkpoint(hybrid(memory=family), tmp_path / "checkpoint_000001", base)

    def argv(*more):
        files = ["--file", str(talking.root / "1.wav"), "--out", str(tmp_path / "out.wav")]
        return [*files, "--checkpoint", str(checkpoint), *more]

    main(argv("--save-memory", str(tmp_path / "kept")))
    before = (tmp_path / "out.wav").read_bytes()
    assert f"saved {tmp_path / 'kept'}" in capsys.readouterr().err
    main(argv("--load-memory", str(tmp_path / "kept")))
    assert (tmp_path / "out.wav").read_bytes() != before


def test_a_session_can_go_on_with_another_seed(talking, tmp_path):
    def voice(name, *more):
        out = tmp_path / "out.wav"
        files = ["--file", str(talking.root / f"{name}.wav"), "--out", str(out)]
        main([*files, "--checkpoint", talking.checkpoint, *more])
        return out.read_bytes()

    kept = str(tmp_path / "kept")
    voice("1", "--save-session", kept)
    first = voice("1", "--load-session", kept)
    assert voice("1", "--load-session", kept) == first
    other = voice("1", "--load-session", kept, "--seed", "8")
    assert other != first
    assert voice("1", "--load-session", kept, "--seed", "8") == other
