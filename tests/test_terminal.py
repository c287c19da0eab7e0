"""The command line as a process: pipes that close, Ctrl-C, and what a terminal is shown."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = [sys.executable, str(ROOT / "tests" / "fake_engine.py")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
ENVIRONMENT.pop("NO_COLOR", None)


def start(*argv: str, **options) -> subprocess.Popen:
    given = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": ENVIRONMENT}
    return subprocess.Popen([*PROGRAM, *argv], **(given | options))


def test_a_reader_that_leaves_early_is_no_error():
    with start("generate", "-m", "linesendless", "-p", "a") as process:
        assert process.stdout.readline() == b"The sky is blue.again and\n"
        process.stdout.close()
        assert process.wait(10) == 0
        assert process.stderr.read() == b"1000 MiB budget: 400 MiB of weights stay, 1.95 GiB stream, context 4096\n"


def test_sigint_ends_with_130_and_the_figures():
    with start("generate", "-m", "endless", "-p", "a") as process:
        assert process.stdout.read(22) == b"The sky is blue. again"
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=10)[1]
    assert process.returncode == 130
    assert b"Traceback" not in err and err.endswith(b"exact\n")


def on_terminal(
    *argv: str, typed: tuple[str, ...] = (), after: dict[str, str] | None = None, **environment: str
) -> tuple[int, str]:
    """Run with all three streams on one terminal: (exit code, all that was shown).

    Types each of `typed` at a `> `, and what `after` says once its key has been shown.
    """
    process_id, terminal = pty.fork()  # a session of its own, so that Ctrl-C reaches the program
    if process_id == 0:
        os.execve(PROGRAM[0], [*PROGRAM, *argv], ENVIRONMENT | environment)
    shown, waiting, upcoming = "", list(typed), dict(after or {})
    last, silent = "", 0.0
    deadline = time.monotonic() + 20

    def write(text: str) -> None:
        nonlocal last
        last = text
        time.sleep(0.1 if text == "\x03" else 0)
        os.write(terminal, text.encode())

    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 0.2)[0]:
            # A signal between readline's drawing and its waiting is noticed with the next one only.
            silent += 0.2
            if last == "\x03" and silent > 2:
                silent = 0
                write(last)
            continue
        silent = 0
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # Linux' way to say that the other side has closed
            break
        if not piece:
            break
        shown += piece.decode(errors="replace")
        answer = next((key for key in upcoming if key in shown), None)
        if answer is not None:
            write(upcoming.pop(answer))
        elif waiting and shown.endswith("> "):
            write(waiting.pop(0))
    else:
        os.kill(process_id, signal.SIGKILL)
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1]), shown


def test_a_terminal_gets_a_bar_and_a_last_newline():
    code, shown = on_terminal("generate", "-m", "slow", "-p", "a")
    assert code == 0 and "loading" in shown and "\x1b[" in shown
    assert "The sky is blue.\r\n" in shown


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_control_codes_where_they_are_unwanted(environment):
    code, shown = on_terminal("generate", "-m", "slow", "-p", "a", "--stats", **environment)
    assert code == 0 and "loading" in shown, "long work is still announced"
    assert "\x1b" not in shown and "peak of the process" in shown


def test_control_codes_of_a_model_do_not_reach_the_terminal():
    code, shown = on_terminal("generate", "-m", "echo", "--raw", "-q", "-p", "a\x1b[2J\tb\x07", NO_COLOR="1")
    assert code == 0 and "a␛[2J" in shown and "b␇" in shown and "\x1b" not in shown


def test_chat_on_a_terminal_ends_with_ctrl_d():
    code, shown = on_terminal("chat", "-m", "x", typed=("hello\n", "\x04"), TERM="dumb")
    assert code == 0 and "1::hello\r\n" in shown and shown.rstrip().endswith("exact")


def test_ctrl_c_stops_the_answer_then_the_line_then_the_program():
    typed = ("hello\n", "half a line", "again\n", "\x03")
    code, shown = on_terminal("chat", "-m", "x", typed=typed, after={"half a line": "\x03"}, TERM="dumb")
    assert code == 130 and "1::hello" in shown and "2::again" in shown
    stop = {"again again": "\x03"}
    code, shown = on_terminal("chat", "-m", "endless", typed=("hello\n", "\x04"), after=stop, TERM="dumb")
    assert code == 0 and "(stopped)" in shown and shown.rstrip().endswith("exact")
