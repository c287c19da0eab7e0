"""What the commands that compute share: opening the engine, streaming an answer, the figures, files of results."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import zoo
from ..config import DEFAULT_MAX_TOKENS, SMALL_MODEL, SamplingParams
from ..errors import UsageError
from .console import Console
from .options import PromptOptions, RunOptions
from .report_tables import report_tables

if TYPE_CHECKING:
    from ..decoding.generate import TokenEvent
    from ..engine import Engine, Need
    from ..tokenizer import Tokenizer

INTERRUPTED = 130  # 128 + SIGINT, as shells count


@dataclass
class Answer:
    """What has come so far; `finish_reason` is None while it is coming, and at the end says why it ended."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def take(self, events: Iterable[TokenEvent], console: Console | None) -> None:
        """Follow the events to their end, or until Ctrl-C, showing the text as it comes."""
        try:
            for event in events:
                self.token_ids.append(event.token_id)
                self.text += event.text
                if console is not None:
                    console.answer(event.text)
                self.finish_reason = event.finish_reason or self.finish_reason
        except KeyboardInterrupt:
            self.finish_reason = "interrupted"
        finally:
            if hasattr(events, "close"):
                events.close()

    @property
    def interrupted(self) -> bool:
        return self.finish_reason == "interrupted"


def named(model: str | None, console: Console) -> str:
    """The model to run: the one given, else the zoo's default, which is said."""
    if model is not None:
        return model
    found = f"{zoo.PREFIX}{zoo.DEFAULT}"
    console.note(f"no --model: running {found}, the small story teller that comes along")
    return found


@contextmanager
def opened(model: str, run: RunOptions, console: Console, need: Need | None = None) -> Iterator[Engine]:
    """The engine, with its loading shown; closed at the end whatever happens.

    `need` says how many tokens the context must hold when --context does not.
    """
    compile_kernels(model, run, console)
    from ..loading import load

    with load(model, need=need, **run.given(), notify=console.note, progress=console.progress) as engine:
        console.clear()
        yield engine
    console.clear()


def compile_kernels(model: str, run: RunOptions, console: Console) -> None:
    """Have the kernels compiled, once a machine, in a process of its own: before torch fills this one.

    A small model does without, so that its first run does not wait.
    """
    asked = run.config().kernels
    if asked == "compiled" or (asked == "auto" and not _is_small(model)):
        from ..kernels.warm import ensure_compiled

        ensure_compiled(console.note)


def _is_small(model: str) -> bool:
    """Is it on this machine, and known by its files to be below SMALL_MODEL. Opens nothing."""
    path = zoo.path_of(model) if model.startswith(zoo.PREFIX) else Path(model).expanduser()
    try:
        files = [*path.iterdir()] if path.is_dir() else [path]
        return 0 < sum(file.stat().st_size for file in files) < SMALL_MODEL
    except (OSError, ValueError):
        return False


def need_of(text: str, prompt: PromptOptions, params: SamplingParams) -> Need:
    """The context that a prompt and its answer need."""
    return lambda tokenizer: len(prompt_ids(tokenizer, text, prompt)) + (params.max_tokens or DEFAULT_MAX_TOKENS)


def prompt_ids(tokenizer: Tokenizer, text: str, prompt: PromptOptions) -> list[int]:
    """The prompt as the model is to see it: through its chat template where it has one, unless --raw."""
    if prompt.raw:
        return tokenizer.encode(text)
    if not tokenizer.has_chat_template:
        if prompt.system is not None:
            raise UsageError("--system needs a chat template, and this model has none.", "Put it into the prompt.")
        return tokenizer.encode(text)
    messages = [{"role": "system", "content": prompt.system}] if prompt.system is not None else []
    return tokenizer.encode_chat([*messages, {"role": "user", "content": text}])


def reading(console: Console) -> Callable[[int, int], None]:
    """Progress of the prompt."""
    return lambda done, total: console.progress(done, total, "reading the prompt")


def finish(engine: Engine, console: Console, *, stats: bool) -> None:
    """The figures that end a run."""
    report = engine.report()
    for warning in report.warnings:
        console.warn(warning)
    if stats:
        console.show(report_tables(report.to_dict()), on_stderr=True)
    console.note(report.summary())


def as_json(value: Any) -> str:
    """One line of strict JSON: values that are not finite become null."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, default=str) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def check_writable(*files: Path | None) -> None:
    """Refuse places that cannot be written before the work whose result they are to hold."""
    for file in files:
        if file is None or str(file) == "-":
            continue
        if file.is_dir():
            raise UsageError(f"'{file}' is a folder; name a file in it.")
        if not file.absolute().parent.is_dir():
            raise UsageError(f"There is no folder '{file.parent}' to write '{file.name}' into.")
        if not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
            raise UsageError(f"'{file}' may not be written.")


def write_file(path: Path, text: str) -> None:
    """Write whole or not at all."""
    try:
        if path.exists() and not path.is_file():  # /dev/stdout, a named pipe: nothing to replace
            path.write_text(text, encoding="utf-8")
            return
        handle, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                out.write(text)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UsageError(f"'{path}' cannot be written: {error.strerror}.") from None


def parse_share(text: str, option: str) -> float:
    """25% or 0.25 as a number above 0, at most 1; UsageError for anything else."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise UsageError(f"{option} {text} is not a share.", "Write 25% or 0.25.")
    return value
