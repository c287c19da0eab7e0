"""Small files and headers read with errors a user understands: what is missing, unreadable, or not JSON."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError

MOST_JSON = 100_000_000  # bytes; a larger config, index or header is a mistake or an attack


def quoted(name: str) -> str:
    """A name out of a file, fit for a sentence: short, on one line, without control characters."""
    return repr(name if len(name) <= 120 else name[:100] + "...")


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file opened for reading, and its size in bytes.

    Raises CheckpointNotFoundError where there is no such file, StorageError where the system refuses to read it.
    """
    try:
        # O_NONBLOCK, so that a pipe of that name fails the check below instead of waiting for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            os.close(descriptor)
            raise CheckpointNotFoundError(f"{path} is not a file.")
        with open(descriptor, "rb", buffering=0) as file:
            yield file, state.st_size
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"{path} is not there.") from error
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_exactly(file: BinaryIO, offset: int, nbytes: int, path: Path) -> bytes:
    """`nbytes` from `offset`. Raises CorruptCheckpointError where the file ends before."""
    file.seek(offset)
    parts, left = [], nbytes
    while left:
        part = file.read(left)
        if not part:
            raise CorruptCheckpointError(
                f"{path} ends at byte {offset + nbytes - left}, before byte {offset + nbytes}."
            )
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def parse_object(raw: bytes, what: str, *, unique: bool) -> dict[str, Any]:
    """A JSON object; with `unique`, one that repeats no key at any depth, so that no two readers see different things.

    Raises CorruptCheckpointError, whose sentence starts with `what`.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CorruptCheckpointError(f"{what} names {quoted(twice)} twice.")
        return found

    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=once if unique else None)
    except UnicodeDecodeError as error:
        raise CorruptCheckpointError(f"{what} is not UTF-8 text.") from error
    except (ValueError, RecursionError) as error:
        reason = (
            str(error) if isinstance(error, json.JSONDecodeError) else "it is nested too deeply or has absurd numbers"
        )
        raise CorruptCheckpointError(f"{what} is not valid JSON: {reason}.") from error
    if not isinstance(parsed, dict):
        raise CorruptCheckpointError(f"{what} is not a JSON object.")
    return parsed


def read_json(path: Path, *, unique: bool = False) -> dict[str, Any]:
    """The JSON object in a file of at most MOST_JSON bytes."""
    with opened(path) as (file, size):
        if size > MOST_JSON:
            raise CorruptCheckpointError(f"{path} has {size} bytes, too many for a JSON file of a model.")
        raw = read_exactly(file, 0, size, path)
    return parse_object(raw.removeprefix(b"\xef\xbb\xbf"), str(path), unique=unique)


def names_in(folder: Path) -> list[str]:
    """Sorted names in a folder. Raises StorageError where it cannot be listed."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise StorageError(f"{folder} cannot be listed: {error.strerror or error}.") from error
