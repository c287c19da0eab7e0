"""Files that appear complete or not at all: written beside, synced, renamed; the folder likewise; by one writer."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from ..config import MiB
from ..errors import BundleError, StorageError
from .format import FileEntry
from .source import drop_cache

SYNC_BYTES = 64 * MiB  # most bytes of a file that wait in memory for the disk
TEMPORARY = ".tmp"


def partial_folder(out: Path) -> Path:
    """Where a bundle grows: a hidden sibling of OUT, on the same file system."""
    return out.with_name(f".{out.name}.partial")


def _replaced_folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")


def write_all(fd: int, data: memoryview) -> None:
    """Write all of `data` at the file's position."""
    while data:
        data = data[os.write(fd, data) :]


def sync_folder(folder: Path) -> None:
    """Make renames within a folder survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def move_atomic(source: Path, target: Path) -> None:
    """Put a whole file, on the same file system, in a place: synced first, so that it is there whole, or as before."""
    fd = os.open(source, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(source, target)
    sync_folder(target.parent)


def write_atomic(path: Path, data: bytes) -> FileEntry:
    """Write a small file beside its place, sync it and rename it: it is there whole, or as before."""
    with HashedFile(path) as file:
        file.write(np.frombuffer(data, np.uint8))
    return file.entry


class HashedFile:
    """A file written front to back under a temporary name, hashed meanwhile; put in place when the `with` ends well.

    `entry` is its size and SHA-256 then. On an exception nothing of it stays.
    """

    entry: FileEntry

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._temporary = path.with_name(path.name + TEMPORARY)
        self._synced = 0
        self._hash = hashlib.sha256()

    def __enter__(self) -> HashedFile:
        self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._pool = ThreadPoolExecutor(2)
        self._pending: list[Future[None]] = []
        return self

    def write(self, data: npt.NDArray[np.uint8]) -> None:
        """Append a contiguous array, which must stay as it is until the next call returns: the work goes on meanwhile.

        A failure to write it is raised by that next call, or at the end of the `with`.
        """
        self._settle()
        if self.size - self._synced >= SYNC_BYTES:
            self._sync()
        view = data.reshape(-1).data
        self._pending = [
            self._pool.submit(self._hash.update, view),
            self._pool.submit(write_all, self._fd, view),
        ]
        self.size += len(view)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        placed = False
        try:
            self._pool.shutdown()
            if kind is None:
                self._settle()
                self._sync()
                os.replace(self._temporary, self.path)
                placed = True
                sync_folder(self.path.parent)
                self.entry = FileEntry(self.size, self._hash.hexdigest())
        finally:
            os.close(self._fd)
            if not placed:
                self._temporary.unlink(missing_ok=True)

    def _settle(self) -> None:
        for future in self._pending:
            future.result()
        self._pending = []

    def _sync(self) -> None:
        os.fsync(self._fd)
        drop_cache(self._fd, 0, 0)
        self._synced = self.size


@contextmanager
def writer_lock(out: Path) -> Iterator[None]:
    """Be the only writer of OUT on this machine, until the process ends, however it does. Raises BundleError,
    StorageError."""
    path = out.with_name(f".{out.name}.lock")
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise StorageError(f"The folder {out.parent} cannot be written to: {error.strerror}.") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last writer may have removed the file between our open and our lock: others would not see it.
            if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
                break
        except BlockingIOError:
            os.close(fd)
            raise BundleError(f"Another process is writing {out}.", "Wait for it, or choose another folder.") from None
        except OSError as error:
            os.close(fd)
            raise StorageError(f"{out.parent} cannot be locked for writing: {error.strerror}.") from None
        os.close(fd)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def recover(out: Path) -> None:
    """Put back the bundle that a kill in the middle of `publish_folder` left aside, or finish taking it away."""
    replaced = _replaced_folder(out)
    if replaced.exists():
        if out.exists():
            shutil.rmtree(replaced)
        else:
            os.rename(replaced, out)


def publish_folder(out: Path, *, overwrite: bool) -> None:
    """Rename the finished partial folder to OUT, in place of the bundle there with `overwrite`."""
    partial, replaced = partial_folder(out), _replaced_folder(out)
    sync_folder(partial)
    if overwrite and out.exists():
        os.rename(out, replaced)
    os.rename(partial, out)
    sync_folder(out.parent)
    if replaced.exists():
        shutil.rmtree(replaced)
