"""What a memory is doing, as numbers: one write, looked at from outside of the model's forward."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from moshi_ttt.memory.base import Memory, MemoryState, Shared
from moshi_ttt.ops.newton_schulz import newton_schulz

COUNTS = 0.01
"""Part of a momentum's largest singular value from which on a direction of it counts."""


def period(memory: Memory) -> int:
    """Frames from one write of the fast weights to the next."""
    return memory.config.chunk_size * memory.config.options.get("write_every", 1)


@torch.no_grad()
def observe(
    memory: Memory,
    x: Tensor,
    state: MemoryState,
    shared: Shared | None = None,
    lengths: Tensor | None = None,
) -> dict[str, Tensor]:
    """Look at the next write: the frames up to it are passed once more, and nothing is changed.

    Only rows whose frames reach their next write count, with these frames; each value is the mean
    over those rows, NaN if there are none. Reads positions on the host.

    Args:
        memory: whose weights are whole on this device.
        x: `[B, T, width]`, what it is about to read; frames behind the next write are left aside.
        state: before the first of them; never written.
        shared: with `projection: shared`, of all T frames.
        lengths: `[B]`, frames that exist in each row; None is all T.

    Returns:
        `[H]` each, float32 or wider; NaN where the family has no such thing, or nothing is written:
        `loss_before`, `loss_after`: inner loss of the frames at the weights before and after;
        `update`: `||W' - W|| / ||W||`; `state`: `||W'|| / ||W0||`, `moved`:
        `||W' - W0|| / ||W0||`, both infinite if W' is not finite; `momentum`: its norm after the
        write; `ns_min`, `ns_max`: singular values of its Newton-Schulz, of the first such row, see
        `orthogonality`; `eta` and the family's other gates (`m`, `w`, `lr`; `alpha`, `theta`,
        `gamma`): means over the frames.
    """
    dtype, pos, op = state.conv.dtype, state.fast.pos, memory.op
    x = x[:, : period(memory)]
    T, params = x.shape[1], memory.params()
    left = period(memory) - pos % period(memory)
    there = torch.full_like(pos, T) if lengths is None else lengths.to(pos).clamp(max=T)
    n = torch.minimum(left, there)
    if shared is not None:
        shared = shared._replace(qkv=shared.qkv[:, :T])
    q, k, v, _ = memory.project(x, state.conv, None, shared)
    gates = memory.gates(memory._rates(x, dtype))
    _, after = op.chunk(params, state.fast, q, k, v, lengths=n, **gates)
    here = torch.arange(T, device=x.device) < n.view(-1, 1)

    def over_frames(y: Tensor) -> Tensor:  # [B, H, T] -> [B, H]
        return torch.where(here.unsqueeze(1), y, 0).sum(-1) / n.view(-1, 1)

    found = {
        "loss_before": over_frames(op.inner_loss(params, state.fast, k, v)),
        "loss_after": over_frames(op.inner_loss(params, after, k, v)),
    }
    names = [name for name in op.WEIGHTS if getattr(params, name) is not None]
    now, then = ([getattr(s, name) for name in names] for s in (after, state.fast))
    start = [getattr(params, name).to(dtype).unsqueeze(0) for name in names]
    found["update"] = _norm(_minus(now, then)) / _norm(then)
    found["state"] = _or_inf(_norm(now) / _norm(start))
    found["moved"] = _or_inf(_norm(_minus(now, start)) / _norm(start))
    none = torch.full_like(found["state"], torch.nan)
    momenta = [getattr(after, name) for name in op.MOMENTUM]
    momenta = [m for m in momenta if m.numel()]
    found["momentum"] = _norm(momenta) if momenta else none
    if not memory.writes():
        found |= {"loss_after": none, "update": none}
    rates = {name: over_frames(g.mean(-1) if g.dim() == 4 else g) for name, g in gates.items()}
    found["eta"] = rates.pop("eta") if "eta" in rates else params.eta.expand_as(none)
    found |= rates
    seen = torch.where((n == left).view(-1, 1), 0.0, torch.nan)
    out = {name: (y + seen).nanmean(0) for name, y in found.items()}
    row = int((n == left).int().argmax())
    muon = momenta and memory.config.options.get("muon", False)
    lows, highs = zip(*(orthogonality(m[row]) for m in momenta), strict=True) if muon else ((), ())
    least, most = (torch.stack(x) if x else none[:1] for x in (lows, highs))
    out["ns_min"], out["ns_max"] = least.amin(0) + seen[row], most.amax(0) + seen[row]
    return out


