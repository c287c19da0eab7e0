"""Every error a user can cause or meet, each with one clear sentence and, where there is one, a hint.

    GenaiRunError                   exit 1
    ├── UsageError                  exit 2   a flag, value or combination that cannot work
    │   ├── BudgetError                      the memory budget is below the least that would do
    │   ├── ContextError                     prompt and answer are longer than the context
    │   └── DeviceError                      an unknown or absent device
    ├── CheckpointError                      the model's files
    │   ├── CheckpointNotFoundError          nothing there, or nothing that is a model
    │   ├── CorruptCheckpointError           truncated, lying or contradictory files, NaN weights
    │   └── UnsupportedModelError            an architecture, tensor or format that we do not run
    ├── TokenizerError                       no tokenizer, or one that cannot be read
    ├── BundleError                          incomplete, changed, or made with other parameters
    └── StorageError                         reads and writes that failed, a full disk

`assert` is for our own bugs; these are for the user's.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GenaiRunError(Exception):
    """Base of all errors shown to the user: `message` is one sentence, `hint` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(GenaiRunError):
    """What was asked for cannot be done as asked."""

    exit_code = 2


class BudgetError(UsageError):
    """The budget is below `least` bytes, the smallest that would do."""

    def __init__(self, message: str, hint: str | None = None, *, least: int) -> None:
        super().__init__(message, hint)
        self.least = least


class ContextError(UsageError):
    """More tokens than the context holds."""


class DeviceError(UsageError):
    """An unknown device, or one that this machine lacks."""


class CheckpointError(GenaiRunError):
    """Something about the model's files."""


class CheckpointNotFoundError(CheckpointError):
    """The path is missing, or holds no model."""


class CorruptCheckpointError(CheckpointError):
    """The files contradict themselves or each other."""


class UnsupportedModelError(CheckpointError):
    """A model, tensor or number format outside of what we run."""


class TokenizerError(GenaiRunError):
    """Text is needed and no usable tokenizer is there."""


class BundleError(GenaiRunError):
    """A bundle that is incomplete, damaged, or not the one asked for."""


class StorageError(GenaiRunError):
    """The disk refused: full, unreadable, gone."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, for hints; None when nothing is alike."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return found[0] if found else None
