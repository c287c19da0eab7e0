"""Where words go: the answer to stdout, everything about the run to stderr. The only importer of rich.

Colour and moving bars appear only on a terminal without NO_COLOR and with a TERM that can; otherwise the text is plain.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from .tables import Table

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.progress import Progress, TaskID

BAR_AFTER = 0.5  # seconds of work before it is worth a bar
BAR_EVERY = 0.1  # seconds between two looks of a bar
LINE_EVERY = 10.0  # seconds between two lines about long work where a bar cannot be drawn
WIDE = 160  # columns of a table that no terminal bounds
# What a model says must not move the cursor or set colours: control characters become their visible pictures.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class OutputClosedError(Exception):
    """Whoever read our stdout has gone, as `head` does when it has enough."""


def is_live(stream: TextIO) -> bool:
    """May this stream be given colours and bars?"""
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    return not plain and stream.isatty()


class Console:
    """The two streams of one command. `quiet` leaves only answers and errors."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.out, self.err = _open(sys.stdout), _open(sys.stderr)
        self._pictures = self.out.isatty()
        self._ends_line = True
        self._noted: set[str] = set()
        self._work = _Work(self.err)

    # ---- stdout
    def answer(self, text: str) -> None:
        """Write a piece of the answer and have it seen at once."""
        self.clear()
        if not text:
            return
        self._ends_line = text.endswith("\n")
        try:
            self.out.write(text.translate(_PICTURES) if self._pictures else text)
            self.out.flush()
        except BrokenPipeError:
            raise OutputClosedError from None

    def end_answer(self) -> None:
        """On a terminal the shell's prompt should not follow the last word."""
        if self._pictures and not self._ends_line:
            self.answer("\n")

    def show(self, tables: list[Table], *, on_stderr: bool = False) -> None:
        """Draw tables, as the answer or as figures."""
        self.clear()
        stream = self.err if on_stderr else self.out
        try:
            for index, table in enumerate(tables):
                if index:
                    stream.write("\n")
                _draw(_rich(stream), table)
            stream.flush()
        except (BrokenPipeError, SystemExit):  # rich turns the first into the second
            if not on_stderr:
                raise OutputClosedError from None

    # ---- stderr
    def note(self, text: str) -> None:
        """A line about the run."""
        if not self.quiet:
            self._noted.add(text)
            self._line(text)

    def say(self, text: str) -> None:
        """A line that was asked for, so that not even `quiet` withholds it."""
        self._line(text)

    def warn(self, text: str) -> None:
        """Something the user should know, and that the run survives; once is enough."""
        if not self.quiet and text not in self._noted:
            self._noted.add(text)
            self._line(f"warning: {text}", "33")

    def error(self, message: str, hint: str | None = None) -> None:
        self._line(f"error: {message}", "31")
        if hint:
            self._line(f"hint: {hint}", "2")

    def _line(self, text: str, style: str = "") -> None:
        self.clear()
        try:
            if self._pictures and not self._ends_line:  # an answer broken off stands on the terminal
                self.out.write("\n")
                self.out.flush()
                self._ends_line = True
            self.err.write(f"\x1b[{style}m{text}\x1b[0m\n" if style and is_live(self.err) else text + "\n")
            self.err.flush()
        except BrokenPipeError:
            return

    def progress(self, done: int, total: int, what: str, figures: str = "") -> None:
        """Called again and again during long work; shows nothing of what is quickly over. `figures` may change."""
        if not self.quiet:
            self._work.update(done, total, what, figures)

    def clear(self) -> None:
        """Take the bar away."""
        self._work.clear()


class _Work:
    """The bar, or the occasional line, of the work under way."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.live = stream, is_live(stream)
        self.what = ""
        self.next = 0.0  # when to speak again
        self.first, self.every = BAR_AFTER if stream.isatty() else LINE_EVERY, BAR_EVERY if self.live else LINE_EVERY
        self.bar: Progress | None = None
        self.task: TaskID | None = None

    def update(self, done: int, total: int, what: str, figures: str = "") -> None:
        now = time.monotonic()
        if what != self.what:
            self.clear()
            self.what, self.next = what, now + self.first
        if total and done >= total:
            self.clear()
        elif now >= self.next:
            self.next = now + self.every
            self._show(done, total, figures)

    def _show(self, done: int, total: int, figures: str) -> None:
        what = f"{self.what}, {figures}" if figures else self.what
        if not self.live:
            share = f" {done / total:.0%}" if total else ""
            try:
                self.stream.write(f"{what}{share}\n")
                self.stream.flush()
            except BrokenPipeError:
                return
            return
        if self.bar is None:
            self.bar = _bar(self.stream)
            self.task = self.bar.add_task(self.what, total=total or None, start=True)
            self.bar.start()
        assert self.task is not None
        self.bar.update(self.task, completed=done, total=total or None, description=what)
        self.bar.refresh()

    def clear(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = self.task = None
        self.what = ""


def _open(stream: TextIO | None) -> TextIO:
    """The stream, or nowhere if it was closed before we came; characters it cannot encode never end the run."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")
    return stream


def _rich(stream: TextIO) -> RichConsole:
    from rich.console import Console as RichConsole

    live = is_live(stream)
    width = None if stream.isatty() else WIDE
    return RichConsole(
        file=stream, width=width, force_terminal=live, no_color=not live, highlight=False, markup=False, emoji=False,
        legacy_windows=False,
    )  # fmt: skip


def _bar(stream: TextIO) -> Progress:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns: list[Any] = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    ]
    return Progress(*columns, console=_rich(stream), transient=True, auto_refresh=False)


def _draw(console: RichConsole, table: Table) -> None:
    from rich.table import Table as RichTable
    from rich.text import Text

    if table.title:
        console.print(Text(table.title, style="bold"))
    drawn = RichTable(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(table.columns), header_style="dim"
    )
    for index, name in enumerate(table.columns):
        drawn.add_column(name, justify="left" if index in table.left else "right", overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(cell) for cell in row))
    console.print(drawn)
    for line in table.notes:
        console.print(Text(line, style="dim"))
