"""Evaluation around training, curves, and what to type next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from moshi.models.lm import LMModel
from sentencepiece import SentencePieceProcessor
from tqdm import tqdm

from eval.arms import BASE, Arm, arms_of, score_arm
from eval.generalisation import generalisation_metrics, generalise
from eval.keep import Found
from eval.length_plot import generalisation_figure
from eval.output import PAGE, memory_in_use, write_results
from eval.panel import choose, make_items, read_panel
from eval.provenance import provenance
from eval.report import render
from eval.scores import KINDS, Item, Scores, evaluate
from eval.setup import side_fact
from eval.stats import SCALAR, Array
from eval.summary import summarise
from eval.tables import FRAME_SECONDS
from finetune.args import TrainArgs
from finetune.data.codes import CodesCache
from finetune.data.corpus import segment_frames
from finetune.data.manifest import Source
from finetune.data.recording import Recording
from finetune.loss import TeacherForced
from finetune.metrics import Metrics
from finetune.sharding import whole
from finetune.world import ALONE, World
from moshi_ttt.base import Base, load_base
from moshi_ttt.errors import UserError

SCORED = ("held_out", "librilight")
"""Kinds of a run's log: what is scored during training."""


class Evaluation:
    """Scores of whole recordings, during training and after it; training does not notice.

    Args:
        args: of the run.
        base: for its tokenizer and, at the end, the stock model.
        cache: of codes, with all held-out recordings in it.
        held_out: `data.eval_data`, empty if nothing is to be scored.
        panel: recordings of `eval.librilight_data`, see `panel_of`.
        here: this rank; recordings are shared out among all of them.

    Raises:
        UserError: the base's attention has no window, or a held-out recording is there twice.
    """

    def __init__(
        self,
        args: TrainArgs,
        base: Base,
        cache: CodesCache,
        held_out: Sequence[Source],
        panel: Sequence[Recording] = (),
        here: World = ALONE,
    ) -> None:
        self.args, self.base, self.here = args, base, here
        self.held_out: list[Item] = []
        self.panel: list[Item] = []
        if not wanted(args):
            return
        tokenizer = base.info.get_text_tokenizer()
        window_of(base)
        if held_out:
            books = [r for s in held_out for r in s.recordings][: args.eval.max_items]
            _refuse_twice(books)
            self.held_out = self._items(books, cache, tokenizer)
        if panel:
            self.panel = self._items(panel, cache, tokenizer)

    def _items(
        self, books: Sequence[Recording], cache: CodesCache, tokenizer: SentencePieceProcessor
    ) -> list[Item]:
        return make_items(books, cache, tokenizer, cache.mono_side, self.args.data.workers)

    def during(self, model: TeacherForced, metrics: Metrics, step: int) -> None:
        """Log the mean NLL of the held-out recordings, and of Libri-Light where it is given.

        Raises:
            UserError: an NLL is not finite.
        """
        here = self.here
        for name, items in zip(SCORED, (self.held_out, self.panel), strict=True):
            if not items:
                continue
            mine = items[here.rank :: here.size]
            with _finite(f"step {step}, {name}"), whole(model):
                frames = self.args.eval.frames_per_call
                scores = evaluate(model.lm, mine, frames_per_call=frames)
                scores.refuse_broken(mine)
            means = {f"nll_{kind}": _mean(scores.nll[kind], here) for kind in KINDS}
            metrics.log(name, step, means)
            if here.first:
                nll = means["nll_codebook0"]
                tqdm.write(f"     step {step}, {name}: codebook 0 {nll:.4f} nats")

    def final(self, model: TeacherForced, run_dir: Path, metrics: Metrics, step: int) -> list[str]:
        """Compare stock base, memory kept and memory reset every window, by position and length.

        Returns:
            Lines for a person: the tables, the verdict, and where the report is.

        Raises:
            UserError: an NLL is not finite; the report is written first.
        """
        items = self.panel or self.held_out
        if not items:
            return ["not evaluated: neither eval.librilight_data nor data.eval_data is given"]
        device, before = self.here.device, memory_in_use(self.here.device)
        with whole(model):
            scores = self._share(model.lm, items)
            memory = {"start": before, "end": memory_in_use(device)}
        lines: list[str] = []
        if self.here.first:
            lines = self._report(scores, items, memory, run_dir, metrics, step)
        self.here.wait()
        with _finite(f"after training (the rest is in {run_dir / 'eval' / PAGE})"):
            for found in scores.values():
                found.refuse_broken(items)
        return lines

    def _share(self, lm: LMModel, items: Sequence[Item]) -> dict[Arm, Scores]:
        """Score all items, each rank its part; every rank gets all scores."""
        own = arms_of(None, self.args.ttt)
        arms = [BASE, *(arm for arm in own if arm.mode in ("kept", "reset"))]
        here, mine = self.here, items[self.here.rank :: self.here.size]
        found: dict[str, list[Found]] = {}
        total = len(arms) * sum(item.frames for item in mine)
        with tqdm(
            total=total, desc="scoring", unit="frame", unit_scale=True, disable=not here.first
        ) as bar:
            for arm in arms:
                stock = arm is BASE
                scored = load_base(self.base, device=lm.device, dtype=lm.dtype) if stock else lm
                scores = score_arm(
                    scored, arm, mine, window_of(self.base),
                    frames_per_call=self.args.eval.frames_per_call, progress=bar.update,
                )  # fmt: skip
                if stock:
                    scored.to("meta")  # its room is for the others, whoever still holds it
                found[arm.name] = scores.found
        parts = here.gather(found)
        return {
            arm: Scores([parts[i % here.size][arm.name][i // here.size] for i in range(len(items))])
            for arm in arms
        }

    def _report(
        self,
        scores: dict[Arm, Scores],
        items: Sequence[Item],
        memory: dict[str, int],
        run_dir: Path,
        metrics: Metrics,
        step: int,
    ) -> list[str]:
        window, per_call = window_of(self.base), self.args.eval.frames_per_call
        segment = segment_frames(self.args.duration_sec)
        results = summarise(
            scores, items, window, training_frames=segment, frames_per_call=per_call
        )
        results["memory_bytes"] = memory
        side = side_fact(self.args.data.mono_side)
        results["facts"] = provenance("finetune.train", self.here.device) | side
        length = results["length"] = generalise(scores, items, segment)
        name = f"{run_dir.name}_length"
        more = {name: generalisation_figure(length, run_dir.name, window)}
        write_results(results, run_dir / "eval", title=run_dir.name, more=more)
        for arm, found in results["arms"].items():
            scalar = found["ranges"]["codebook0"][SCALAR]["mean"]
            metrics.log("final", step, {f"{arm}_nll_codebook0_{SCALAR}": scalar})
        metrics.log("length", step, generalisation_metrics(length))
        for picture in ("nll_by_position", name):
            metrics.image(picture, run_dir / "eval" / f"{picture}.png", step)
        return ["", render(results), "", f"report: {run_dir / 'eval' / PAGE}"]


def panel_of(args: TrainArgs, base: Base) -> list[Recording]:
    """The recordings of `eval.librilight_data` that are scored, none if nothing is.

    Raises:
        UserError: it is not there or has nothing long enough, or the base's attention has no
            window.
    """
    if not args.eval.librilight_data or not wanted(args):
        return []
    books = _long_enough(args.eval.librilight_data, 4 * window_of(base) * FRAME_SECONDS)
    return choose(books, 0.0, args.eval.max_items)[0]


def _refuse_twice(books: Sequence[Recording]) -> None:
    """Two of one name cannot be told apart in a report, which comes after hours of training."""
    seen: dict[str, str] = {}
    for book in books:
        if book.name in seen:
            raise UserError(
                f"{book.where}: data.eval_data has {book.name} twice, first in {seen[book.name]}"
            )
        seen[book.name] = book.where


def wanted(args: TrainArgs) -> bool:
    """Whether a run scores anything."""
    return args.do_eval or args.eval.eval_after_training


@contextmanager
def _finite(when: str) -> Iterator[None]:
    try:
        yield
    except FloatingPointError as error:
        raise UserError(f"{when}: {error}: lower the learning rate") from error


def _mean(nll: Sequence[Array], here: World) -> float:
    values = np.concatenate([*nll, np.empty(0)])
    known = values[np.isfinite(values)]
    total, count = here.sum(torch.tensor([known.sum(), len(known)], dtype=torch.float64)).tolist()
    return total / count if count else float("nan")


def _long_enough(data: str, seconds: float) -> list[Recording]:
    try:
        books = read_panel(data)
    except UserError as error:
        raise UserError(f"eval.librilight_data: {error}") from error
    found = [book for book in books if book.duration >= seconds]
    if not found:
        longest = max(books, key=lambda book: book.duration)
        raise UserError(
            f"eval.librilight_data {data}: no recording is as long as four attention windows, "
            f"{seconds:g} s; the longest of {len(books)} is {longest.name} with "
            f"{longest.duration:.1f} s"
        )
    return found


def window_of(base: Base) -> int:
    """Attention window in frames, from the base's config.

    Raises:
        UserError: its attention has no end.
    """
    window = base.lm_config.get("context")
    if window is None:
        raise UserError(f"base {base.name}: its attention has no window (context is null)")
    return window


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far, of the GPU or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return memory_in_use(device)


def next_steps(run_dir: Path, checkpoint: Path | None) -> list[str]:
    """Where everything is and what to type next."""
    lines = ["", f"everything is in {run_dir}/: config.yaml, metrics.jsonl, curves.png"]
    if checkpoint is not None:
        lines += [
            f"checkpoint: {checkpoint}",
            "score it again, or other speech:  make eval",
            'talk to it (--mic: microphone):   make stream ARGS="--file in.wav --out out.wav"',
        ]
    return lines
