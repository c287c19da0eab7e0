"""Reading the checkpoint's files: read-only, by several threads, leaving no page cache behind; what identifies them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoint.base import Checkpoint
from ..errors import CorruptCheckpointError

SAMPLES, SAMPLE_BYTES = 16, 64 << 10  # what a fingerprint reads of each file


class SourceFiles:
    """Files opened when first read and kept open until the `with` ends. `scattered` turns readahead off."""

    def __init__(self, *, scattered: bool = False) -> None:
        self._scattered = scattered
        self._fds: dict[Path, int] = {}
        self._lock = Lock()

    def __enter__(self) -> SourceFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.drop_all()
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def read(self, path: Path, offset: int, into: npt.NDArray[np.uint8]) -> None:
        """Fill the contiguous array `into` from byte `offset`. Raises CorruptCheckpointError where the file ends."""
        got = read_all(self._fd(path), offset, into)
        if got < into.nbytes:
            raise CorruptCheckpointError(f"{path} ends at byte {offset + got}, {into.nbytes - got} short of a tensor.")

    def drop(self, path: Path, offset: int, nbytes: int) -> None:
        """Let the page cache forget these bytes."""
        drop_cache(self._fd(path), offset, nbytes)

    def drop_all(self) -> None:
        """Let the page cache forget every file read here, and what readahead brought in besides."""
        for fd in self._fds.values():
            drop_cache(fd, 0, 0)

    def _fd(self, path: Path) -> int:
        with self._lock:
            if path not in self._fds:
                fd = self._fds[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                if self._scattered and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            return self._fds[path]


def read_all(fd: int, offset: int, into: npt.NDArray[np.uint8]) -> int:
    """Fill the contiguous array `into` from byte `offset`; returns the bytes read, fewer only where the file ends."""
    view, done = into.reshape(-1).data, 0
    while done < len(view) and (got := os.preadv(fd, [view[done:]], offset + done)):
        done += got
    return done


def drop_cache(fd: int, offset: int, nbytes: int) -> None:
    """Advise that these bytes of an open file (0: to its end) are not needed again, where that can be said.

    The kernel keeps pieces of its cache that reach over an end of the range, and they can be megabytes large: who reads
    on should give the range from its start each time, not block by block.
    """
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


def source_name(path: Path) -> str:
    """What to call a source: its file or folder name, or org/name for a snapshot in the hub's cache."""
    full = Path(os.path.abspath(path))
    if full.parent.name == "snapshots" and full.parent.parent.name.startswith("models--"):
        return full.parent.parent.name.removeprefix("models--").replace("--", "/")
    return full.name


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of the source's configuration, tensor table, file sizes and 16 samples of 64 KiB from each file.

    Not of every byte, which would read the model twice: the bundle's own files carry full hashes. Paths play no part.
    """
    digest = hashlib.sha256()
    files = checkpoint.files
    numbers = {path: index for index, path in enumerate(files)}
    table = [
        (name, info.format, list(info.shape), numbers.get(info.path, -1), info.offset, info.nbytes)
        for name, info in sorted(checkpoint.tensors.items())
    ]
    digest.update(json.dumps([checkpoint.kind, checkpoint.config, table], sort_keys=True, default=str).encode())
    with SourceFiles(scattered=True) as source:
        for path in files:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            length = min(SAMPLE_BYTES, size)
            for index in range(SAMPLES):
                sample = np.empty(length, np.uint8)
                start = (size - length) * index // (SAMPLES - 1)
                source.read(path, start, sample)
                digest.update(sample.data)
    return f"sha256:{digest.hexdigest()}"


def file_states(checkpoint: Checkpoint) -> list[list[Any]]:
    """[name, size, time of last change in ns] of each file: unchanged means that it is still what was read before."""
    return [[path.name, (state := path.stat()).st_size, state.st_mtime_ns] for path in checkpoint.files]
