"""Talk to Moshi: `python -m moshi_ttt.stream --mic`, or `--file in.wav --out out.wav`.

Text goes to stdout as it comes, everything else to stderr.

With a file, the output is as long as the input, 24 kHz mono 16 bit. The last partial frame is
filled with silence; Moshi's answer to it is cut off where the input ends. Frame by frame the two
lie side by side: what is at a time in the output is what Moshi said at that time of the input, and
it had heard everything before. (Live, one frame, 80 ms, and the time it takes to compute go by
between the two.) Of a stereo file the right channel is the user, as in training data.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from moshi.models.lm import LMModel

from moshi_ttt.engine import FRAME_MS, Engine, Sampling
from moshi_ttt.errors import Parser, UserError, run_cli
from moshi_ttt.files import check_writable
from moshi_ttt.loops import (
    STATS_SECONDS,
    Interrupts,
    Readings,
    Reporter,
    stream_file,
    talk,
    user_channel,
)
from moshi_ttt.models import choose_device, cpu_threads, open_talker
from moshi_ttt.monitor import keeps_state
from moshi_ttt.session import (
    load_memory,
    load_session,
    require_memory,
    save_memory,
    save_session,
    session_sampling,
)
from moshi_ttt.sound import SoundCard, check_sound, device_list, sound_running

INTERRUPTED = 130
_SAMPLING = tuple(f.name for f in fields(Sampling))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's options.

    Raises:
        UserError: unknown, missing, contradictory or malformed ones.
    """
    p = Parser("python -m moshi_ttt.stream", __doc__)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--file", help="a recording to talk to; any rate, mono or stereo")
    what.add_argument("--mic", action="store_true", help="talk through microphone and loudspeaker")
    what.add_argument("--list-devices", action="store_true", help="list the sound devices")
    p.add_argument("--out", help="with --file: the wav file to write")
    p.add_argument("--channel", choices=("left", "right"), help="user of a stereo file (right)")
    p.add_argument("--input-device", help="number, or part of the name")
    p.add_argument("--output-device", help="number, or part of the name")
    p.add_argument("--checkpoint", help="a checkpoint folder (the newest under runs/)")
    p.add_argument("--base", help="a base folder or hub repository; alone: without a checkpoint")
    p.add_argument("--device", help="cuda or cpu (cuda if there is one)")
    p.add_argument("--threads", type=int, help="CPU threads (one per 32 M parameters)")
    p.add_argument("--seed", type=int, help="of the sampling (0, or that of the session)")
    p.add_argument("--temp", type=float, help="temperature of the voice (0.8)")
    p.add_argument("--temp-text", type=float, help="temperature of the text (0.7)")
    p.add_argument("--top-k", type=int, help="most likely codes to draw from (250; 0: all)")
    p.add_argument("--top-k-text", type=int, help="most likely text tokens (25; 0: all)")
    p.add_argument("--greedy", action="store_true", default=None, help="no sampling")
    p.add_argument(
        "--stats", nargs="?", const="", metavar="FILE.jsonl",
        help="statistics, of the memories too, every 5 seconds; to a file as well if one is named",
    )  # fmt: skip
    p.add_argument("--save-memory", help="file for what the memory has learned")
    p.add_argument("--load-memory", help="start with such a memory")
    p.add_argument("--save-session", help="file for the whole conversation")
    p.add_argument("--load-session", help="go on with such a conversation, to the bit")
    args = p.parse_args(argv)
    if args.file is not None:
        if args.out is None:
            raise UserError("--file needs --out")
        if Path(args.out).suffix.lower() != ".wav":
            raise UserError(f"--out writes wav: {args.out} should end in .wav")
        if Path(args.file).resolve() == Path(args.out).resolve():
            raise UserError(f"--out {args.out} would overwrite the file that is talked to")
    if args.file is None and (args.out is not None or args.channel is not None):
        raise UserError("--out and --channel go with --file")
    if not args.mic and (args.input_device is not None or args.output_device is not None):
        raise UserError("--input-device and --output-device go with --mic")
    if args.load_memory is not None and args.load_session is not None:
        raise UserError("--load-session brings its own memory: leave out --load-memory")
    if args.threads is not None and args.threads < 1:
        raise UserError(f"--threads must be at least 1, got {args.threads}")
    if args.stats and Path(args.stats).suffix.lower() != ".jsonl":
        raise UserError(f"--stats writes JSON lines: {args.stats} should end in .jsonl")
    for path in (args.out, args.save_memory, args.save_session, args.stats or None):
        if path is not None:
            check_writable(path)
    return args


