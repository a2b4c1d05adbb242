"""What a memory is and where it goes: the configuration that travels with a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import Any

PLACEMENTS = ("parallel", "after_attention")
PROJECTIONS = ("own", "shared")
POLYNOMIALS = ("none", "elementwise", "outer")

FAMILIES: dict[str, dict[str, Any]] = {
    "ttt_linear": {"base_lr": 1.0, "decay": 1e-3, "conv_width": 4, "write_every": 1},
    "ttt_mlp": {
        "base_lr": 0.1, "decay": 1e-3, "conv_width": 4, "write_every": 1, "hidden_mult": 4,
    },
    "lact": {
        "base_lr": 0.05, "conv_width": 1, "hidden_mult": 1, "momentum": True, "muon": True,
        "low_rank": 32, "stacked": 1, "residual": False,
    },
    "atlas": {
        "base_lr": 0.1, "decay": 1e-4, "conv_width": 4, "hidden_mult": 4, "muon": False,
        "deep": True, "window": 8, "polynomial": "elementwise", "outer_rank": None,
    },
}  # fmt: skip
"""Memory family -> the options that it has beside those of every memory, and their defaults."""
OPTIONS = tuple(dict.fromkeys(name for own in FAMILIES.values() for name in own))
"""The fields of `TTTConfig` that only some families have."""


@dataclass(frozen=True)
class TTTConfig:
    """Which memory is spliced into which layers of the temporal transformer.

    The first group is of every memory. Of the second a family has those that `FAMILIES` lists for
    it; None takes the family's default, and another family's option is refused.

    Attributes:
        memory: family, a key of `moshi_ttt.memory.MEMORIES`.
        layers: `"all"`, `"every:N"` (layers N-1, 2N-1, ...) or a list of layer indices from 0.
        placement: `"parallel"` reads what attention reads; `"after_attention"` reads its output.
        projection: `"own"` weights for q, k, v and the output, or `"shared"`: those of the layer's
            own attention, with a learned scale and offset (of `conv_width` taps) per channel.
        num_heads: heads of the memory; None takes the host's.
        head_dim: width of a head; None is the host's width over the heads.
        chunk_size: frames of a chunk (the papers call it mini-batch). Part of the trained model:
            serving at another one is another function.
        writing: False is an ablation: the fast weights stay at W0 and only the slow ones are left.
        persistent_states: False gives every call a fresh state and leaves nothing to save.
        state_passing: training goes through recordings segment by segment and hands the state on;
            False starts every segment from W0.
        detach_memory_output: an ablation, of training only: the loss reaches the gate but not the
            memory, so q, k, v, the learning rates and W0 learn nothing.
        base_lr: inner learning rate before its gates. LaCT: where the learned one starts.
        decay: TTT: start of the learned per-head decay towards W0 at each write; 0 is plain TTT.
            Atlas: start of `1 - alpha`, the part of the memory that a frame forgets.
        conv_width: frames seen by the short convolution on q and k; 1 is a scale and an offset.
        write_every: chunks from one write of the fast weights to the next, N; what the chunks
            between read of their own frames is forgotten at their end. Part of the trained model.
        hidden_mult: hidden width of the fast weights, in head widths.
        momentum: writes go through an average of past gradients.
        muon: writes are made orthogonal (Newton-Schulz).
        low_rank: rank of the start of the gate and up matrices; 0 starts them in full.
        stacked: SwiGLUs in a chain.
        residual: each SwiGLU of the chain adds to its input.
        deep: a two-layer MLP; False is a linear memory.
        window: frames that the inner loss looks back over (Omega), c; 1 is the delta rule.
        polynomial: features of a key: `"none"`, `"elementwise"` (x, x^2), or `"outer"` (x, x x^T
            behind a learned projection).
        outer_rank: width of that projection; None is the head's.

    Raises:
        ValueError: a value out of range or an option that the family lacks, named with the value.
    """

    memory: str = "ttt_mlp"
    layers: str | tuple[int, ...] = "every:4"
    placement: str = "parallel"
    projection: str = "own"
    num_heads: int | None = None
    head_dim: int | None = None
    chunk_size: int = 16
    writing: bool = True
    persistent_states: bool = True
    state_passing: bool = True
    detach_memory_output: bool = False

    base_lr: float | None = None
    decay: float | None = None
    conv_width: int | None = None
    write_every: int | None = None
    hidden_mult: int | None = None
    momentum: bool | None = None
    muon: bool | None = None
    low_rank: int | None = None
    stacked: int | None = None
    residual: bool | None = None
    deep: bool | None = None
    window: int | None = None
    polynomial: str | None = None
    outer_rank: int | None = None

    def __post_init__(self) -> None:
        """Fill in the family's defaults and check every value."""
        if not isinstance(self.memory, str) or self.memory not in FAMILIES:
            raise ValueError(f"memory {self.memory!r} is unknown; choose {list(FAMILIES)}")
        own = FAMILIES[self.memory]
        given = {name: getattr(self, name) for name in OPTIONS}
        others = [name for name in OPTIONS if name not in own and given[name] is not None]
        if others:
            first, *more = others
            also = f", nor {', '.join(more)}" if more else ""
            raise ValueError(
                f"{first} is no option of {self.memory}, got {given[first]!r}{also}: leave out or "
                f"set to null what {self.memory} lacks (it has {', '.join(own)})"
            )
        for name, value in given.items():
            if value is None:
                object.__setattr__(self, name, own.get(name))
        if not isinstance(self.layers, str):
            if not isinstance(self.layers, Iterable):
                raise ValueError(
                    f"layers {self.layers!r} is not 'all', 'every:N' or a list of indices"
                )
            object.__setattr__(self, "layers", tuple(self.layers))
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (value is None and name in OPTIONS):
                raise ValueError(f"{name} {value!r} is unknown; choose {list(choices)}")
        for name, least in _WHOLE.items():
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(
                    f"{name} must be a whole number of at least {least}, got {value!r}"
                )
        for name in _SWITCHES:
            value = getattr(self, name)
            if value is not None and type(value) is not bool:
                raise ValueError(f"{name} must be true or false, got {value!r}")
        for name in ("base_lr", "decay"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and isfinite(value)):
                raise ValueError(f"{name} must be a number, got {value!r}")
        if self.base_lr is not None and not self.base_lr > 0:
            raise ValueError(f"base_lr must be positive, got {self.base_lr!r}")
        if self.decay is not None and not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay!r}")
        if self.deep is False and self.hidden_mult != own["hidden_mult"]:
            raise ValueError(
                f"hidden_mult is {self.hidden_mult}, but deep is false: it has no hidden layer"
            )
        if self.outer_rank is not None and self.polynomial != "outer":
            raise ValueError(
                f"outer_rank is {self.outer_rank}, but polynomial is {self.polynomial!r}"
            )
        if self.head_dim is not None and self.projection == "shared":
            raise ValueError(
                f"head_dim is {self.head_dim}, but projection 'shared' takes the attention's width"
            )

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

    @property
    def options(self) -> dict[str, Any]:
        """The options that the family has, by name."""
        return {name: getattr(self, name) for name in FAMILIES[self.memory]}

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values, without what the family lacks."""
        values = {k: v for k, v in asdict(self).items() if k not in OPTIONS} | self.options
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TTTConfig:
        """Build from what `to_dict` gave, of this version or an earlier one.

        Raises:
            ValueError: a key that is not a field, named.
        """
        known = {f.name for f in fields(cls)}
        if (values.get("memory"), values.get("hidden_mult")) == ("ttt_linear", 4):
            # once written for every memory, at its default; a linear one never read it
            values = {k: v for k, v in values.items() if k != "hidden_mult"}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r} in the memory's configuration")
        return cls(**values)


_CHOICES = {"placement": PLACEMENTS, "projection": PROJECTIONS, "polynomial": POLYNOMIALS}
_SWITCHES = (
    "writing", "persistent_states", "state_passing", "detach_memory_output", "momentum", "muon",
    "residual", "deep",
)  # fmt: skip
_WHOLE = {
    "chunk_size": 1, "num_heads": 1, "head_dim": 1, "conv_width": 1, "write_every": 1,
    "hidden_mult": 1, "low_rank": 0, "stacked": 1, "window": 1, "outer_rank": 1,
}  # fmt: skip


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
