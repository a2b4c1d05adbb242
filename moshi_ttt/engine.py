"""The real-time loop's engine: a frame of sound in, a frame of sound and a piece of text out.

One frame is 80 ms, 1920 samples at 24 kHz: Mimi encodes it, the LM takes a step, Mimi decodes what
the LM says. The command line, a server and the tests share this; none of them is known here.

The first frame. At position 0 Moshi reads its initial tokens, whatever codes it is given. So a
stream takes that step when it starts, on codes nobody reads, and from then on every frame that
comes in is heard and is answered by one frame: exactly what `moshi.run_inference` does by stepping
its first frame twice (`moshi.server` throws the first frame away instead). What comes out for a
frame of sound is what Moshi says during that frame.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMGen, LMModel
from moshi.utils.compile import no_compile
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from moshi_ttt.errors import UserError
from moshi_ttt.hybrid import BLOCK, HybridLMModel
from moshi_ttt.monitor import Reading, StreamMonitor
from moshi_ttt.ring import widen_kv_rings
from moshi_ttt.states import ttt_blocks

FRAME_MS = 80.0
WARM_UP_FRAMES = 4  # each CUDA graph is captured at its second call


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temp: temperature of the audio codes.
        temp_text: temperature of the text.
        top_k: most likely audio codes to draw from; 0 is all.
        top_k_text: likewise for the text.
        greedy: always the most likely; the others then mean nothing.

    Raises:
        ValueError: a negative value.
    """

    temp: float = 0.8
    temp_text: float = 0.7
    top_k: int = 250
    top_k_text: int = 25
    greedy: bool = False

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("temp", "temp_text", "top_k", "top_k_text"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)!r}")


class Frame(NamedTuple):
    """What came out for one frame.

    Attributes:
        pcm: `[B, 1920]` float32 on the CPU, Moshi's voice; the next step writes over it.
        text: one piece of text a row, with its leading space; "" where Moshi wrote none.
        tokens: `[B, 1 + dep_q]` int64 on the CPU; -2 in rows that have nothing to say yet.
    """

    pcm: Tensor
    text: list[str]
    tokens: Tensor


class FrameTimes:
    """Milliseconds of each frame; the last 65536 (87 minutes) are kept for the percentiles."""

    def __init__(self) -> None:
        self._ms = np.zeros(1 << 16)
        self.count, self.total_ms, self.late = 0, 0.0, 0

    def add(self, ms: float) -> None:
        """Count one frame; it is late if it took longer than it sounds."""
        self._ms[self.count % len(self._ms)] = ms
        self.count += 1
        self.total_ms += ms
        self.late += ms > FRAME_MS

    def percentiles(self) -> tuple[float, float, float]:
        """p50, p95 and p99 in ms; NaN before the first frame."""
        kept = self._ms[: self.count] if self.count else np.array([np.nan])
        p50, p95, p99 = np.percentile(kept, (50, 95, 99))
        return float(p50), float(p95), float(p99)

    @property
    def real_time_factor(self) -> float:
        """Time taken per time of sound; below 1 keeps up. NaN before the first frame."""
        return self.total_ms / (self.count * FRAME_MS) if self.count else float("nan")