def sampling_of(args: argparse.Namespace, gen_config: dict[str, Any]) -> Sampling:
    """The options' sampling; what they leave open is the session's, or else the base's.

    Raises:
        UserError: a value out of range.
    """
    if args.load_session is not None:
        start = session_sampling(args.load_session)
    else:
        start = Sampling(**{k: v for k, v in gen_config.items() if k in _SAMPLING})
    given = {k: getattr(args, k) for k in _SAMPLING if getattr(args, k) is not None}
    try:
        return replace(start, **given)
    except ValueError as error:
        raise UserError(str(error)) from error


def run(args: argparse.Namespace) -> None:
    """Do what the command line says.

    Raises:
        UserError: a mistake of the user's.
        KeyboardInterrupt: Ctrl-C, once everything is in order.
    """
    if args.list_devices:
        sys.stdout.write(device_list() + "\n")
        return
    device = choose_device(args.device)
    pcm = None if args.file is None else user_channel(args.file, args.channel)
    if args.mic:
        check_sound(args.input_device, args.output_device)
    talker = open_talker(args.checkpoint, args.base, device)
    sys.stderr.write(f"talking to {talker.name}, on {device}\n")
    torch.set_num_threads(args.threads or cpu_threads(talker.lm))
    sampling = sampling_of(args, talker.gen_config)
    readings = _readings(args, talker.lm)
    with ExitStack() as stack:
        if readings is not None:
            stack.callback(readings.close)
        engine = stack.enter_context(
            Engine(
                talker.lm, talker.mimi, talker.tokenizer,
                sampling=sampling, seed=args.seed or 0, watcher=readings,
                watch_every=round(STATS_SECONDS * 1000 / FRAME_MS),
            )
        )  # fmt: skip
        if args.load_session is not None:
            load_session(engine, args.load_session)
            if args.seed is not None:
                torch.manual_seed(args.seed)
        if args.load_memory is not None:
            load_memory(engine, args.load_memory)
        if args.save_memory is not None:
            require_memory(engine)
        interrupts, card = Interrupts(), None if pcm is not None else SoundCard()
        reporter = Reporter(engine, card, often=args.stats is not None, readings=readings)
        with interrupts.taken():
            try:
                if card is None:
                    assert pcm is not None
                    stream_file(engine, pcm, args.out, reporter.frame, interrupts.check)
                else:
                    with sound_running(card, args.input_device, args.output_device):
                        talk(engine, card, reporter.frame, lambda: interrupts.asked)
            except UserError:  # the sound card failed: what was learned until then is kept
                if card is not None and engine.times.count:
                    _keep(engine, args)
                raise
            finally:
                reporter.end()
        _keep(engine, args)
        interrupts.check()


def _readings(args: argparse.Namespace, lm: LMModel) -> Readings | None:
    """Of the memories, if statistics are wanted and there is something to read."""
    if args.stats is None:
        return None
    if keeps_state(lm):
        return Readings(args.stats or None)
    if args.stats:
        raise UserError(f"--stats {args.stats}: the model has no memory that keeps a state")
    return None


def _keep(engine: Engine, args: argparse.Namespace) -> None:
    for path, save in ((args.save_memory, save_memory), (args.save_session, save_session)):
        if path is not None:
            save(engine, path)
            sys.stderr.write(f"saved {path}\n")


def main(argv: list[str] | None = None) -> None:
    """The command line.

    Raises:
        SystemExit: status 2 after a mistake of the user's, 130 after Ctrl-C.
    """
    try:
        run_cli(lambda: run(parse(argv)))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
