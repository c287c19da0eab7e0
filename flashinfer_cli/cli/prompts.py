"""Text from the command line, a file, stdin, or several of these joined."""

from __future__ import annotations

import os
import select
import stat
import sys
from collections.abc import Callable
from pathlib import Path

from ..errors import UsageError

PATIENCE = 2.0  # seconds of a silent pipe before we say what we wait for


def gather(text: str | None, file: str | None, notify: Callable[[str], None], what: str = "prompt") -> str | None:
    """`text`, then what `file` or else a piped stdin holds, a blank line between; None when there is nothing at all.

    One newline at the end of a file or of stdin belongs to the file, not to the text. Raises UsageError for what cannot
    be read or is not UTF-8.
    """
    parts = [] if text is None else [_checked(text)]
    if file is not None and file != "-":
        parts.append(_read_file(file, what))
    elif file == "-" or is_piped():
        piped = _read_stdin(notify, what)
        if piped or file == "-":
            parts.append(piped)
    return "\n\n".join(parts) if parts else None


def required(text: str | None, how: str, what: str = "prompt") -> str:
    if text is None:
        raise UsageError(f"There is no {what}.", how)
    return text


def is_piped() -> bool:
    """Is stdin a pipe, a socket or a file, rather than a terminal, /dev/null or nothing?"""
    if sys.stdin is None or sys.stdin.closed:
        return False
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):  # a stand-in without a descriptor
        return not sys.stdin.isatty()
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def _read_stdin(notify: Callable[[str], None], what: str) -> str:
    if sys.stdin is None:
        return ""
    try:
        if not sys.stdin.isatty() and not select.select([sys.stdin], [], [], PATIENCE)[0]:
            notify(f"Reading the {what} from stdin until it ends; start with </dev/null if none is meant.")
    except (OSError, ValueError):  # a stand-in without a descriptor, or a system that selects on sockets only
        pass
    raw = sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode()
    return _decoded(raw, "stdin")


def _read_file(name: str, what: str) -> str:
    path = Path(name)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"There is no file '{name}' to read the {what} from.") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"The file '{name}' cannot be read: {reason}.") from None
    return _decoded(raw, f"The file '{name}'")


def _decoded(raw: bytes, where: str) -> str:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where[0].upper()}{where[1:]} is not UTF-8 text: byte {error.start} is wrong.") from None
    return text.removesuffix("\n").removesuffix("\r")


def _checked(text: str) -> str:
    """Arguments that are not UTF-8 reach us with surrogates in them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("The prompt is not UTF-8 text.") from None
    return text
