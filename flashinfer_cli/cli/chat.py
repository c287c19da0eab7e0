"""`genai-run chat`: turns in, turns out, the conversation's keys and values kept between them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

from ..config import SamplingParams
from ..errors import ContextError, nearest
from .console import Console
from .options import Model, Quiet, RunOptions, SamplingOptions, Stats, System
from .report_tables import report_tables
from .running import INTERRUPTED, Answer, finish, opened, reading

if TYPE_CHECKING:
    from ..engine import Engine

PROMPT = "> "
COMMANDS = {
    "/help": "this list",
    "/reset": "forget the conversation",
    "/system": "show the system message, or with TEXT after it: set it and begin anew",
    "/stats": "the figures so far",
    "/exit": "leave, as Ctrl-D does",
}


class _LeaveError(Exception):
    """The user has had enough."""

    def __init__(self, code: int = 0) -> None:
        self.code = code


def chat(
    model: Model,
    sampling: SamplingOptions,
    run: RunOptions,
    system: System = None,
    quiet: Quiet = False,
    stats: Stats = False,
) -> None:
    """Talk with a model.

    Ctrl-C stops an answer, and at the empty prompt leaves; so does Ctrl-D. /help lists what else there is. With stdin
    piped, each line is a turn.
    """
    console = Console(quiet)
    params = sampling.params()
    with opened(model, run, console) as engine:
        talk, code = _Talk(engine, console, params, system), 0
        read = _reader(console)
        if sys.stdin.isatty():
            console.note("/help for commands, Ctrl-D to leave")
        try:
            while True:
                talk.turn(read())
        except _LeaveError as leave:
            code = leave.code
        finish(engine, console, stats=stats)
    raise typer.Exit(code)


class _Talk:
    """One conversation and the commands about it."""

    def __init__(self, engine: Engine, console: Console, params: SamplingParams, system: str | None) -> None:
        self.engine, self.console, self.params = engine, console, params
        self.session = engine.chat(system)

    def turn(self, line: str) -> None:
        message = line.strip()
        if message.startswith("/"):
            self._command(*message.partition(" ")[::2])
        elif message:
            self._answer(message)

    def _answer(self, message: str) -> None:
        answer = Answer()
        try:
            answer.take(self.session.send(message, self.params, progress=reading(self.console)), self.console)
        except ContextError as error:
            self.console.error(error.message, "/reset begins anew; --context makes more room.")
            return
        if not answer.text.endswith("\n"):
            self.console.answer("\n")
        if answer.interrupted and not sys.stdin.isatty():
            raise _LeaveError(INTERRUPTED)
        if answer.interrupted:
            self.console.note("(stopped)")
        elif answer.finish_reason == "length":
            self.console.note("(cut at --max-tokens or the end of the context)")

    def _command(self, name: str, rest: str) -> None:
        say = self.console.say
        if name in ("/exit", "/quit", "/bye"):
            raise _LeaveError
        if name == "/help":
            for command, what in COMMANDS.items():
                say(f"{command:8} {what}")
        elif name == "/reset":
            self.session.reset()
            say("The conversation is forgotten.")
        elif name == "/system" and rest.strip():
            self.session.system = rest.strip()
            self.session.reset()
            say("The system message is set, and the conversation begins anew.")
        elif name == "/system":
            say(self.session.system or "There is no system message.")
        elif name == "/stats":
            self.console.show(report_tables(self.engine.report().to_dict()), on_stderr=True)
        else:
            close = nearest(name, COMMANDS)
            say(f"There is no command {name}." + (f" Did you mean {close}?" if close else " /help lists them."))


def _reader(console: Console) -> Callable[[], str]:
    """A function that gives the next line, and raises _LeaveError at the end."""
    if not sys.stdin.isatty():

        def piped() -> str:
            line = sys.stdin.readline()
            if not line:
                raise _LeaveError
            return line

        return piped
    try:
        import readline  # editing and history, in memory only, for every input() from here on
    except ImportError:
        line_so_far: Callable[[], str] = str
    else:
        line_so_far = readline.get_line_buffer

    def typed() -> str:
        console.clear()
        had_text = False

        def on_interrupt(*_: object) -> None:
            nonlocal had_text
            had_text = bool(line_so_far())  # readline has forgotten it by the time the exception is caught
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, on_interrupt)
        try:
            if sys.stdout.isatty():
                return input(PROMPT)
            sys.stderr.write(PROMPT)  # stdout is for answers only
            sys.stderr.flush()
            line = sys.stdin.readline()
        except EOFError:
            line = ""
        except KeyboardInterrupt:
            sys.stderr.write("\n")
            if had_text:
                return ""
            raise _LeaveError(INTERRUPTED) from None
        finally:
            signal.signal(signal.SIGINT, before)
        if not line:
            sys.stderr.write("\n")
            raise _LeaveError
        return line

    return typed
