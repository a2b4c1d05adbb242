"""The shipped codec on voices it never heard, and whole recordings through it."""

import json

import pytest
import torch
from moshi.models.loaders import get_mimi

from moshi_ttt.codec import encode_recording
from moshi_ttt.ring import widen_kv_rings
from moshi_ttt.tiny import CorpusSpec, load_codec
from moshi_ttt.tiny.codec import train
from moshi_ttt.tiny.measure import measure_codec
from moshi_ttt.tiny.model import ASSETS
from moshi_ttt.tiny.oracle import report
from moshi_ttt.tiny.plan import plan_corpus
from moshi_ttt.tiny.speech import render


@pytest.fixture(scope="module")
def mimi():
    torch.set_num_threads(1)
    return load_codec()


def _heldout(count, seconds):
    plan = plan_corpus(CorpusSpec(heldout_readings=count, heldout_seconds=seconds))
    return [r for r in plan if r.split == "heldout"]


def test_level_rhythm_and_codes_on_held_out_speech(mimi):
    found = measure_codec(mimi, _heldout(5, 30))
    assert abs(found["level_db"]) < 2
    assert found["envelope"] > 0.9
    assert found["silence_dbfs"] < -50
    assert found["silence_steady"]
    assert 3 < found["entropy"][0] < 4.2
    assert min(found["entropy"]) > 2.5
    assert min(found["used"]) > 48
    assert found["repeat"][0] > 0.7


def test_what_is_shipped_is_small():
    assert sum(p.stat().st_size for p in ASSETS.iterdir()) < 4_000_000


@pytest.mark.parametrize("frames_per_call", [3, 50])
def test_several_frames_a_call_equal_one_by_one(mimi, frames_per_call):
    pcm = torch.from_numpy(render(_heldout(1, 12)[0])[0])[0]
    # Two unlike channels, and a last frame that is not whole.
    pcm = torch.stack([pcm, 0.5 * pcm.roll(12_345)])[:, : 120 * 1920 + 700]
    codes = encode_recording(mimi, pcm, frames_per_call)
    assert codes.shape == (2, 8, 121)
    padded = torch.nn.functional.pad(pcm, (0, 1220))
    with torch.no_grad(), mimi.streaming(2):
        widen_kv_rings(mimi, 2)
        single = [mimi.encode(frame[:, None]) for frame in padded.split(1920, dim=-1)]
    # A latent may lie on the border between two codes, where rounding decides.
    assert (codes == torch.cat(single, -1)).float().mean() > 0.999
    with torch.no_grad():
        offline = mimi.encode(padded[:, None])
    assert (codes == offline).float().mean() > 0.999
    assert not mimi.is_streaming


def test_whole_recordings_are_exact_in_float64():
    mimi = load_codec().double()
    pcm = torch.from_numpy(render(_heldout(1, 12)[0])[0]).double()
    one = encode_recording(mimi, pcm, 1)
    assert torch.equal(one, encode_recording(mimi, pcm, 7))
    assert torch.equal(one, encode_recording(mimi, pcm, 150))


@pytest.mark.parametrize(
    ("pcm", "match"),
    [
        (torch.zeros(5), "channels"),
        (torch.zeros(1, 0), "empty"),
        (torch.tensor([[0.0, float("nan")]]), "finite"),
    ],
)
def test_bad_audio_is_refused(mimi, pcm, match):
    with pytest.raises(ValueError, match=match):
        encode_recording(mimi, pcm)
    with pytest.raises(ValueError, match="frames_per_call"):
        encode_recording(mimi, torch.zeros(1, 1920), 0)


def test_the_script_runs_and_its_codec_loads(mimi, tmp_path):
    made_how = train(str(tmp_path), minutes=0.5, encoder_steps=4, decoder_steps=2)
    assert made_how["seconds"] > 0
    config = json.loads((tmp_path / "mimi_config.json").read_text())
    assert config == json.loads((ASSETS / "mimi_config.json").read_text())
    made = get_mimi(tmp_path / "mimi.safetensors", config, num_codebooks=8)
    codes = encode_recording(made, torch.from_numpy(render(_heldout(1, 12)[0])[0]))
    assert all(len(row.unique()) > 8 for row in codes[0])
    assert made.state_dict().keys() == mimi.state_dict().keys()


def test_remembering_pays_on_this_corpus():
    found = report(train=1, heldout=2)
    for stretch in ("1 to 4", "4 to 10", "20 to 59"):
        kept, reset = found["windows"][stretch]
        assert kept < reset - 0.5


@pytest.mark.slow
def test_the_script_makes_a_codec_as_good_as_the_shipped_one(mimi, tmp_path):
    train(str(tmp_path), seed=1)
    config = json.loads((tmp_path / "mimi_config.json").read_text())
    made = get_mimi(tmp_path / "mimi.safetensors", config, num_codebooks=8)
    new, shipped = (measure_codec(codec, _heldout(5, 60)) for codec in (made, mimi))
    assert abs(new["level_db"]) < 2
    assert new["silence_dbfs"] < -50
    assert new["envelope"] > shipped["envelope"] - 0.03
    assert new["repeat"][0] > shipped["repeat"][0] - 0.1
    assert abs(new["entropy"][0] - shipped["entropy"][0]) < 0.3
