"""The real-time loop's engine: a frame of sound in, a frame of sound and a piece of text out.

One frame is 80 ms, 1920 samples at 24 kHz: Mimi encodes it, the LM takes a step, Mimi decodes what
the LM says. The command line, a server and the tests share this; none of them is known here.

The first frame. At position 0 Moshi reads its initial tokens, whatever codes it is given. So a
stream takes that step when it starts, on codes nobody reads, and from then on every frame that
comes in is heard and is answered by one frame: exactly what `moshi.run_inference` does by stepping
its first frame twice (`moshi.server` throws the first frame away instead). What comes out for a
frame of sound is what Moshi says during that frame.

Rows. Each is a conversation of its own: it starts, pauses, is saved and loaded while the others go
on, and nothing of that reaches them, not even through the random numbers, of which every step takes
as many whoever takes part. A row that starts among others takes its step at position 0 together
with their next one.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMGen, LMModel
from moshi.utils.compile import no_compile
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from moshi_ttt.errors import UserError
from moshi_ttt.frame_times import FrameTimes
from moshi_ttt.guard import Guard
from moshi_ttt.hybrid import BLOCK, HybridLMModel
from moshi_ttt.monitor import Reading, StreamMonitor
from moshi_ttt.ring import widen_kv_rings
from moshi_ttt.states import ttt_blocks

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
        tokens: `[B, 1 + dep_q]` int64 on the CPU; -2 in rows that have nothing to say yet, or took
            no part. The next step writes over it.
        readings: of the memories of each row (`moshi_ttt.monitor`), where one is done; empty in an
            engine that is not watched.
    """

    pcm: Tensor
    text: list[str]
    tokens: Tensor
    readings: list[Reading | None]


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
        watch_every: frames between readings of a row's memories, at least; None takes none.

    Attributes:
        frames: frames since the stream started, those of a loaded session included.
        times: of the frames taken by this engine.
        starting: `[B]` bool: rows that have not taken their step at position 0 yet.
        diverged: `[B]`, how often a memory of a row was no longer finite, and so was put back to W0
            (what it said was left out, so that nothing else of the row is spoiled).

    Raises:
        ValueError: one of the models is streaming already, or is to be watched and no memory keeps
            a state.
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
        watch_every: int | None = None,
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
        self.starting = np.zeros(rows, bool)
        self.diverged = np.zeros(rows, int)
        self._everyone = np.ones(rows, bool)
        self._masks: dict[str, NDArray[np.bool_]] = {}
        self._in = torch.zeros(rows, 1, self.frame_size, device=self.device)
        self._out = torch.zeros(rows, self.frame_size)
        pinned = self.device.type == "cuda"
        self._said = torch.zeros(rows, lm.dep_q + 2, dtype=torch.long, pin_memory=pinned)
        self._unread = torch.zeros(
            rows, lm.n_q - lm.dep_q, 1, dtype=torch.long, device=self.device
        )  # fmt: skip
        self._monitor = None
        self._streams = ExitStack()
        with ExitStack() as stack:
            stack.enter_context(mimi.streaming(rows))
            # A frame is two steps of Mimi's transformers: with moshi's own ring every other step
            # lacks its oldest key, and the codes are not those that training has seen.
            widen_kv_rings(mimi, int(mimi.encoder_frame_rate / mimi.frame_rate))
            stack.enter_context(self.gen.streaming(rows))
            self._guard = Guard(lm, rows)
            monitor = None
            if watch_every is not None:  # before the graphs are captured: it is part of them
                monitor = StreamMonitor(lm, rows, watch_every)
                stack.callback(monitor.detach)
            if self.device.type == "cuda":
                for n in range(WARM_UP_FRAMES):
                    self.step(self._in, self._everyone ^ bool(n % 2))
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
    def reset(self, *, seed: int | None = None) -> None:
        """Start all rows anew, memories at W0, and take their step at position 0 at once.

        Args:
            seed: of the global generators.
        """
        if seed is not None:
            torch.manual_seed(seed)
        self.start(self._everyone)
        with self._eager():
            self._set_mask("gen", self._everyone)
            self.gen.step(self._unread)  # position 0, see the top of this file
        self.starting[:] = False
        self.frames = 0

    @torch.no_grad()
    def start(self, mask: NDArray[np.bool_]) -> None:
        """Start rows anew, memories at W0; the others go on as if nothing had happened.

        The next step, whatever its mask, is their step at position 0; they hear from the one after
        it.

        Args:
            mask: `[B]`, the rows.
        """
        rows = torch.from_numpy(mask).to(self.device)
        self.mimi.reset_streaming(rows)
        self.gen.reset_streaming(rows)
        self._masks.clear()  # a reset also ends a pause
        self._changed(mask)
        self.starting |= mask
        self.diverged[mask] = 0

    def loaded(self, row: int | None = None) -> None:
        """A row's streaming state (None: that of all) has been replaced by another.

        It takes part again from the next step on. What the engine knows of it is looked up anew.
        """
        mask = self._everyone if row is None else np.arange(self.rows) == row
        state = self.gen._streaming_state
        assert state is not None
        self.starting[mask] = (state.offsets == 0).cpu().numpy()[mask]
        self.diverged[mask] = 0
        self._masks.clear()
        self._changed(mask)

    def _changed(self, mask: NDArray[np.bool_]) -> None:
        """A reading of the memories of these rows is not whole: it starts over."""
        if self._monitor is not None:
            self._monitor.forget(torch.from_numpy(mask))

    @torch.no_grad()
    def step(
        self, pcm: Tensor | NDArray[np.float32], mask: NDArray[np.bool_] | None = None
    ) -> Frame:
        """Hear one frame and say one.

        Args:
            pcm: `[B, 1, 1920]`, or what can be seen as that, float32 at 24 kHz; what is beyond -1
                to 1 is cut off there, and what is no number is silence.
            mask: `[B]`, the rows that take part; None is all. The others are paused: not a bit of
                their state changes. Rows that are `starting` take part in their own way.

        Returns:
            What Moshi says during this frame.
        """
        began = time.perf_counter()
        hear = (self._everyone if mask is None else mask) & ~self.starting
        with self._eager():
            self._in.copy_(torch.as_tensor(pcm).view(self._in.shape))
            self._in.nan_to_num_(nan=0.0).clamp_(-1, 1)
            self._set_mask("mimi", hear)
            codes = self.mimi.encode(self._in)
            if self.starting.any():
                codes[torch.from_numpy(self.starting).to(self.device)] = 0  # nobody reads them
            self._set_mask("gen", hear | self.starting)
            tokens = self.gen.step(codes)
            assert tokens is not None
            # one transfer for all that is wanted on the host
            self._said.copy_(torch.cat([tokens[..., 0], self._guard.diverged()[:, None]], 1))
            bad = self._said[:, -1].bool().numpy()
            if bad.any():
                self._guard.start_over()
                self.diverged += bad
                self._changed(bad)
            said = self._said[:, :-1]
            said[torch.from_numpy(self.starting)] = -2
            self.starting[:] = False
            self._decode(tokens[:, 1:], (said >= 0).all(-1).numpy())
        text = [self._piece(int(row[0])) for row in said]
        self.frames += 1
        readings = [] if self._monitor is None else self._monitor.frame(self.frames)
        self.times.add(1000 * (time.perf_counter() - began))
        return Frame(self._out, text, said, readings)

    def _set_mask(self, which: str, mask: NDArray[np.bool_]) -> None:
        known = self._masks.get(which)
        if known is None or not np.array_equal(known, mask):
            self._masks[which] = mask.copy()
            module = self.mimi if which == "mimi" else self.gen
            module.set_exec_mask(torch.from_numpy(self._masks[which]).to(self.device))

    def _decode(self, codes: Tensor, valid: NDArray[np.bool_]) -> None:
        """Rows without valid codes are decoded as something, leave no trace, and are silent."""
        self._set_mask("mimi", valid)
        self._out.copy_(self.mimi.decode(codes.clamp(min=0))[:, 0])
        if not valid.all():
            self._out[torch.from_numpy(~valid)] = 0

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
