"""Make a bundle: stream each file into a hidden folder beside OUT, resume what was killed, publish at the end."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np

from ..checkpoint.base import Checkpoint
from ..config import MiB, ModelConfig, WeightMap, format_size
from ..errors import BundleError, GenaiRunError, StorageError, UsageError
from .format import MANIFEST_FILE, FileEntry, Manifest, Source
from .journal import JOURNAL_FILE, Journal, new_journal
from .layout import BundlePlan
from .planner import plan_bundle
from .publish import HashedFile, partial_folder, publish_folder, recover, sync_folder, write_atomic, writer_lock
from .quantize import Quantization
from .records import DEFAULT_MEMORY, file_blocks, scratch_bytes
from .source import file_states, fingerprint, source_name

__all__ = ["BundlePlan", "plan_bundle", "write_bundle"]

Progress = Callable[[int, int, str], None]
SPARE_BYTES = MiB  # the manifest, the journal, folders


def write_bundle(
    checkpoint: Checkpoint,
    config: ModelConfig,
    weights: WeightMap,
    out: Path,
    *,
    dtype: str = "auto",
    quantization: Quantization | None = None,
    extras: Mapping[str, bytes | Path] | None = None,
    progress: Progress | None = None,
    memory_bytes: int = DEFAULT_MEMORY,
    overwrite: bool = False,
) -> Path:
    """Convert a checkpoint into the bundle OUT and return OUT.

    `dtype` and `quantization` are as for `plan_bundle`. `extras` are small files to place beside the weights
    (tokenizer, chat template), by name; config.json and generation_config.json are made from the checkpoint where they
    are not among them.
    `progress(done_bytes, total_bytes, file_name)` is called as bytes are written, those of a run before included.
    `memory_bytes` bounds the buffers; it changes no byte of the result. `overwrite` replaces a bundle that is there,
    once the new one is complete.

    Killed or interrupted, a run goes on from its last finished file when called again alike, and ends with equal
    bytes. Raises BundleError (OUT exists, another writer, an unfinished bundle of something else), StorageError (no
    space, a full disk), CorruptCheckpointError (NaN, short files), UnsupportedModelError, UsageError; then nothing new
    is left behind.
    """
    out = Path(os.path.abspath(out))
    plan = plan_bundle(checkpoint, config, weights, dtype=dtype, quantization=quantization)
    small = _small_files(checkpoint, plan, extras or {})
    _refuse_place(checkpoint, out)
    with _parents(out), writer_lock(out):
        recover(out)
        _refuse_existing(out, overwrite)
        try:
            states = file_states(checkpoint)
            source = Source(checkpoint.kind, source_name(checkpoint.path), fingerprint(checkpoint))
        except OSError as error:
            raise StorageError(f"The source cannot be read: {error.strerror} ({error.filename}).") from None
        journal, fresh = _open_partial(out, new_journal(source, plan, states), overwrite)
        needed = plan.total_bytes + sum(_size(content) for content in small.values()) + SPARE_BYTES
        needed -= sum(entry.bytes for entry in journal.files.values())
        needed += max((scratch_bytes(f, memory_bytes) for f in plan.files if f.name not in journal.files), default=0)
        free = shutil.disk_usage(out.parent).free
        if free < needed:
            if fresh:
                shutil.rmtree(partial_folder(out))
            raise _full(out, needed, free)
        try:
            _write_files(plan, small, out, journal, progress, memory_bytes)
            if file_states(checkpoint) != states:
                raise BundleError("The source has changed while it was being read.", "Run again when it is at rest.")
            (partial_folder(out) / JOURNAL_FILE).unlink()
            publish_folder(out, overwrite=overwrite)
        except GenaiRunError:
            shutil.rmtree(partial_folder(out), ignore_errors=True)
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                shutil.rmtree(partial_folder(out), ignore_errors=True)
                raise _full(out, needed) from None
            # Anything else may pass (a drive unplugged): what is done stays, for the next run.
            raise StorageError(
                f"Writing the bundle failed: {error.strerror or error}.",
                "Run again to go on from the last finished file.",
            ) from error
    return out


def _write_files(
    plan: BundlePlan,
    small: dict[str, bytes | Path],
    out: Path,
    journal: Journal,
    progress: Progress | None,
    memory_bytes: int,
) -> None:
    folder = partial_folder(out)
    total, done = plan.total_bytes, 0
    for file in plan.files:
        if file.name not in journal.files:
            with HashedFile(folder / file.name) as output, closing(file_blocks(file, folder, memory_bytes)) as blocks:
                output.write(np.frombuffer(file.header, np.uint8))
                for block in blocks:
                    output.write(block)
                    if progress is not None:
                        progress(done + output.size, total, file.name)
            assert output.size == file.nbytes, (file.name, output.size, file.nbytes)
            journal = journal.with_file(file.name, output.entry)
            journal.save(folder)
        done += file.nbytes
        if progress is not None:
            progress(done, total, file.name)
    entries: dict[str, FileEntry] = {file.name: journal.files[file.name] for file in plan.files}
    for name in sorted(small):
        content = small[name]
        entries[name] = write_atomic(folder / name, content if isinstance(content, bytes) else content.read_bytes())
    manifest = Manifest(
        journal.source, plan.parameters, plan.exactness, entries, plan.weights, plan.formats, plan.records, plan.small
    )
    write_atomic(folder / MANIFEST_FILE, manifest.to_json())


def _small_files(
    checkpoint: Checkpoint, plan: BundlePlan, extras: Mapping[str, bytes | Path]
) -> dict[str, bytes | Path]:
    taken = {MANIFEST_FILE, JOURNAL_FILE, *(file.name for file in plan.files)}
    for name, content in extras.items():
        if name in taken or name in ("", ".", "..") or "/" in name:
            raise UsageError(f"'{name}' cannot be placed in a bundle: the name is taken or no plain file name.")
        if isinstance(content, Path) and not content.is_file():
            raise UsageError(f"{content} is not a file, so it cannot be placed in the bundle.")
    made = {"config.json": checkpoint.config, "generation_config.json": checkpoint.generation_config}
    small: dict[str, bytes | Path] = {
        name: (json.dumps(body, indent=2, ensure_ascii=False) + "\n").encode() for name, body in made.items() if body
    }
    return small | dict(extras)


def _size(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


# ------------------------------------------------------------------ where it may go


def _refuse_place(checkpoint: Checkpoint, out: Path) -> None:
    place, source = Path(os.path.realpath(out)), Path(os.path.realpath(checkpoint.path))
    if place == source or (source.is_dir() and place.is_relative_to(source)):
        raise BundleError(
            f"{out} is inside the source {checkpoint.path}, which is never written to.", "Choose another folder."
        )
    for file in (source, *(Path(os.path.realpath(path)) for path in checkpoint.files)):
        if file.is_relative_to(place):
            raise BundleError(f"{out} holds the source {file}, which is never written to.", "Choose another folder.")


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise BundleError(f"{out} exists already.", "Give another folder, or --overwrite to replace a bundle.")
    # --overwrite is for bundles: it must not delete somebody's other folder after a slip of the hand.
    if out.is_symlink() or not out.is_dir() or not ((out / MANIFEST_FILE).is_file() or not any(out.iterdir())):
        raise BundleError(f"{out} is not a bundle, so it is not replaced.", "Give another folder.")


@contextmanager
def _parents(out: Path) -> Iterator[None]:
    """Make the folders above OUT, and take back those that stayed empty."""
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"The folder {out.parent} cannot be made: {error.strerror}.") from None
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise StorageError(f"The folder {out.parent} cannot be written to.")
    try:
        yield
    finally:
        for folder in made:
            with suppress(OSError):  # not empty: the bundle or what resumes it is there
                folder.rmdir()


def _open_partial(out: Path, journal: Journal, overwrite: bool) -> tuple[Journal, bool]:
    """The journal to go on from, and whether the partial folder is new. Files in it that are not done are removed."""
    folder = partial_folder(out)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise BundleError(f"{folder} stands where the bundle is to be made.", "Move it away.")
    fresh = not folder.exists()
    if not fresh:
        try:
            journal = journal.resumed(folder)
        except BundleError:
            if not overwrite:
                raise
    try:
        folder.mkdir(exist_ok=True)
        journal.save(folder)
        for path in folder.iterdir():
            if path.name not in journal.files and path.name != JOURNAL_FILE:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        sync_folder(out.parent)
    except OSError as error:
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        raise StorageError(f"The bundle cannot be made in {out.parent}: {error.strerror}.") from None
    return journal, fresh


def _full(out: Path, needed: int, free: int | None = None) -> StorageError:
    """The disk has too little room: `free` bytes before the work began, or None where it ran out on the way."""
    wants = f"the bundle needs {format_size(needed)} ({needed} bytes)"
    when = f"is too full: {wants}, {format_size(free or 0)} ({free} bytes) were free"
    if free is None:
        when = f"became too full while the bundle was being written: {wants} in all"
    return StorageError(f"The disk of {out.parent} {when}.", "Make room, or choose a folder on another drive.")
