"""Talk to Moshi: `python -m moshi_ttt.stream --mic`, or `--file in.wav --out out.wav`.

Text goes to stdout as it comes, everything else to stderr.

With a file, the output is as long as the input, 24 kHz mono 16 bit. The last partial frame is
filled with silence; Moshi's answer to it is cut off where the input ends. Frame by frame the two
lie side by side: what is at a time in the output is what Moshi said at that time of the input, and
it had heard everything before. (Live, one frame, 80 ms, and the time it takes to compute go by
between the two.) Of a stereo file the right channel is the user, as in training data.

With the microphone, m at the keyboard mutes and unmutes, Ctrl-C ends; statistics say what was lost,
and whether the microphone hears the loudspeaker.
"""

from __future__ import annotations

import argparse
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from moshi.models.lm import LMModel

from moshi_ttt.devices import choose_sound, device_list
from moshi_ttt.engine import Engine, Frame
from moshi_ttt.errors import Parser, UserError, run_cli
from moshi_ttt.files import check_writable
from moshi_ttt.frame_times import FRAME_MS
from moshi_ttt.kept import Kept, Person, check_name
from moshi_ttt.loops import Interrupts, converse, stream_file, user_channel
from moshi_ttt.models import (
    add_model_options,
    check_model_options,
    choose_device,
    cpu_threads,
    open_talker,
    sampling_of,
)
from moshi_ttt.monitor import keeps_state
from moshi_ttt.reporter import STATS_SECONDS, Readings, Reporter
from moshi_ttt.saved_memory import load_memory, require_memory, save_memory
from moshi_ttt.session import load_session, save_session, session_sampling
from moshi_ttt.sound import SoundCard


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
    p.add_argument("--muted", action="store_true", help="start with the microphone muted (key m)")
    add_model_options(p)
    p.add_argument(
        "--stats", nargs="?", const="", metavar="FILE.jsonl",
        help="statistics, of the memories too, every 5 seconds; to a file as well if one is named",
    )  # fmt: skip
    p.add_argument("--save-memory", help="file for what the memory has learned")
    p.add_argument("--load-memory", help="start with such a memory")
    p.add_argument("--save-session", help="file for the whole conversation")
    p.add_argument("--load-session", help="go on with such a conversation, to the bit")
    p.add_argument("--user", help="start with this person's memory; keep it every minute")
    p.add_argument("--incognito", action="store_true", help="keep nothing, of --user neither")
    p.add_argument("--memories", metavar="FOLDER", help="with --user: where memories are kept")
    args = p.parse_args(argv)
    check_model_options(args)
    if args.file is not None:
        if args.out is None:
            raise UserError("--file needs --out")
        if Path(args.out).suffix.lower() != ".wav":
            raise UserError(f"--out writes wav: {args.out} should end in .wav")
    if args.file is None and (args.out is not None or args.channel is not None):
        raise UserError("--out and --channel go with --file")
    if not args.mic and (args.input_device, args.output_device, args.muted) != (None, None, False):
        raise UserError("--input-device, --output-device and --muted go with --mic")
    if args.load_memory is not None and args.load_session is not None:
        raise UserError("--load-session brings its own memory: leave out --load-memory")
    _check_user(args)
    if args.stats and Path(args.stats).suffix.lower() != ".jsonl":
        raise UserError(f"--stats writes JSON lines: {args.stats} should end in .jsonl")
    _check_outputs(args)
    return args


def _check_outputs(args: argparse.Namespace) -> None:
    """See that all files can be written, and none over another."""
    taken = {} if args.file is None else {Path(args.file).resolve(): "the file that is talked to"}
    for name in ("out", "save_memory", "save_session", "stats"):
        if path := getattr(args, name):
            option, file = f"--{name.replace('_', '-')}", check_writable(path)
            if (other := taken.get(file.resolve())) is not None:
                raise UserError(f"{option} {path} would overwrite {other}")
            taken[file.resolve()] = f"what {option} writes"
            setattr(args, name, str(file))


def _check_user(args: argparse.Namespace) -> None:
    if args.incognito and (args.save_memory is not None or args.save_session is not None):
        raise UserError("--incognito keeps nothing: leave out --save-memory and --save-session")
    if args.user is None:
        if args.memories is not None:
            raise UserError("--memories goes with --user")
        return
    check_name(args.user)
    if args.load_session is not None:
        raise UserError("--load-session brings its own memory: leave out --user")


