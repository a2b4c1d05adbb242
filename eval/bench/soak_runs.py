"""What `eval.bench.soak` runs as fast as it can, on embedded speech: codes, the whole engine."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.utils.compile import no_compile
from torch import Tensor
from tqdm import tqdm

from eval.bench.frame_timing import sharing
from eval.bench.soak_watch import Twin, Watch, clocks, streamed_memories
from eval.perplexity import FRAMES_PER_CALL, score
from moshi_ttt.codec import encode_recording
from moshi_ttt.engine import Engine
from moshi_ttt.models import Talker
from moshi_ttt.ring import widen_kv_rings
from moshi_ttt.tiny import CorpusSpec
from moshi_ttt.tiny.plan import plan_corpus
from moshi_ttt.tiny.speech import render

FRAMES_PER_MINUTE = 750
FRAME = 1920
SPEECH_MINUTES = 30.0
"""Of embedded dialogues at most; longer soaks hear them again."""


def speech(minutes: float) -> Iterator[Tensor]:
    """Embedded dialogues, each float32 `[2, T * 1920]`, Moshi's part and the user's."""
    spec = CorpusSpec(hours=max(minutes, 4) / 60, dialogue_share=1.0, heldout_readings=0,
                      eval_readings=0, eval_dialogues=0)  # fmt: skip
    for recording in plan_corpus(spec):
        if minutes <= 0:
            return
        yield torch.from_numpy(render(recording)[0])
        minutes -= recording.frames / FRAMES_PER_MINUTE


def engine_twin(stack: ExitStack, talker: Talker, rows: int, heard: Tensor) -> Twin:
    """A second engine with the same weights, which hears the first frames over and over.

    Args:
        stack: closes it.
        talker: the model.
        rows: B.
        heard: `[T, 1920]`, speech.
    """
    engine = Engine(sharing(talker.lm), sharing(talker.mimi), talker.tokenizer, rows=rows, seed=1)
    stack.enter_context(engine)
    frames = itertools.cycle(heard[: 4 * FRAMES_PER_MINUTE].unsqueeze(1).expand(-1, rows, -1))
    return Twin(lambda: engine.step(next(frames)), engine.reset)


def codes_twin(stack: ExitStack, lm: LMModel, codes: Tensor) -> Twin:
    """A second LM with the same weights, which takes the first codes over and over.

    Args:
        stack: ends its stream.
        lm: the model, not streaming.
        codes: `[17, T]`.
    """
    twin = sharing(lm)
    stack.enter_context(twin.streaming(1))
    widen_kv_rings(twin.transformer, FRAMES_PER_CALL)
    piece = codes[None, :, :FRAMES_PER_CALL]

    @torch.no_grad()
    def step() -> None:
        with no_compile():
            hidden, _ = twin.forward_text(piece)
            twin.forward_depformer_training(piece, hidden)

    return Twin(step, lambda: twin.reset_streaming(torch.ones(1, dtype=torch.bool)))


def soak_codes(talker: Talker, frames: int, window: int) -> dict[str, Any]:
    """Frames of codes through the temporal transformer and, teacher-forced, the depformer.

    Args:
        talker: the model.
        frames: all in all.
        window: frames of a window.
    """
    lm = talker.lm
    minutes = min(SPEECH_MINUTES, frames / FRAMES_PER_MINUTE)
    codes = [
        torch.cat([torch.full_like(both[:1, 0], lm.text_padding_token_id), *both])
        for both in (encode_recording(talker.mimi, pcm) for pcm in speech(minutes))
    ]
    once = torch.cat(codes, 1)
    recording = once.repeat(1, -(-frames // once.shape[1]))[:, :frames]
    with ExitStack() as stack:
        watch = Watch(lm.device, codes_twin(stack, lm, once.to(lm.device)), twin_every=2)
        bar = stack.enter_context(
            tqdm(total=frames, desc="codes", unit="frame", file=sys.stderr, mininterval=1)
        )
        began = clocks()

        def progress(scored: int) -> None:
            nonlocal began
            watch.add(began)
            watch.frames += scored
            if watch.frames % window < scored:
                watch.finite("memories", *streamed_memories(lm))
                watch.close_window()
            bar.update(scored)
            began = clocks()

        (found,) = score(lm, [recording], progress=progress)
    if found.broken:
        watch.bad.append(found.broken)
    return watch.result() | {"nats a frame of codebook 0": float(found.values[1].nanmean())}


def soak_engine(talker: Talker, frames: int, window: int) -> dict[str, Any]:
    """Frames of speech through a whole engine of one row, one after another.

    Args:
        talker: the model.
        frames: all in all.
        window: frames of a window.
    """
    pcm = torch.cat([both[1] for both in speech(min(SPEECH_MINUTES, frames / FRAMES_PER_MINUTE))])
    heard = pcm.view(-1, FRAME)
    last, repeats = None, 0
    with ExitStack() as stack:
        watch = Watch(talker.lm.device, engine_twin(stack, talker, 1, heard))
        engine = stack.enter_context(
            Engine(talker.lm, talker.mimi, talker.tokenizer, rows=1, seed=0)
        )
        bar = stack.enter_context(
            tqdm(total=frames, desc="engine", unit="frame", file=sys.stderr, mininterval=1)
        )
        step = watch.timed(engine.step)
        for n in range(1, frames + 1):
            frame = step(heard[n % len(heard)])
            watch.frames = n
            watch.finite("sound", frame.pcm)
            said = frame.tokens[0, 1:].tolist()
            repeats += said == last
            last = said
            if n % window == 0:
                watch.finite("memories", *streamed_memories(talker.lm))
                watch.close_window()
            bar.update()
        diverged = int(engine.diverged.sum())
    if diverged:
        watch.bad.append(f"memories started over {diverged} times")
    return watch.result() | {"frames that repeat the one before": repeats / frames}
