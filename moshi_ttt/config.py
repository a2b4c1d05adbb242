"""What a memory is and where it goes: the configuration that travels with a checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

PLACEMENTS = ("parallel", "after_attention")
DEFAULT_BASE_LR = {"ttt_linear": 1.0, "ttt_mlp": 0.1}
"""Memory family -> base inner learning rate (arXiv:2407.04620, section 2.7)."""


@dataclass(frozen=True)
class TTTConfig:
    """Which memory is spliced into which layers of the temporal transformer.

    Attributes:
        memory: family, a key of `moshi_ttt.memory.MEMORIES`.
        layers: `"all"`, `"every:N"` (layers N-1, 2N-1, ...) or a list of layer indices from 0.
        placement: `"parallel"` reads what attention reads; `"after_attention"` reads its output.
        num_heads: heads of the memory; None takes the host's.
        chunk_size: frames of a chunk (the papers call it mini-batch). Part of the trained model:
            serving at another one is another function.
        write_every: chunks from one write of the fast weights to the next, N; what the chunks
            between read of their own frames is forgotten at their end. Part of the trained model.
        writing: False is an ablation: the fast weights stay at W0 and only the slow ones are left.
        base_lr: base inner learning rate; None takes the family's.
        decay: start of the learned per-head decay towards W0 at each write; 0 is plain TTT.
        conv_width: frames seen by the short convolution on q and k.
        hidden_mult: hidden width of a fast MLP, in head widths.
        persistent_states: False gives every call a fresh state and leaves nothing to save.
        state_passing: training goes through recordings segment by segment and hands the state on;
            False starts every segment from W0.
        detach_memory_output: an ablation, of training only: the loss reaches the gate but not the
            memory, so q, k, v, the learning rates and W0 learn nothing.

    Raises:
        ValueError: a value out of range, named with the value.
    """

    memory: str = "ttt_mlp"
    layers: str | tuple[int, ...] = "every:4"
    placement: str = "parallel"
    num_heads: int | None = None
    chunk_size: int = 16
    write_every: int = 1
    writing: bool = True
    base_lr: float | None = None
    decay: float = 1e-3
    conv_width: int = 4
    hidden_mult: int = 4
    persistent_states: bool = True
    state_passing: bool = True
    detach_memory_output: bool = False

    def __post_init__(self) -> None:
        """Check every value and fill in the family's defaults."""
        if self.memory not in DEFAULT_BASE_LR:
            raise ValueError(f"memory {self.memory!r} is unknown; choose {list(DEFAULT_BASE_LR)}")
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement {self.placement!r} is unknown; choose {list(PLACEMENTS)}")
        if not isinstance(self.layers, str):
            object.__setattr__(self, "layers", tuple(self.layers))
        for name in ("chunk_size", "write_every", "conv_width", "hidden_mult"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.num_heads is not None and (type(self.num_heads) is not int or self.num_heads < 1):
            raise ValueError(f"num_heads must be at least 1 or null, got {self.num_heads!r}")
        if type(self.writing) is not bool:
            raise ValueError(f"writing must be true or false, got {self.writing!r}")
        if self.base_lr is None:
            object.__setattr__(self, "base_lr", DEFAULT_BASE_LR[self.memory])
        elif not self.base_lr > 0:
            raise ValueError(f"base_lr must be positive, got {self.base_lr!r}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay!r}")

    def layer_indices(self, num_layers: int) -> list[int]:
        """Indices of the layers meant, of a transformer with `num_layers`.

        Raises:
            ValueError: no layer matches, one is out of range or named twice.
        """
        if self.layers == "all":
            return list(range(num_layers))
        if isinstance(self.layers, str):
            head, _, step = self.layers.partition(":")
            if head != "every" or not step.isdecimal() or int(step) < 1:
                raise ValueError(
                    f"layers {self.layers!r} is not 'all', 'every:N' or a list of indices"
                )
            found = list(range(int(step) - 1, num_layers, int(step)))
            if not found:
                raise ValueError(f"layers {self.layers!r} matches none of {num_layers} layers")
            return found
        for i in self.layers:
            if type(i) is not int or not 0 <= i < num_layers:
                raise ValueError(f"layer {i!r} is out of range: 0 to {num_layers - 1} exist")
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers {list(self.layers)} is empty or names a layer twice")
        return sorted(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TTTConfig:
        """Build from plain values.

        Raises:
            ValueError: a key that is not a field, named.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r} in the memory's configuration")
        return cls(**values)