def run(args: argparse.Namespace) -> None:
    """Do what the command line says.

    Raises:
        UserError: a mistake of the user's.
        KeyboardInterrupt: Ctrl-C, once everything is in order.
    """
    if args.list_devices:
        sys.stdout.write(device_list() + "\n")
        return
    if args.user is None:
        if args.incognito:
            sys.stderr.write("incognito: nothing is kept\n")
        _talk(args)
        return
    kept, new = Kept(args.memories), args.load_memory is not None
    with Person(kept, args.user, incognito=args.incognito, new=new) as person:
        _talk(args, person)


def _talk(args: argparse.Namespace, person: Person | None = None) -> None:
    device = choose_device(args.device)
    pcm = None if args.file is None else user_channel(args.file, args.channel)
    sound = choose_sound(args.input_device, args.output_device) if args.mic else None
    talker = open_talker(args.checkpoint, args.base, device)
    sys.stderr.write(f"talking to {talker.name}, on {device}\n")
    torch.set_num_threads(args.threads or cpu_threads(talker.lm))
    session = None if args.load_session is None else session_sampling(args.load_session)
    sampling = sampling_of(args, talker.gen_config, session)
    readings = _readings(args, talker.lm)
    with ExitStack() as stack:
        if readings is not None:
            stack.callback(readings.close)
        engine = stack.enter_context(
            Engine(
                talker.lm, talker.mimi, talker.tokenizer,
                sampling=sampling, seed=args.seed or 0,
                watch_every=None if readings is None else round(STATS_SECONDS * 1000 / FRAME_MS),
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
        if person is not None:
            person.begin(engine)
        interrupts = Interrupts()
        card = None if sound is None else SoundCard(*sound, muted=args.muted)
        reporter = Reporter(engine, card, often=args.stats is not None, readings=readings)

        def each(frame: Frame) -> None:
            reporter.frame(frame)
            if person is not None:
                person.frame()

        with interrupts.taken():
            try:
                if card is None:
                    assert pcm is not None
                    stream_file(engine, pcm, args.out, each, interrupts.check)
                else:
                    converse(engine, card, reporter, each, lambda: interrupts.asked)
            except UserError as error:  # the sound card failed: what was learned until then is kept
                if card is not None and engine.times.count:
                    _keep_after(error, engine, args, person)
                raise
            except KeyboardInterrupt:
                if person is not None and not interrupts.insisted:
                    person.end()
                raise
            finally:
                reporter.end()
            _keep(engine, args, person)
        interrupts.check()


def _readings(args: argparse.Namespace, lm: LMModel) -> Readings | None:
    """Of the memories, if statistics are wanted and there is something to read."""
    if args.stats is None:
        return None
    if keeps_state(lm):
        return Readings(args.stats or None, live=args.mic)
    if args.stats:
        raise UserError(f"--stats {args.stats}: the model has no memory that keeps a state")
    return None


def _keep(engine: Engine, args: argparse.Namespace, person: Person | None) -> None:
    try:
        for path, save in ((args.save_memory, save_memory), (args.save_session, save_session)):
            if path is not None:
                save(engine, path)
                sys.stderr.write(f"saved {path}\n")
    finally:
        if person is not None:
            person.end()


def _keep_after(
    error: UserError, engine: Engine, args: argparse.Namespace, person: Person | None
) -> None:
    try:
        _keep(engine, args, person)
    except UserError as another:
        raise UserError(f"{error}; and {another}") from error


def main(argv: list[str] | None = None) -> None:
    """The command line.

    Raises:
        SystemExit: status 2 after a mistake of the user's, 130 after Ctrl-C, 143 after SIGTERM.
    """
    try:
        run_cli(lambda: run(parse(argv)))
    except KeyboardInterrupt as interrupt:
        sys.exit(128 + (interrupt.args[0] if interrupt.args else signal.SIGINT))


if __name__ == "__main__":
    try:
        main()
    finally:  # all is in order: one more Ctrl-C has nothing left to break off
        signal.signal(signal.SIGINT, signal.SIG_IGN)
