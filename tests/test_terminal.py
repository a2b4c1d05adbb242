"""Nothing that is shown holds up who shows it, and a terminal is left as it was found."""

import fcntl
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

import pytest

from moshi_ttt import terminal
from moshi_ttt.terminal import QUEUED, Console, Outlet, bar, pressed_keys
from tests.virtual_sound import until


def pipe_file():
    """A pipe's two ends, the one for writing as a text file."""
    read, write = os.pipe()
    return read, open(write, "w", encoding="utf-8")


def drained(descriptor):
    """All that is in a pipe whose other end is closed."""
    with open(descriptor, "rb") as file:
        return file.read().decode()


# -- outlets --------------------------------------------------------------------------------------


def test_a_pipe_that_nobody_reads_holds_nothing_up(monkeypatch):
    monkeypatch.setattr(terminal, "WAIT_SECONDS", 0.05)
    read, file = pipe_file()
    os.set_blocking(file.fileno(), False)
    while select.select([], [file], [], 0)[1]:
        os.write(file.fileno(), b"full")
    os.set_blocking(file.fileno(), True)
    outlet, line = Outlet(file), "x" * 999 + "\n"
    began = time.perf_counter()
    taken = [outlet.write(line) for _ in range(1000)]
    assert time.perf_counter() - began < 5  # 1000 waits are 50 s
    assert sum(taken) == sum(taken[:65]) == QUEUED // 1000
    assert outlet.lost == 935_000
    outlet.close()
    assert outlet.lost == 1_000_000
    os.close(read)  # the thread ends
    outlet._thread.join(5)
    assert not outlet._thread.is_alive()
    file.close()


def test_all_is_written_in_order_before_it_closes():
    read, file = pipe_file()
    outlet = Outlet(file)
    words = [f"{i} é " for i in range(500)]
    assert all(map(outlet.write, words))
    outlet.close()
    assert outlet.lost == 0
    assert not outlet.write("too late")
    file.close()
    assert drained(read) == "".join(words)


def test_a_reader_that_has_left_is_no_error_but_counted():
    read, file = pipe_file()
    os.close(read)
    outlet = Outlet(file)
    assert outlet.write("to nobody")
    outlet.close()
    assert outlet.lost == len("to nobody")
    file.close()


# -- the console ----------------------------------------------------------------------------------


def shown(raw, columns=40):
    """The lines of a screen after `raw`, by the few sequences that a console uses."""
    lines, row, column = [[]], 0, 0
    for token in re.findall(r"\x1b\[\d*[A-Z]|.|\n", raw, re.S):
        if token == "\n":
            row, column = row + 1, 0
            lines += [[]] * (row >= len(lines))
        elif token == "\r":
            column = 0
        elif token == "\x1b[K":
            lines[row] = lines[row][:column]
        elif token == "\x1b[A":
            row -= 1
        elif token.startswith("\x1b["):
            column = int(token[2:-1]) - 1
        else:
            assert column < columns
            lines[row] = lines[row][:column] + [" "] * (column - len(lines[row])) + [token]
            lines[row][column:] = [token]
            column += 1
    return ["".join(line) for line in lines]


class Terminal(io.StringIO):
    """A terminal 40 columns wide."""

    encoding = "utf-8"

    def isatty(self):
        return True

    def fileno(self):
        raise io.UnsupportedOperation


@pytest.fixture
def console(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((40, 24)))
    monkeypatch.setattr(Terminal, "fileno", lambda self: -1)
    monkeypatch.setattr(terminal, "_descriptor", lambda file: None)
    return lambda out, err: Console(out, err)


def test_words_go_on_above_the_meter(console):
    screen = Terminal()
    shows = console(screen, screen)
    shows.say("hello\n")
    shows.meter("meter 0")
    for i in range(12):
        shows.words(f" word{i}")
        shows.meter(f"meter {i}")
    until(lambda: "meter 11" in screen.getvalue(), 5)
    words = [" word0 word1 word2 word3 word4 word5", "word6 word7 word8 word9 word10 word11"]
    assert shown(screen.getvalue()) == ["hello", *words, "meter 11"]
    shows.say("a message\n")
    shows.meter("m" * 99)
    shows.words("more")
    shows.meter("meter")
    shows.close()
    assert shown(screen.getvalue()) == ["hello", *words, "a message", "more", ""]
    assert shows.lost == 0


def test_words_into_a_file_are_only_words(console):
    out, err = io.StringIO(), Terminal()
    shows = console(out, err)
    for i in range(3):
        shows.words(f" word{i}")
        shows.meter(f"meter {i}")
    shows.say("a message\n")
    shows.close()
    assert out.getvalue() == " word0 word1 word2\n"
    assert shown(err.getvalue()) == ["a message", ""]


def test_without_a_terminal_there_is_no_meter(console):
    out, err = io.StringIO(), io.StringIO()
    shows = console(out, err)
    shows.words("word")
    shows.meter("meter")
    shows.say("a message\n")
    shows.close()
    assert (out.getvalue(), err.getvalue()) == ("word\n", "a message\n")


def test_bars():
    assert bar(-100) == "[--------------------]    silent"
    assert bar(-30) == "[##########----------]  -30 dBFS"
    assert bar(3) == "[####################]    3 dBFS"


# -- keys -----------------------------------------------------------------------------------------


def test_without_a_terminal_there_are_no_keys():
    for file in (None, io.StringIO(), open(os.devnull)):
        with pressed_keys(file) as pressed:
            assert pressed is None
        if file is not None:
            file.close()


KEYS = """
import runpy, sys, time
pressed_keys = runpy.run_path(sys.argv[1])["pressed_keys"]  # alone: torch takes seconds
with pressed_keys(sys.stdin) as pressed:
    pressed()
    print("ready", flush=True)
    keys = ""
    while "q" not in keys:
        keys += pressed()
        time.sleep(0.01)
        if "x" in keys:
            raise RuntimeError(keys)
    print("got", keys, flush=True)
"""


def with_a_terminal():
    """In the child: its standard input is its terminal, and Ctrl-C is not ignored by birth."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("end", ["q", "x", "interrupt"])
def test_keys_come_singly_and_the_terminal_is_left_as_it_was(end):
    controller, own = pty.openpty()
    before = termios.tcgetattr(own)
    process = subprocess.Popen(
        [sys.executable, "-c", KEYS, terminal.__file__], stdin=own,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=with_a_terminal,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    now = termios.tcgetattr(own)
    assert not now[3] & (termios.ICANON | termios.ECHO)
    assert now[3] & termios.ISIG
    os.write(controller, b"am")
    os.write(controller, b"\x03" if end == "interrupt" else end.encode())
    out, err = process.communicate(timeout=20)
    assert termios.tcgetattr(own) == before
    if end == "q":
        assert out == "got amq\n"
        assert process.returncode == 0
    elif end == "x":
        assert "RuntimeError: amx" in err
    else:
        assert process.returncode == -signal.SIGINT
    os.close(controller)
    os.close(own)
