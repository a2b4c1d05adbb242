"""What a memory costs on short speech: `python -m eval.zerospeech --task swuggy --data FOLDER`.

sWUGGY, sBLIMP, tStoryCloze and sStoryCloze (see `eval.zerospeech.sets`): of two clips the model
should find one likelier. The trained model, the stock base and any baselines decide all pairs; the
accuracies, with 95 % intervals, and what the trained model has lost against the base are written.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from eval.arms import BASE as STOCK
from eval.arms import Arm, hashed
from eval.output import RESULTS, next_folder, save_figure, write_json
from eval.panel import Failed
from eval.provenance import provenance
from eval.setup import (
    EVAL_RUNS,
    Models,
    add_data_options,
    add_model_options,
    encode_workers,
    end,
    find_models,
    positive_int,
    say,
)
from eval.tables import as_markdown, as_text
from eval.zerospeech.nll import CODEBOOKS, NORMALISE, clip_codes, clip_nll, scored_rows
from eval.zerospeech.plot import accuracies
from eval.zerospeech.report import BASE, TRAINED, render, summarise, verdict
from eval.zerospeech.sets import TASKS, Pair, read_pairs
from finetune.data.codes import CodesCache
from finetune.data.interleaver import Interleaver
from moshi_ttt.errors import Parser, UserError, run_cli
from moshi_ttt.files import written_whole


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's options.

    Raises:
        UserError: unknown or malformed ones.
    """
    p = Parser("python -m eval.zerospeech", __doc__)
    p.add_argument("--task", choices=TASKS, required=True)
    add_model_options(p)
    add_data_options(p, "the set's folder, or one in it: root, task or clips")
    p.add_argument("--codebooks", choices=CODEBOOKS, default="0", help="scored: 0, or mean of all")
    p.add_argument("--normalise", choices=NORMALISE, default="mean", help="over a clip's frames")
    p.add_argument("--batch-size", type=positive_int, default=8, help="clips at a time")
    p.add_argument("--out", help="folder to make (runs/eval/<name of the checkpoint>-<task>)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Decide all pairs, compare, write and print.

    Raises:
        UserError: what the user has to change, in one line; nothing was written then.
        SystemExit: status 1, clips or pairs were left out; the rest was scored and written.
    """
    args = parse(argv)
    pairs, left_out = read_pairs(args.task, args.data)
    models = find_models(args)
    out = next_folder(args.out, EVAL_RUNS / f"{models.name}-{args.task}")
    if args.max_items is not None:
        pairs = _some(pairs, args.max_items)
    scored_rows(models.main.base.lm_config, args.side, args.codebooks)
    codes, broken = _codes(pairs, models, args)
    pairs = _whole(pairs, broken, left_out)
    needed = {path for pair in pairs for path in (pair.correct, pair.incorrect)}
    arms = _arms(models)
    nll, broken = _score(models, arms, {p: c for p, c in codes.items() if p in needed}, args)
    pairs = _whole(pairs, broken, left_out)

    scored = "codebook 0" if args.codebooks == "0" else "all codebooks"
    results = summarise(pairs, nll, {name: arm.label for name, arm in arms.items()}) | {
        "title": f"{TASKS[args.task].title}, {models.name}",
        "scoring": f"A clip's score is the {args.normalise} of the NLL of {scored} over its "
        f"frames, on {args.side}'s side.",
        "left_out": left_out,
        "task": args.task,
        "data": str(args.data),
        **models.facts(),
        "checkpoints": {name: str(arm.checkpoint) for name, arm in arms.items() if arm.checkpoint},
        "side": args.side,
        "codebooks": args.codebooks,
        "normalise": args.normalise,
        "max_items": args.max_items,
        "facts": provenance("eval.zerospeech", models.device),
    }
    results["verdict"] = verdict(results)
    files = save_figure(accuracies(results), out / "accuracy")
    with written_whole(out / "report.md") as path:
        text = render(results, as_markdown)
        path.write_text(f"# {results['title']}\n\n{text}\n", encoding="utf-8")
    write_json(results, out / RESULTS)
    say(f"\n{render(results, as_text)}\n")
    say("written: " + ", ".join(map(str, (*files, out / "report.md", out / RESULTS))))
    end([Failed("", line) for line in left_out])


def _some(pairs: list[Pair], most: int) -> list[Pair]:
    """Whole items, fixed by the hash of their names."""
    items = {pair.item for pair in pairs}
    kept = set(sorted(items, key=hashed)[:most])
    return [pair for pair in pairs if pair.item in kept]


def _whole(pairs: list[Pair], broken: Mapping[Path, str], left_out: list[str]) -> list[Pair]:
    """The pairs of which both clips are there; the others are named."""
    for pair in pairs:
        for path in (pair.correct, pair.incorrect):
            if path in broken:
                left_out.append(f"{pair.name}: {broken[path]}")
    whole = [pair for pair in pairs if not broken.keys() & {pair.correct, pair.incorrect}]
    if not whole:
        raise UserError(f"no pair can be scored; {len(left_out)} problems, first: {left_out[0]}")
    return whole


def _arms(models: Models) -> dict[str, Arm]:
    """The stock base, the checkpoint as it is, and the baselines: a clip is shorter than a window.

    So what is reset there, or lent, is nothing.
    """
    ours, *others = sorted(
        (arm for arm in models.arms if arm.checkpoint and arm.mode == "kept"),
        key=lambda arm: arm.checkpoint != models.main.folder,
    )
    label = "trained model" if models.main.ttt is None else "trained model with memory"
    arms = {BASE: STOCK, TRAINED: replace(ours, label=label)}
    return arms | {arm.name: arm for arm in others}


def _codes(
    pairs: list[Pair], models: Models, args: argparse.Namespace
) -> tuple[dict[Path, Tensor], dict[Path, str]]:
    info = models.main.base.info
    cache = CodesCache(
        args.codes_cache, info.get_mimi(models.device), load_mimi=info.get_mimi,
        mono_side=args.side,
    )  # fmt: skip
    padding = Interleaver(info.get_text_tokenizer()).text_padding
    return clip_codes(pairs, cache, padding, encode_workers(args, models.device))


def _score(
    models: Models, arms: Mapping[str, Arm], codes: Mapping[Path, Tensor], args: argparse.Namespace
) -> tuple[dict[str, dict[Path, float]], dict[Path, str]]:
    rows = scored_rows(models.main.base.lm_config, args.side, args.codebooks)
    names = {arm: name for name, arm in arms.items()}
    nll: dict[str, dict[Path, float]] = {}
    lost: dict[Path, str] = {}
    total = len(arms) * sum(clip.shape[-1] for clip in codes.values())
    with tqdm(total=total, desc="scoring", unit="frame", unit_scale=True) as bar:
        for arm, lm in models.open(list(arms.values())):
            bar.set_postfix_str(names[arm])
            nll[names[arm]], broken = clip_nll(
                lm, codes, rows,
                normalise=args.normalise, batch_size=args.batch_size, progress=bar.update,
            )  # fmt: skip
            lost |= {path: f"{arm.label}: {why}" for path, why in broken.items()}
    return {name: nll[name] for name in arms}, lost


if __name__ == "__main__":
    run_cli(main, "it starts from the beginning")
