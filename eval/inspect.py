"""A window into the memories while they hear a recording: `python -m eval.inspect --help`.

The recording goes through Mimi and the model as a stream would take it, and every so many seconds
each memory is looked at: inner loss before and after a write, size of the write, norm and distance
of the weights, gates. A heat map (a row a head, the sound's level below it), the numbers, and what
seems wrong, in words.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from moshi.models.lm import LMModel
from tqdm import tqdm

from eval.heat import PANELS, Grid, heat_map
from eval.output import REPORT, RESULTS, next_folder, write_json
from eval.panel import SIDES
from eval.perplexity import score
from eval.provenance import provenance
from eval.scores import Item
from eval.setup import EVAL_RUNS, Models, positive_float, read_items, say
from eval.tables import FRAME_SECONDS, as_markdown
from finetune.data.recording import open_audio
from moshi_ttt.audio import read_audio
from moshi_ttt.checkpoint import describe, load
from moshi_ttt.errors import Parser, UserError, run_cli
from moshi_ttt.files import written_whole
from moshi_ttt.findings import findings
from moshi_ttt.models import choose_device, cpu_threads
from moshi_ttt.monitor import CallMonitor, Reading, Values, to_json, watched_layers
from moshi_ttt.observe import period

PICTURE = "memory.png"
SECONDS, COLUMNS, CALL = 8.0, 200, 100
"""Between readings at least; of a long recording at most so many; about so many frames a call."""
QUIET = -80.0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's options.

    Raises:
        UserError: unknown, missing or malformed ones.
    """
    p = Parser("python -m eval.inspect", __doc__)
    p.add_argument("checkpoint", help="a checkpoint folder, with a memory")
    p.add_argument("audio", help="a recording; any rate, mono or stereo (left Moshi, right user)")
    p.add_argument("--out", help="folder to make (runs/eval/<checkpoint>-inspect-<audio>)")
    p.add_argument(
        "--every", type=positive_float, metavar="SECONDS",
        help="between readings (8, or what makes 200 of them)",
    )  # fmt: skip
    p.add_argument("--side", choices=SIDES, help="who a mono recording is (user)")
    p.add_argument("--base", help="base folder or hub repository (the checkpoint's)")
    p.add_argument("--device", help="cuda or cpu (cuda if there is one)")
    p.add_argument("--codes-cache", default="data/codes", help="folder for Mimi's codes")
    p.set_defaults(encode_workers=1)
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Listen, look, write and print.

    Raises:
        UserError: what the user has to change, in one line.
    """
    args = parse(argv)
    device, audio = choose_device(args.device), Path(args.audio).expanduser()
    described = describe(args.checkpoint, base=args.base)
    if described.ttt is None or not described.ttt.persistent_states:
        raise UserError(f"{args.checkpoint} has no memory that keeps a state: nothing to inspect")
    models = Models(described, [], device, described.dtype)
    book = open_audio([audio], str(audio))
    stereo = book.channels == 2
    if stereo and args.side is not None:
        raise UserError(
            f"--side {args.side} is of a mono recording; {audio} is stereo: left Moshi, right user"
        )
    args.side = args.side or ("moshi" if stereo else "user")  # "user" would swap the channels
    out = next_folder(args.out, EVAL_RUNS / f"{models.name}-inspect-{audio.stem}")
    lm = load(described.folder, base=described.base, device=device).lm
    if device.type == "cpu":
        torch.set_num_threads(cpu_threads(lm))
    frames = _period(lm)
    needed = 2 * frames * FRAME_SECONDS
    if book.duration < needed:
        raise UserError(
            f"{audio} is {book.duration:.2f} s long: two writes of this memory take {needed:.2f} s"
        )
    level = _level(audio)
    (item,) = read_items([book], models, args, [])
    per_call = frames * max(1, round(CALL / frames))
    seconds = args.every or max(SECONDS, item.frames * FRAME_SECONDS / COLUMNS)
    every = max(1, round(seconds / FRAME_SECONDS / per_call))
    readings = listen(lm, item, per_call, every)

    name = f"{models.name} hears {audio.name}"
    grids, rows = grids_of(readings)
    edges = [*(r.at for r in readings), min(item.frames, readings[-1].at + every * per_call)]
    out.mkdir(parents=True, exist_ok=True)
    with written_whole(out / PICTURE) as beside:
        heat_map(grids, rows, edges, level, name).savefig(beside, format="png")
    found = findings(readings)
    side = "left Moshi, right user" if stereo else args.side
    facts = {"audio": str(audio), "seconds": round(book.duration, 2), "side": side}
    facts |= {"frames between readings": every * per_call, **provenance("eval.inspect", device)}
    with written_whole(out / REPORT) as beside:
        beside.write_text(report(name, found, readings, facts), encoding="utf-8")
    numbers = [to_json(reading, "frame") for reading in readings]
    results = {**models.facts(), "facts": facts, "findings": found, "readings": numbers}
    write_json(results, out / RESULTS)
    for line in found or ["nothing wrong was found with the memories"]:
        say(line)
    say("written: " + ", ".join(str(out / file) for file in (PICTURE, REPORT, RESULTS)))


def _period(lm: LMModel) -> int:
    return period(next(iter(watched_layers(lm).values())).seq_modeling_block.memory)


def listen(lm: LMModel, item: Item, per_call: int, every: int) -> list[Reading]:
    """Stream a recording through a model, and look at the beginning of every so many calls.

    Args:
        lm: with memories; it is left as it was.
        item: codes.
        per_call: frames of a call, a multiple of the memories' period.
        every: calls from one reading to the next.

    Returns:
        Readings, each at the frame where its call begins.
    """
    monitor, readings = CallMonitor(lm), list[Reading]()
    done, looks = 0, True
    with tqdm(total=item.frames, desc="listening", unit="frame", unit_scale=True) as bar:

        def heard(frames: int) -> None:
            nonlocal done, looks
            if looks:
                readings.append(monitor.reading(done))
            done += frames
            bar.update(frames)
            # a piece that holds no write shows nothing
            looks = done % (every * per_call) == 0 and item.frames - done >= _period(lm)
            if looks:
                monitor.arm()

        with monitor.watching():
            score(lm, [item.codes], frames_per_call=per_call, progress=heard)
    return [reading for reading in readings if reading.layers]


def _level(audio: Path) -> Grid:
    """`[channels, frames]`, dB of full scale of every frame of 80 ms."""
    pcm = read_audio(audio)
    size = round(24_000 * FRAME_SECONDS)
    frames = torch.nn.functional.pad(pcm, (0, -pcm.shape[1] % size)).unflatten(1, (-1, size))
    power = frames.square().mean(-1)
    return (10 * power.clamp(min=10 ** (QUIET / 10)).log10()).double().numpy()


def grids_of(readings: Sequence[Reading]) -> tuple[dict[str, Grid], dict[str, list[str]]]:
    """What is drawn: of each quantity that is a number anywhere `[rows, readings]`, and row names.

    `gain` is inner loss before minus after; `share` the memory's update over the attention's.
    """
    grids, rows = dict[str, Grid](), dict[str, list[str]]()
    layers = list(readings[0].layers)
    for name in PANELS:
        columns, names = [], list[str]()
        for reading in readings:
            parts = [_values(reading.layers[layer], name) for layer in layers]
            columns.append([value for part in parts for value in part])
            names = [
                label + (f" head {head}" if name != "share" else "")
                for label, part in zip(map(_label, layers), parts, strict=True)
                for head in range(len(part))
            ]
        grid = np.array(columns, dtype=np.float64).T
        if np.isfinite(grid).any():
            grids[name], rows[name] = grid, names
    return grids, rows


def _label(layer: str) -> str:
    return f"layer {layer.rpartition('.')[2]}"


def _values(values: Values, name: str) -> list[float]:
    if name == "gain":
        both = zip(_values(values, "loss_before"), _values(values, "loss_after"), strict=True)
        return [before - after for before, after in both]
    if name == "share":
        memory, attention = values["memory"], values["attention"]
        assert isinstance(memory, float)
        assert isinstance(attention, float)
        return [memory / attention if attention else math.nan]
    found = values.get(name, [])
    return found if isinstance(found, list) else [found]


def report(
    title: str, found: Sequence[str], readings: Sequence[Reading], facts: dict[str, Any]
) -> str:
    """The report, Markdown: what was found, a table of the first and the last reading."""
    lines = [f"# {title}", "", f"{len(readings)} readings; the first and the last, mean of heads."]
    lines += ["", "## Found", ""]
    lines += [f"- {line}" for line in found] or ["Nothing wrong was found with the memories."]
    names = [PANELS[name].partition("\n")[0].replace("|", "\\|") for name in PANELS]
    table = [["layer", *names]]
    for layer in readings[0].layers:
        cells = [_label(layer)]
        for name in PANELS:
            ends = [_values(r.layers[layer], name) for r in (readings[0], readings[-1])]
            known = [[x for x in end if math.isfinite(x)] for end in ends]
            cells.append(" to ".join(f"{fmean(k):.4g}" if k else "-" for k in known))
        table.append(cells)
    shown = [i for i in range(len(table[0])) if i == 0 or any(r[i] != "- to -" for r in table[1:])]
    table = [[row[i] for i in shown] for row in table]
    lines += ["", f"![heads over time]({PICTURE})", "", "## Numbers", "", as_markdown(table), ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_cli(main)
