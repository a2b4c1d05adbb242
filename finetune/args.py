"""What a training run is told: moshi-finetune's keys, the memory's, and our own; all checked."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import Any

from finetune.checks import at_least, check, one_of, positive
from finetune.sizes import SIZES
from moshi_ttt.config import TTTConfig


@dataclass(frozen=True)
class ModelPaths:
    """Where the base model is, or that there is none.

    Attributes:
        hf_repo_id: repository on the Hugging Face hub, or null if all four paths are given.
        size: of `finetune.sizes`: no base but random weights from `seed`, all of them trained, on
            codes. Mimi and tokenizer are then optional: for audio and for transcripts.
        mimi_path: Mimi's weights.
        moshi_path: the language model's weights.
        tokenizer_path: the sentencepiece model of the text.
        config_path: config.json of the language model.
    """

    hf_repo_id: str | None = ""
    size: str | None = None
    mimi_path: str | None = None
    moshi_path: str | None = None
    tokenizer_path: str | None = None
    config_path: str | None = None

    def __post_init__(self) -> None:
        """Fill in the default repository and check every value."""
        if self.hf_repo_id == "":  # not given; a file's empty text is null
            default = None if self.size else "kyutai/moshiko-pytorch-bf16"
            object.__setattr__(self, "hf_repo_id", default)
        if self.size is not None:
            one_of(self, "size", tuple(SIZES))
            for key in ("hf_repo_id", "moshi_path", "config_path"):
                value = getattr(self, key)
                check(
                    value is None,
                    f"{key} is {value!r}, but size is {self.size!r}, which is random weights: "
                    "leave one of them out",
                )
            return
        paths = ("moshi_path", "mimi_path", "tokenizer_path", "config_path")
        missing = [p for p in paths if not getattr(self, p)]
        check(
            bool(self.hf_repo_id) or not missing,
            f"hf_repo_id is null, so {', '.join(missing)} must be given too",
        )

    @property
    def is_remote(self) -> bool:
        """Whether the language model has to come from the hub; a corpus may yet make a folder."""
        name = self.hf_repo_id or ""
        return not (self.moshi_path or name.startswith((".", "/", "~")) or name.count("/") != 1)


@dataclass(frozen=True)
class LoraArgs:
    """Low-rank adapters on every Linear.

    Attributes:
        enable: train them.
        rank: width of an adapter.
        scaling: factor on what an adapter adds.
        path: a lora.safetensors to go on from, ours or moshi-finetune's; null starts at nothing.
        ft_embed: train the embeddings in full beside them.
    """

    enable: bool = False
    rank: int = 64
    scaling: float = 2.0
    path: str | None = None
    ft_embed: bool = False

    def __post_init__(self) -> None:
        """Check every value."""
        at_least(self, 1, "rank")
        positive(self, "scaling")


@dataclass(frozen=True)
class DataArgs:
    """What is trained and evaluated on.

    Attributes:
        train_data: manifests as `"a.jsonl:weight,b.jsonl"`; weight 1 where none is given.
        eval_data: the same, held out.
        corpus: one that is fetched or made first (`finetune.corpora`); null is none.
        shuffle: a new order of the segments in every epoch.
        codes_cache: folder for Mimi's codes of whole recordings, made once.
        mono_side: whose voice a mono recording is: `"moshi"` or `"user"`; the other is silent.
        encode_workers: processes that encode; null is one per core.
    """

    train_data: str = ""
    eval_data: str = ""
    corpus: str | None = None
    shuffle: bool = False
    codes_cache: str = "data/codes"
    mono_side: str = "moshi"
    encode_workers: int | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        check(bool(self.train_data.strip()), "train_data is empty: name a manifest (jsonl)")
        check(bool(self.codes_cache), "codes_cache is empty: name a folder")
        one_of(self, "mono_side", ("moshi", "user"))
        at_least(self, 1, "encode_workers")

    @property
    def workers(self) -> int:
        """Processes that encode."""
        return self.encode_workers or os.cpu_count() or 1


@dataclass(frozen=True)
class OptimArgs:
    """AdamW and its schedule.

    Attributes:
        lr: highest learning rate of LoRA or of the base's own weights.
        weight_decay: AdamW's, where decay applies.
        pct_start: part of `max_steps` in which the rate rises, 0 to 1.
        schedule: `"onecycle"` (as moshi-finetune) or `"cosine"` (linear rise, cosine to 1 %).
        ttt_lr: highest learning rate of the memory's slow weights; null is `lr`.
        gate_lr: highest learning rate of the gates; null is `lr`.
        betas: AdamW's.
    """

    lr: float = 1e-4
    weight_decay: float = 0.1
    pct_start: float = 0.05
    schedule: str = "onecycle"
    ttt_lr: float | None = None
    gate_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        """Check every value."""
        positive(self, "lr", "ttt_lr", "gate_lr")
        at_least(self, 0, "weight_decay", "pct_start")
        check(self.pct_start < 1, f"pct_start must be below 1, got {self.pct_start}")
        one_of(self, "schedule", ("onecycle", "cosine"))
        ok = all(0 <= b < 1 for b in self.betas)
        check(ok, f"betas must each be in [0, 1), got {list(self.betas)}")


@dataclass(frozen=True)
class GateRegArgs:
    """A term of the loss that pushes every gate of the memories away from one half.

    It is `weight * mean of 4 g (1 - g)` over the channels of all memories, `g = |tanh(gate)|`, and
    in no NLL that is reported.

    Attributes:
        weight: 0 is off.
        warmup_steps: steps, from `memory_start_step` on, in which the weight rises from 0, in a
            line; null is the outer warm-up.
    """

    weight: float = 0.0
    warmup_steps: int | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        at_least(self, 0, "weight")
        at_least(self, 1, "warmup_steps")


@dataclass(frozen=True)
class WandbArgs:
    """Weights & Biases; metrics go to JSONL in any case.

    Attributes:
        project: null is off.
        run_name: null takes the run folder's name.
        offline: write to disk only.
        key: must stay empty; a key belongs in the environment, as WANDB_API_KEY.
    """

    project: str | None = None
    run_name: str | None = None
    offline: bool = False
    key: str | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        # the key itself is kept out of the message
        check(
            not self.key,
            "key must stay empty: a secret does not belong in a config file; "
            "give it in the environment variable WANDB_API_KEY",
        )


@dataclass(frozen=True)
class EvalArgs:
    """Evaluation beyond the attention window.

    Attributes:
        librilight_data: a folder in Libri-Light's layout or a manifest, scored when held-out data
            is, and after training.
        eval_after_training: score base and trained model when training ends, by position and at
            20 lengths (0.5x to 10x the segment).
        max_items: at most that many recordings; null is all.
        frames_per_call: frames of one call of the streaming model.
    """

    librilight_data: str | None = None
    eval_after_training: bool = True
    max_items: int | None = None
    frames_per_call: int = 50

    def __post_init__(self) -> None:
        """Check every value."""
        at_least(self, 1, "max_items", "frames_per_call")


@dataclass(frozen=True)
class TrainArgs:
    """A whole run. Lengths are in seconds, intervals in optimizer steps.

    Attributes:
        run_dir: where everything of the run goes.
        overwrite_run_dir: move an older run aside instead of refusing.
        ttt: the memory; null is none.
        full_finetuning: train all of the base instead of LoRA.
        duration_sec: length of a segment, what one step sees of a recording.
        batch_size: rows of a micro-batch, on each rank; every row is a lane.
        num_microbatches: batches whose gradients make one step, each with lanes of its own.
        carry_kv: lanes also carry each layer's keys and values, so that training sees what
            streaming sees; off, attention starts empty in every segment.
        state_reset_interval: steps after which all lanes start anew, where they are reading; 0 is
            never.
        tbptt_segments: segments of a lane in a step, through which gradients flow.
        memory_start_step: steps before which the memory neither reads nor writes.
        memory_warmup_steps: steps, from there on, in which `base_lr` rises from a tenth to all of
            it; null is the outer warm-up.
        gate_reg: pushes the gates away from one half; off unless set.
        monitor_freq: steps between readings of what the memories are doing, to `memory.jsonl`; 0
            is off.
        max_skipped_steps: steps in a row whose loss or gradient is not a number, after which the
            run stops.
        max_norm: gradients are clipped to this norm.
        ckpt_freq: steps between checkpoints; below 1 only the last is saved.
        num_ckpt_keep: newest checkpoints kept; null is all.
        save_adapters: false merges LoRA into the base when saving.
        do_eval: score held-out data every `eval_freq` steps (below 1: only after the last).
        param_dtype: compute dtype on CUDA; the CPU computes in float32.
        first_codebook_weight_multiplier: weight of codebook 0 against each other codebook.
        text_padding_weight: weight of a padding token in the text loss.

    Raises:
        UserError: a value out of range, keys that contradict each other, nothing to train.
    """

    data: DataArgs
    run_dir: str
    overwrite_run_dir: bool = False
    seed: int = 0
    moshi_paths: ModelPaths = field(default_factory=ModelPaths)
    lora: LoraArgs = field(default_factory=LoraArgs)
    ttt: TTTConfig | None = None
    full_finetuning: bool = False
    duration_sec: float = 10.0
    batch_size: int = 1
    num_microbatches: int = 1
    carry_kv: bool = False
    state_reset_interval: int = 100
    tbptt_segments: int = 1
    memory_start_step: int = 0
    memory_warmup_steps: int | None = None
    gate_reg: GateRegArgs = field(default_factory=GateRegArgs)
    monitor_freq: int = 20
    max_skipped_steps: int = 10
    max_steps: int = 100
    max_norm: float = 1.0
    optim: OptimArgs = field(default_factory=OptimArgs)
    log_freq: int = 1
    do_ckpt: bool = True
    ckpt_freq: int = 0
    num_ckpt_keep: int | None = 3
    save_adapters: bool = True
    do_eval: bool = False
    eval_freq: int = 0
    eval: EvalArgs = field(default_factory=EvalArgs)
    param_dtype: str = "bfloat16"
    first_codebook_weight_multiplier: float = 1.0
    text_padding_weight: float = 0.5
    gradient_checkpointing: bool = True
    wandb: WandbArgs = field(default_factory=WandbArgs)

    def __post_init__(self) -> None:
        """Check every value."""
        check(bool(self.run_dir), "run_dir is empty: name a folder")
        at_least(self, 0, "seed", "text_padding_weight")
        at_least(self, 0, "state_reset_interval", "memory_start_step", "monitor_freq")
        at_least(self, 1, "batch_size", "num_microbatches", "max_steps", "log_freq")
        at_least(self, 1, "num_ckpt_keep", "tbptt_segments", "memory_warmup_steps")
        at_least(self, 1, "max_skipped_steps")
        positive(self, "duration_sec", "max_norm", "first_codebook_weight_multiplier")
        one_of(self, "param_dtype", ("bfloat16", "float32"))
        full, lora = self.full_finetuning, self.lora
        check(
            not (full and lora.enable),
            "full_finetuning and lora.enable contradict each other: both are true",
        )
        size = self.moshi_paths.size
        check(
            full or size is None,
            f"full_finetuning is false, but moshi_paths.size is {size!r}, and random weights are "
            "all trained: set it to true",
        )
        check(
            full or lora.enable or not lora.ft_embed,
            "lora.ft_embed needs lora.enable: one is true, the other false",
        )
        check(
            full or lora.enable or self.ttt is not None,
            "full_finetuning and lora.enable are false and ttt is null: nothing to train",
        )
        check(
            self.ttt is not None or self.gate_reg.weight == 0,
            f"gate_reg.weight is {self.gate_reg.weight}, but ttt is null: there is no gate",
        )
        start = self.memory_start_step
        check(
            self.ttt is None or start < self.max_steps,
            f"memory_start_step is {start}, but max_steps {self.max_steps}: no step would use it",
        )
        check(
            full or lora.enable or start == 0,
            f"memory_start_step is {start}, but before it there is nothing else to train",
        )
        check(
            not self.do_eval or bool(self.data.eval_data or self.eval.librilight_data),
            "do_eval is true, but data.eval_data and eval.librilight_data are both empty",
        )

    @property
    def passes_states(self) -> bool:
        """Whether the memories' states go from segment to segment."""
        ttt = self.ttt
        return ttt is not None and ttt.state_passing and ttt.persistent_states

    @property
    def whole_recordings(self) -> bool:
        """Whether a lane reads recordings from end to end: something is carried through them."""
        return self.passes_states or self.carry_kv

    def to_dict(self) -> dict[str, Any]:
        """The run as plain values; written as yaml, `load_args` reads the same run from it."""
        values = asdict(self)
        values["optim"]["betas"] = list(self.optim.betas)
        values["ttt"] = self.ttt.to_dict() if self.ttt else None
        return values
