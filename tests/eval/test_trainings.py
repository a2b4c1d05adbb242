"""How arms were trained: what a report says of it, and that the shipped arms are alike."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from eval.arms import BASE, KEPT, Arm
from eval.panel import read_panel
from eval.trainings import heard_before, run_of, training_of, unlike
from finetune.load_args import load_args
from moshi_ttt.base import find_base, load_base
from moshi_ttt.checkpoint import save_checkpoint
from moshi_ttt.config import TTTConfig
from moshi_ttt.hybrid import splice
from moshi_ttt.lora import add_lora
from tests.eval.test_panel import speak
from tests.small import small_base

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("arm", "keys"),
    [
        ("tiny_lora", {"run_dir", "ttt", "lora.rank"}),
        ("tiny_writing_off", {"run_dir", "ttt.writing"}),
        ("tiny_memory_only", {"run_dir", "lora.enable", "lora.rank"}),
    ],
)
def test_a_baselines_config_differs_in_nothing_else(arm, keys):
    def flat(values, prefix=""):
        found = {}
        for key, value in values.items():
            name = f"{prefix}{key}"
            found |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
        return found

    one, other = (flat(load_args(CONFIGS / f"{n}.yaml").to_dict()) for n in ("tiny", arm))
    if arm == "tiny_lora":
        one = {k: v for k, v in one.items() if not k.startswith("ttt.")} | {"ttt": "the memory"}
    assert {k for k in one.keys() | other.keys() if one.get(k) != other.get(k)} == keys


def saved(folder, base, rank, *, memory, config=None):
    lm = load_base(base, dtype=torch.float32)
    add_lora(lm, rank, 2.0)
    if memory:
        splice(lm, TTTConfig(layers="all", chunk_size=4, num_heads=2))
    place = folder / "checkpoints/checkpoint_000007"
    save_checkpoint(lm, place, base, extra={"step": 7})
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return place / "consolidated", sum(p.numel() for p in lm.parameters() if p.requires_grad)


def test_what_is_known_of_a_training(tmp_path):
    base = find_base(small_base(tmp_path / "base"))
    config = {"seed": 3, "max_steps": 7, "batch_size": 2, "duration_sec": 1.0,
              "data": {"train_data": "a.jsonl"}}  # fmt: skip
    ours, _ = saved(tmp_path / "ours", base, 2, memory=True, config=config)
    like, _ = saved(tmp_path / "like", base, 2, memory=True, config=config)
    other, _ = saved(tmp_path / "other", base, 4, memory=False, config=config | {"seed": 4})
    alone, _ = saved(tmp_path / "alone", base, 2, memory=True)
    assert run_of(ours) == tmp_path / "ours"
    assert run_of(alone) is None
    arms = {name: Arm(name, name, "", place) for name, place in
            {"ours": ours, "like": like, "other": other, "alone": alone}.items()}  # fmt: skip
    found = {name: training_of(arm, base) for name, arm in arms.items()}
    found["base"] = training_of(BASE, base)
    assert found["base"] is None
    assert found["ours"] == {"parameters": found["like"]["parameters"], "step": 7, "seed": 3,
                             "max_steps": 7, "batch_size": 2, "duration_sec": 1.0,
                             "data.train_data": "a.jsonl"}  # fmt: skip
    lines = unlike(found, "ours")
    assert not any(line.startswith(("like", "base")) for line in lines)
    assert "other has seed 4, ours has 3" in lines
    assert any(line.startswith("other has ") and "trained parameters" in line for line in lines)
    assert "alone: its seed is not known to be that of ours" in lines
    assert unlike(found, KEPT.name) == []


def test_recordings_and_speakers_that_were_trained_on_are_said(tmp_path):
    lines = []
    for i in range(4):
        speak(tmp_path / f"{i}.wav", 0.5, seed=i)
        lines.append({"path": f"{i}.wav", "duration": 0.5, "speaker": f"s{i % 3}"})

    def manifest(name, *which):
        file = tmp_path / name
        file.write_text("".join(json.dumps(lines[i]) + "\n" for i in which))
        return str(file)

    panel = read_panel(manifest("panel.jsonl", 0, 1, 2))
    base = find_base(small_base(tmp_path / "base"))
    arms = []
    for name, data in (
        ("clean", manifest("clean.jsonl")),
        ("dirty", manifest("dirty.jsonl", 1, 3)),  # 3 is of the speaker of 0
        ("gone", "nowhere.jsonl"),
        ("alone", None),
    ):
        config = None if data is None else {"data": {"train_data": data}}
        place, _ = saved(tmp_path / name, base, 2, memory=False, config=config)
        arms.append(Arm(name, name, "", place.parent))
    said = heard_before([BASE, *arms], panel)
    assert said[0] == f"dirty WAS TRAINED on 1 of these 3 recordings, {tmp_path}/1.wav is one"
    assert said[1] == (
        "dirty WAS TRAINED on other speech of the speakers of 1 of these 3 recordings, "
        f"{tmp_path}/0.wav is one"
    )
    assert said[2].startswith("gone: not known if it was trained on these recordings: data source")
    assert said[3].endswith("alone/checkpoints/checkpoint_000007: not known if it was trained on "
                            "these recordings")  # fmt: skip
    assert len(said) == 4