class Engine:
    """`rows` conversations in step, each with a stream of its own in Mimi, LM and memory.

    Both models are put into streaming once, here, and leave it at `close` (or as a context
    manager); on a GPU their graphs are captured before the stream starts.

    Args:
        lm: in eval mode, with or without a memory.
        mimi: on the same device.
        tokenizer: of the text stream.
        sampling: how tokens are drawn.
        rows: B.
        seed: of the global generators, set as the stream starts; None leaves them.
        watcher: given a reading of the memories (`moshi_ttt.monitor`) now and then; None is
            nobody, and costs nothing.
        watch_every: frames between readings.

    Attributes:
        frames: frames since the stream started, those of a loaded session included.
        times: of the frames taken by this engine.

    Raises:
        ValueError: one of the models is streaming already, or a watcher where no memory keeps a
            state.
        UserError: the LM is not a full-duplex Moshi.
    """

    def __init__(
        self,
        lm: LMModel,
        mimi: MimiModel,
        tokenizer: SentencePieceProcessor,
        *,
        sampling: Sampling | None = None,
        rows: int = 1,
        seed: int | None = None,
        watcher: Callable[[Reading], object] | None = None,
        watch_every: int = 125,
    ) -> None:
        if lm.is_streaming or mimi.is_streaming:
            raise ValueError("the model is in another stream already: close that one first")
        if lm.fuser is not None or not 0 < lm.dep_q < lm.n_q:
            raise UserError(
                f"not a full-duplex Moshi: {lm.dep_q} of its {lm.n_q} audio streams are its own"
                + (", and it needs conditions" if lm.fuser is not None else "")
            )
        sampling = sampling or Sampling()
        self.lm, self.mimi, self.tokenizer = lm, mimi, tokenizer
        self.sampling, self.rows, self.device = sampling, rows, lm.device
        self.gen = LMGen(
            lm,
            use_sampling=not sampling.greedy,
            temp=sampling.temp,
            temp_text=sampling.temp_text,
            top_k=sampling.top_k,
            top_k_text=sampling.top_k_text,
            support_out_of_sync=True,
        )
        self.frame_size = mimi.frame_size
        self.frames, self.times = 0, FrameTimes()
        self._silent_texts = {lm.text_padding_token_id, lm.end_of_text_padding_id}
        self._in = torch.zeros(rows, 1, self.frame_size, device=self.device)
        self._out = torch.zeros(rows, self.frame_size)
        self._all = torch.ones(rows, dtype=torch.bool, device=self.device)
        self._unread = torch.zeros(
            rows, lm.n_q - lm.dep_q, 1, dtype=torch.long, device=self.device
        )  # fmt: skip
        self._watcher, self._monitor = watcher, None
        self._streams = ExitStack()
        with ExitStack() as stack:
            stack.enter_context(mimi.streaming(rows))
            # A frame is two steps of Mimi's transformers: with moshi's own ring every other step
            # lacks its oldest key, and the codes are not those that training has seen.
            widen_kv_rings(mimi, int(mimi.encoder_frame_rate / mimi.frame_rate))
            stack.enter_context(self.gen.streaming(rows))
            monitor = None
            if watcher is not None:  # before the graphs are captured: it is part of them
                monitor = StreamMonitor(lm, rows, watch_every)
                stack.callback(monitor.detach)
            if self.device.type == "cuda":
                for _ in range(WARM_UP_FRAMES):
                    self.step(self._in)
            self.reset(seed=seed)
            self._streams = stack.pop_all()
        self._monitor, self.times = monitor, FrameTimes()

    def __enter__(self) -> Engine:
        """Nothing to do: the engine streams from the moment it is made."""
        return self

    def __exit__(self, *_: object) -> None:
        """`close`."""
        self.close()

    def close(self) -> None:
        """Take both models out of streaming; their states are gone."""
        self._streams.close()

    @torch.no_grad()
    def reset(self, mask: Tensor | None = None, *, seed: int | None = None) -> None:
        """Start rows anew, memories at W0; the others go on as if nothing had happened.

        Args:
            mask: `[B]` bool, the rows; None is all.
            seed: of the global generators.
        """
        mask = self._all if mask is None else mask.to(self.device)
        if seed is not None:
            torch.manual_seed(seed)
        with self._eager():
            self.mimi.reset_streaming(mask)
            self.gen.reset_streaming(mask)
            self.gen.set_exec_mask(mask)
            self.gen.step(self._unread)  # position 0, see the top of this file
            self.gen.set_exec_mask(self._all)
        if bool(mask.all()):
            self.frames = 0

    @torch.no_grad()
    def step(self, pcm: Tensor | np.ndarray[Any, Any]) -> Frame:
        """Hear one frame and say one.

        Args:
            pcm: `[B, 1, 1920]`, or what can be seen as that, float32 in -1 to 1 at 24 kHz.

        Returns:
            What Moshi says during this frame.
        """
        began = time.perf_counter()
        with self._eager():
            self._in.copy_(torch.as_tensor(pcm).view(self._in.shape))
            codes = self.mimi.encode(self._in)
            tokens = self.gen.step(codes)
            assert tokens is not None
            said = tokens[..., 0].cpu()
            valid = (said >= 0).all(-1)
            self._decode(tokens[:, 1:], valid)
        text = [self._piece(int(row[0])) for row in said]
        self.frames += 1
        if self._monitor is not None and self._watcher is not None:
            reading = self._monitor.frame(self.frames)
            if reading is not None:
                self._watcher(reading)
        self.times.add(1000 * (time.perf_counter() - began))
        return Frame(self._out, text, said)

    def _decode(self, codes: Tensor, valid: Tensor) -> None:
        """Rows without valid codes are decoded as something, leave no trace, and are silent."""
        if bool(valid.all()):
            self._out.copy_(self.mimi.decode(codes)[:, 0])
            return
        self.mimi.set_exec_mask(valid)
        pcm = self.mimi.decode(codes.clamp(min=0))[:, 0]
        self.mimi.set_exec_mask(self._all)
        self._out.copy_(pcm).masked_fill_(~valid[:, None], 0.0)

    def _piece(self, token: int) -> str:
        if token < 0 or token in self._silent_texts:
            return ""
        return self.tokenizer.id_to_piece(token).replace("▁", " ")

    def _eager(self) -> AbstractContextManager[None]:
        # On a CPU, torch.compile of moshi's norms takes 40 s and makes nothing faster.
        return nullcontext() if self.device.type == "cuda" else no_compile()


@torch.no_grad()
def memory_norms(lm: LMModel) -> dict[str, float]:
    """How far each memory of a stream has moved: ||W - W0|| over its fast weights and rows.

    Returns:
        Layer name, e.g. `transformer.layers.3`, -> norm; empty without a memory.
    """
    if not isinstance(lm, HybridLMModel):
        return {}
    norms: dict[str, float] = {}
    for name, block in ttt_blocks(lm).items():
        stream = block._streaming_state
        assert stream is not None
        weights = block.memory.fast_weights(stream.memory.fast)
        moved = [(now - start).square().sum() for now, start in weights]
        norms[name.removesuffix(f".{BLOCK}")] = float(torch.stack(moved).sum().sqrt())
    return norms
