"""The command line: its commands, and what every failure looks like to the user.

Nothing here imports torch or numba; commands import the engine when they run, so that --help is instant.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from .. import __version__
from ..errors import GenaiRunError
from .bundle import bundle
from .calibrate import calibrate
from .chat import chat
from .console import Console, OutputClosedError
from .convert_heads import convert_heads
from .generate import generate
from .replay import replay
from .running import INTERRUPTED
from .spread import spread
from .studies import evaluate, inspect, plan, profile
from .train import several, train
from .tune import tune
from .zoo import zoo

NAME = "genai-run"
app = typer.Typer(
    name=NAME,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command, _panel in (
    (generate, "Run"), (chat, "Run"),
    (inspect, "Prepare"), (plan, "Prepare"), (bundle, "Prepare"), (calibrate, "Prepare"),
    (profile, "Measure"), (evaluate, "Measure"), (replay, "Measure"),
    (train, "Train"), (tune, "Train"), (convert_heads, "Train"), (zoo, "Train"),
):  # fmt: skip
    app.command(rich_help_panel=_panel)(spread(_command))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{NAME} {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Run language models larger than memory.

    Weights stay on the SSD and stream in under one memory budget for the whole process.
    """


def run(argv: list[str]) -> int:
    """One command; gives the exit code. Every failure ends in a sentence on stderr, never in a traceback."""
    try:
        return int(
            app(
                args=several(argv) if argv[:1] in (["train"], ["convert-heads"]) else argv or ["--help"],
                prog_name=NAME,
                standalone_mode=False,
            )
            or 0
        )
    except OutputClosedError:
        _abandon_stdout()
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except GenaiRunError as error:
        return _failed(error, error.message, error.hint, error.exit_code)
    except MemoryError as error:
        hint = "Lower --memory or --context: other programs need memory too."
        return _failed(error, "The system has no more memory to give.", hint, 1)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own, about the command line
            context = getattr(error, "ctx", None)
            asked = context.command_path if context is not None else NAME
            said = error.format_message().replace("Value error, ", "")  # the parser's, not the user's
            return _failed(error, said, f"{asked} --help lists what there is.", getattr(error, "exit_code", 2))
        found = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        hint = "This is a bug. Set GENAI_RUN_DEBUG=1 and run again to see where."
        return _failed(error, f"Something unforeseen happened ({found}).", hint, 1)


def _failed(error: BaseException, message: str, hint: str | None, code: int) -> int:
    if os.environ.get("GENAI_RUN_DEBUG"):
        traceback.print_exception(error)
    Console().error(message, hint)
    return code


def _abandon_stdout() -> None:
    """Keep the interpreter from complaining, when it ends, that nobody reads its stdout."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):
        return


def main() -> None:
    """The `genai-run` script."""
    sys.exit(run(sys.argv[1:]))