def orthogonality(momentum: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest singular value of Newton-Schulz of a momentum, which should be near 1.

    Taken along the momentum's own directions, those with at least 1 % of its largest singular
    value: a chunk of fewer frames than channels leaves the others at 0.

    Args:
        momentum: `[H, ..., m, n]`.

    Returns:
        `[H]` each, over all matrices of a head; NaN of a matrix that is 0 or not finite.
    """
    X = momentum.mT if momentum.shape[-2] > momentum.shape[-1] else momentum
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    ok = (norm > 0) & norm.isfinite()
    unit = torch.where(ok, X / norm, 0)
    values, U = torch.linalg.eigh(unit @ unit.mT)  # squares, ascending
    out = torch.linalg.vector_norm(U.mT @ newton_schulz(torch.where(ok, X, 0)), dim=-1)
    counts, ok = values >= COUNTS**2 * values[..., -1:], ok.squeeze(-1)
    least = torch.where(counts, out, torch.inf).where(ok, torch.nan)
    most = torch.where(counts, out, -torch.inf).where(ok, torch.nan)
    return least.flatten(1).amin(1), most.flatten(1).amax(1)


@torch.no_grad()
def observe_gate(gate: Tensor) -> dict[str, Tensor]:
    """Mean, mean size, spread and range of `tanh(gate)`, and the part of it that is saturated.

    Args:
        gate: `[width]`.

    Returns:
        Scalars: `gate_mean`, `gate_abs`, `gate_std`, `gate_min`, `gate_max`, and `gate_full`: the
        part of the channels with `|tanh(gate)| > 0.99`.
    """
    g = torch.tanh(gate.float())
    return {
        "gate_mean": g.mean(), "gate_abs": g.abs().mean(), "gate_std": g.std(correction=0),
        "gate_min": g.min(), "gate_max": g.max(), "gate_full": (g.abs() > 0.99).float().mean(),
    }  # fmt: skip


class Watch:
    """One block's, for one call: what a monitor asks, noted while the call goes by.

    The first call is noted, and what follows until `arm` is let pass: a recompute for the backward
    does not count.

    Attributes:
        found: what `observe` and `observe_gate` gave, and `attention` and `memory`: root mean
            square of what each of the two adds to the layer's output. Empty before the call.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.arm()

    def arm(self) -> None:
        """Note the next call."""
        self.found: dict[str, Tensor] = {}
        self._armed = True
        self._size: Tensor | None = None

    def attention(self, module: nn.Module, args: object, update: Tensor) -> None:
        """A forward hook of what scales the attention's update, which comes before the memory's."""
        if self._armed:
            self._size = _size(update).mean()

    def before(
        self, x: Tensor, state: MemoryState, mask: Tensor | None, shared: Shared | None
    ) -> None:
        """The memory is about to read `x`, `[B, T, width]`, in the rows of `mask`."""
        if self._armed:
            lengths = None if mask is None else torch.where(mask, x.shape[1], 0)
            self.found = observe(self._memory, x.detach(), state, shared, lengths)

    def after(self, update: Tensor, gate: Tensor) -> None:
        """What the memory adds to the layer's output through its gate (under FSDP whole now)."""
        if self._armed and self._size is not None:
            self.found |= observe_gate(gate)
            self.found |= {"attention": self._size, "memory": _size(update).mean()}
            self._armed = False


class StreamWatch(Watch):
    """One block's, for a stream frame by frame: the last frames, in tensors written in place.

    Nothing here is read on the host, so the frame that notes may be captured in a CUDA graph.

    Args:
        memory: the block's.
        rows: B, of the stream.
        dtype: of what the memory reads.

    Attributes:
        x: `[B, period, width]`: the frame at position p of a row is in place `p % period`.
        sizes: `[B, period, 2]`, root mean squares of the updates of attention and memory.
    """

    def __init__(self, memory: Memory, rows: int, dtype: torch.dtype) -> None:
        super().__init__(memory)
        places, device = period(memory), memory.conv_weight.device
        self.x = torch.zeros(rows, places, memory.width, dtype=dtype, device=device)
        self.sizes = torch.zeros(rows, places, 2, device=device)

    def attention(self, module: nn.Module, args: object, update: Tensor) -> None:
        """As `Watch`."""
        self._size = _size(update)

    def before(
        self, x: Tensor, state: MemoryState, mask: Tensor | None, shared: Shared | None
    ) -> None:
        """As `Watch`; of one frame."""
        assert mask is not None
        self._mask = mask.view(-1, 1, 1)
        self._place = (state.fast.pos % self.x.shape[1]).view(-1, 1, 1)
        self._put(self.x, x)

    def after(self, update: Tensor, gate: Tensor) -> None:
        """As `Watch`."""
        assert self._size is not None
        self._put(self.sizes, torch.stack([self._size, _size(update)], -1))

    def _put(self, ring: Tensor, row: Tensor) -> None:
        place = self._place.expand(-1, 1, ring.shape[-1])
        ring.scatter_(1, place, torch.where(self._mask, row.to(ring), ring.gather(1, place)))

    def period_from(self, row: int, pos: int) -> tuple[Tensor, Tensor]:
        """Copies of a row's `x` and `sizes`, `[1, period, ...]`: the frames from `pos` on."""
        x, sizes = (
            ring[row : row + 1].roll(-(pos % ring.shape[1]), 1) for ring in (self.x, self.sizes)
        )
        return x, sizes


def _size(update: Tensor) -> Tensor:
    """Root mean square of each frame's channels, `[B, T]`."""
    return update.detach().float().square().mean(-1).sqrt()


def _minus(one: Iterable[Tensor], other: Iterable[Tensor]) -> list[Tensor]:
    return [a - b for a, b in zip(one, other, strict=True)]


def _or_inf(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, torch.inf)


def _norm(weights: Iterable[Tensor]) -> Tensor:
    """The norm of all weights of a head together, `[B, H]`."""
    return torch.stack([w.flatten(2).square().sum(-1) for w in weights]).sum(0).sqrt()
