"""Where a model is: in our zoo, a path on this machine, or org/name on the Hugging Face hub, fetched into its own
cache."""

from __future__ import annotations

import errno
import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import zoo
from ..errors import CheckpointNotFoundError, GenaiRunError, StorageError, UsageError, nearest
from .gguf import split_name

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"
_HUB = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:[:/](?P<file>[^:]+\.gguf))?")
_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer*", "*.txt")
# Other people's copies of the same weights, and folders for other programs.
_LEFT_OUT = ("*/*", "consolidated*.safetensors", "adapter_*")


def resolve(model: str, revision: str | None = None, *, quiet: bool = True) -> Path:
    """The path of `model`: `zoo:NAME`, itself where it exists, else what the hub has under `org/name`.

    Of `org/name` safetensors, JSON and tokenizer files are fetched; `org/name:FILE.gguf` (or `org/name/FILE.gguf`)
    takes that file, all parts of it. HF_HOME, HF_HUB_OFFLINE and HF_TOKEN work as everywhere; `quiet` turns the hub's
    bars off. Raises CheckpointNotFoundError with a hint where there is no such model, StorageError on a full
    disk.
    """
    if not model.strip():
        raise UsageError("The model's name is empty.", "Give a folder, a .gguf file, a bundle, or org/name.")
    if model.startswith(zoo.PREFIX):
        return zoo.path_of(model)
    path = Path(model).expanduser()
    try:
        if path.exists():
            return path
        hub = None if path.is_symlink() else parse_hub_name(model)
    except (OSError, ValueError) as error:  # names that no file can have, folders that may not be entered
        raise CheckpointNotFoundError(f"'{model[:200]}' cannot be looked up: {error}.") from error
    near = _nearest_path(path)
    if hub is None:
        raise CheckpointNotFoundError(
            f"{model} is not there.", near or "Give a folder, a .gguf file, a bundle, or org/name on the hub."
        )
    try:
        return _fetch(*hub, revision, quiet)
    except CheckpointNotFoundError as error:
        if near:  # a mistyped path looks like a hub name
            raise CheckpointNotFoundError(error.message, f"{error.hint or ''} {near}".strip()) from error
        raise


def parse_hub_name(model: str) -> tuple[str, str | None] | None:
    """(org/name, GGUF file or None); None for what can only be a path."""
    found = _HUB.fullmatch(model)
    if found is None or ".." in model or (found["file"] is None and model.endswith((".gguf", ".safetensors"))):
        return None
    return found["repo"], found["file"]


def _nearest_path(path: Path) -> str | None:
    """A hint that names the sibling, of those that can be models, most like a path that is not there."""
    try:
        siblings = [entry for entry in path.parent.iterdir() if not entry.name.startswith(".")]
        near = nearest(path.name, [entry.name for entry in siblings if entry.is_dir() or entry.suffix == ".gguf"])
    except OSError:
        return None
    return f"Did you mean {path.parent / near}?" if near else None


def _fetch(repo: str, file: str | None, revision: str | None, quiet: bool) -> Path:
    patterns, left_out = list(_FILES), list(_LEFT_OUT)
    if file is not None:
        split = split_name(file)
        escaped = glob.escape(file)
        patterns = [f"{glob.escape(split[0])}-*-of-{split[2]:05d}.gguf" if split else escaped]
        left_out = []
    with _clear_errors(repo, revision):
        from huggingface_hub import snapshot_download

        with _progress_bars(quiet):
            folder = Path(
                snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=left_out or None)
            )
    if file is not None:
        if not (folder / file).is_file():
            raise CheckpointNotFoundError(f"{repo} on the hub has no file '{file}'.", _what_is_there(repo, revision))
        return folder / file
    if not any(folder.glob("*.safetensors")):
        raise CheckpointNotFoundError(
            f"{repo} on the hub has no safetensors files, the only ones taken from a whole repository.",
            _what_is_there(repo, revision),
        )
    return folder


def _what_is_there(repo: str, revision: str | None) -> str | None:
    """A hint that names a repository's GGUF files; the answer stands without it, so that no error here matters."""
    try:
        from huggingface_hub import list_repo_files

        names = [name for name in list_repo_files(repo, revision=revision) if name.endswith(".gguf")]
    except Exception:
        return None
    shown = ", ".join(f"{repo}:{name}" for name in names[:8])
    return f"Name one of its GGUF files: {shown}{', ...' if len(names) > 8 else ''}." if names else None


@contextmanager
def _progress_bars(quiet: bool) -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if not quiet or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _clear_errors(repo: str, revision: str | None) -> Iterator[None]:
    """The hub's many exceptions as one sentence each."""
    try:
        yield
    except GenaiRunError:
        raise
    except ImportError as error:
        raise CheckpointNotFoundError(
            f"{repo} is not a path here, and huggingface_hub is not installed to fetch it.",
            "pip install huggingface_hub",
        ) from error
    except Exception as error:
        raise _explained(error, repo, revision) from error


def _explained(error: Exception, repo: str, revision: str | None) -> GenaiRunError:
    from huggingface_hub import constants, errors

    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, errors.GatedRepoError):
        return CheckpointNotFoundError(
            f"{repo} is gated on the hub, and access to it has not been granted.",
            f"Ask for access at https://huggingface.co/{repo}, then log in with `hf auth login` or set HF_TOKEN.",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointNotFoundError(
            f"{repo} on the hub has no revision '{revision}'.", "Leave out --revision, or check it."
        )
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return CheckpointNotFoundError(
            f"There is no path {repo}, and no model {repo} on the hub that you may see.",
            "Check the spelling; a private model needs `hf auth login` or HF_TOKEN.",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"The disk is full: {repo} does not fit into {constants.HF_HUB_CACHE}.", "Set HF_HOME elsewhere."
        )
    if isinstance(error, PermissionError):
        return StorageError(
            f"{repo} cannot be written to {constants.HF_HUB_CACHE}: {error.strerror}.", "Set HF_HOME elsewhere."
        )
    if constants.HF_HUB_OFFLINE:
        return CheckpointNotFoundError(
            f"{repo} is not in the hub's cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE forbids fetching it.",
            "Unset HF_HUB_OFFLINE, or give a path.",
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return CheckpointNotFoundError(
            f"{repo} is not a path here, and the hub could not be reached to fetch it.",
            "Check the network, or give a path.",
        )
    return CheckpointNotFoundError(f"{repo} could not be fetched from the hub: {reason}.", "Try again, or give a path.")
