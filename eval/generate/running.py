"""Let a model talk by itself for minutes; what it says is on disk as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from torch.nn import functional as F

from eval.generate.voices import Voices
from eval.modes import fast_norms, writing_off
from moshi_ttt.engine import Engine, Sampling
from moshi_ttt.frame_times import FrameTimes
from moshi_ttt.hybrid import HybridLMModel
from moshi_ttt.states import preserved_ttt_states, reset_ttt_states, ttt_blocks

MODES = ("kept", "reset", "off")
"""What may happen to a memory while its model talks by itself."""
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """What every arm does.

    Attributes:
        frames: of 80 ms, to sample.
        bin_frames: frames of a bin (a minute), after which the state's norm is taken.
        window: frames after which `reset` puts a memory back to W0.
        streams: rows of the batch, each with draws of its own.
        seed: of the draws; the same for every arm.
        sampling: how tokens are drawn.
        heard: `[N]` samples at 24 kHz of the user, at the start; silence follows.
    """

    frames: int
    bin_frames: int
    window: int
    streams: int
    seed: int
    sampling: Sampling
    heard: Tensor


@dataclass
class Run:
    """What one arm said; T frames, fewer than planned where it is `broken`.

    Attributes:
        codes: [streams, T] codebook 0.
        entropy: [streams, T] nats, of the distribution that codebook 0 was drawn from in the step
            that said `codes`; what it drew is said when its delayed fellows are there, a frame on.
        power: [streams, T] mean square of each frame's samples.
        state_norm: block name -> [streams, bins] norm of its fast weights as a bin ends; where
            they were reset in it, as they were before the last time.
        state_moved: block name -> likewise, of their distance from W0.
        times: of the frames, all streams at once.
        files: audio and text, from the folder of results.
        broken: why it ended early; empty if it did not.
    """

    codes: NDArray[np.int64]
    entropy: Array
    power: Array
    state_norm: dict[str, Array]
    state_moved: dict[str, Array]
    times: FrameTimes
    files: list[str]
    broken: str = ""


@torch.no_grad()
def run_free(
    lm: LMModel,
    mimi: MimiModel,
    tokenizer: SentencePieceProcessor,
    mode: str,
    plan: Plan,
    stem: Path,
    progress: Callable[[int], object] | None = None,
) -> Run:
    """Sample text and voice as LMGen does, hearing encoded silence (and before it `plan.heard`).

    Nothing of `lm` changes, nor any random generator, also when an error ends it.

    Args:
        lm: in eval mode, not streaming.
        mimi: its codec, on the same device.
        tokenizer: of its text.
        mode: of `MODES`; a model without memory is `kept`.
        plan: how long, how many, how drawn.
        stem: stream n is written to `stem-n.flac` (a wav until it is finished) and `stem-n.txt`.
        progress: called after every frame with 1.

    Raises:
        ValueError: unknown mode, streaming already, or no memory to reset or switch off.
        UserError: not a full-duplex Moshi.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    if mode != "kept":
        ttt_blocks(lm)
    said: list[tuple[Tensor, Tensor, Tensor]] = []
    norms, broken = _Norms(lm), ""
    with ExitStack() as stack:
        stack.enter_context(_left_as_it_was(lm))
        if mode == "off":
            stack.enter_context(writing_off(lm))
        entropy = stack.enter_context(drawn_entropy(lm, plan.sampling, plan.streams))
        engine = Engine(
            lm, mimi, tokenizer, sampling=plan.sampling, rows=plan.streams, seed=plan.seed
        )
        stack.enter_context(engine)
        voices = stack.enter_context(Voices(stem, plan.streams))
        for frame, pcm in enumerate(_user(plan, engine.frame_size)):
            if mode == "reset" and (frame + 1) % plan.window == 0:  # position 0 was no frame
                norms.take()
                reset_ttt_states(lm)
            out = engine.step(pcm)
            drawn, power = entropy.to("cpu", copy=True), out.pcm.double().square().mean(1)
            good = (drawn + power).isfinite()
            if not bool(good.all()):
                row = int((~good).nonzero()[0])
                broken = f"the model's output is no number at frame {frame}, stream {row + 1}"
                break
            voices.write(out)
            said.append((out.tokens[:, 1], drawn, power))
            if (frame + 1) % plan.bin_frames == 0:
                norms.end_of_bin()
                voices.flush(frame + 1)
            if progress is not None:
                progress(1)
    shape = (0, plan.streams)
    codes, drawn, power = (
        torch.stack(part).numpy().T if said else np.zeros(shape).T
        for part in (zip(*said, strict=True) if said else ((), (), ()))
    )
    return Run(
        codes.astype(np.int64), drawn.astype(float), power.astype(float),
        norms.of("norm"), norms.of("moved"), engine.times, voices.finish(), broken,
    )  # fmt: skip


@contextmanager
def drawn_entropy(lm: LMModel, sampling: Sampling, rows: int) -> Iterator[Tensor]:
    """Inside, the tensor [B] is what `entropy_of` says of codebook 0 in the step before.

    LMGen has no hook for audio logits, so one is put on the head that makes them; what it does is
    part of a captured CUDA graph.
    """
    last = torch.full((rows,), float("nan"), device=lm.device)

    def note(head: nn.Module, given: object, logits: Tensor) -> None:
        last.copy_(entropy_of(logits.view(rows, -1), sampling))

    handle = lm.linears[0].register_forward_hook(note)
    try:
        yield last
    finally:
        handle.remove()


def entropy_of(logits: Tensor, sampling: Sampling) -> Tensor:
    """Nats [B] of the distribution that is drawn from: [B, card] with temperature and top-k."""
    logits = logits.float() / sampling.temp
    if sampling.top_k:
        logits = logits.topk(min(sampling.top_k, logits.shape[-1])).values
    return torch.special.entr(logits.softmax(-1)).sum(-1)


@contextmanager
def _left_as_it_was(lm: LMModel) -> Iterator[None]:
    detached = lm._streaming_detached  # LMGen sets it, and nothing takes it back
    devices = [lm.device] if lm.device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        if isinstance(lm, HybridLMModel):
            stack.enter_context(preserved_ttt_states(lm))
        stack.callback(lm.set_streaming_detached, detached)
        yield


def _user(plan: Plan, size: int) -> Iterator[Tensor]:
    """What the user says, [streams, 1, size] a frame."""
    heard = F.pad(plan.heard, (0, -len(plan.heard) % size)).view(-1, size)
    silence = torch.zeros(size)
    for frame in range(plan.frames):
        pcm = heard[frame] if frame < len(heard) else silence
        yield pcm.expand(plan.streams, 1, size)


@dataclass
class _Norms:
    """Norms of the fast weights of each row, one a bin."""

    lm: LMModel
    bins: list[dict[str, dict[str, Tensor]]] = field(default_factory=list)
    last: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def take(self) -> None:
        """Take them now, for this bin."""
        if not isinstance(self.lm, HybridLMModel):
            return
        self.last = {
            name: {"norm": norm.cpu(), "moved": moved.cpu()}
            for name, (norm, moved) in fast_norms(self.lm).items()
        }

    def end_of_bin(self) -> None:
        """Keep those taken in this bin, else those of now."""
        if not self.last:
            self.take()
        self.bins.append(self.last)
        self.last = {}

    def of(self, kind: str) -> dict[str, Array]:
        names = self.bins[0] if self.bins else {}
        return {
            name: torch.stack([found[name][kind] for found in self.bins], 1).double().numpy()
            for name in names
        }
