"""One request, read by the thread that took it: a run of bytes, or records scattered over memory."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import numpy as np

from ..errors import CorruptCheckpointError, StorageError
from .aio import Aio, Batch
from .files import Files
from .scatter import Pieces, read_one_by_one
from .spans import ALIGN

CALLERS_DEPTH = 512  # reads in flight that their callers began


class Reader:
    """Reads of files that it opens. Thread-safe; a thread that ends says so, and `files` are closed last."""

    def __init__(self, direct: str) -> None:
        self.files = Files(direct)
        self.batched = True  # records by Aio, where there is any
        self._own = threading.local()
        self._lock = threading.Lock()
        self._callers: Aio | None = None  # what `begin` hands reads to, once it is asked for
        self._asked = False
        self._lent: list[Aio] = []  # to compiled code

    def read(self, path: Path, offset: int, target: memoryview) -> None:
        """Fill `target` from `offset` on, as far as the file goes; both aligned to ALIGN.

        Raises StorageError, CorruptCheckpointError where the file ends before the last ALIGN bytes.
        """
        fd, direct = self.files.open(path)
        done, length = 0, len(target)
        while done < length:
            try:
                got = os.preadv(fd, [target[done:] if done else target], offset + done)
            except OSError as error:
                raise StorageError(f"Reading {path} at byte {offset + done} failed: {error.strerror}.") from error
            done += got
            # The last block of a file ends inside an aligned request, and so does a direct read there.
            if got == 0 or (direct and got % ALIGN):
                break
        if done < length:
            size = os.fstat(fd).st_size
            if offset + length - size >= ALIGN:
                raise CorruptCheckpointError(f"{path} ended at byte {size}: it has shrunk since it was opened.")
            if offset + done < size:
                raise StorageError(f"Reading {path} at byte {offset + done} stopped short.")
        if not direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)

    def scatter(self, path: Path, pieces: Pieces) -> None:
        """Read records to their places. Raises StorageError, CorruptCheckpointError where the file ends before one."""
        fd, direct = self.files.open_for_sectors(path)
        aio = self._aio() if direct and len(pieces) > 1 else None
        read = read_one_by_one if aio is None else aio.read
        try:
            got = read(fd, pieces.offsets, pieces.first, pieces.views)
        except OSError as error:
            got = np.full(len(pieces), -(error.errno or errno.EIO))
        self._check(path, pieces, got, direct)

    def _check(self, path: Path, pieces: Pieces, got: np.ndarray, direct: bool) -> None:
        """Read again, buffered, what the drive would not give by sectors; raise where something else went wrong."""
        if (got == pieces.sizes).all():
            return
        least = int(got.min(initial=0))
        if least < 0:
            if direct and -least == errno.EINVAL:
                self.files.refuse_sectors()
                return self.scatter(path, pieces)
            raise StorageError(f"Reading {path} failed: {os.strerror(-least)}.")
        short = np.flatnonzero(got != pieces.sizes)
        end = int(pieces.offsets[short[0]] + got[short[0]])
        raise CorruptCheckpointError(f"{path} ended at byte {end}: it has shrunk since it was opened.")

    # ---- by the thread that asks
    def begin(self, path: Path, pieces: Pieces) -> Batch | None:
        """Hand records' reads to the kernel here and now; None where there is no Aio for it."""
        fd, direct = self.files.open_for_sectors(path)
        if not direct or not self.batched:
            return None
        with self._lock:
            if not self._asked:
                self._asked, self._callers = True, Aio.open(CALLERS_DEPTH)
            if self._callers is None:
                return None
            kept, requests = pieces.memory, pieces.requests
            return self._callers.begin(fd, pieces.offsets, pieces.first, pieces.views, kept, requests)

    def end(self, path: Path, pieces: Pieces, batch: Batch, wait: bool = True) -> bool:
        """Whether a batch has ended; raises as `scatter` does."""
        with self._lock:
            assert self._callers is not None
            got = self._callers.end(batch, wait)
        if batch.left:
            return False
        self._check(path, pieces, got, True)
        return True

    def lend(self) -> Aio | None:
        """One for compiled code alone, closed with this; None where there is none."""
        aio = Aio.open(CALLERS_DEPTH)
        self._lent += [] if aio is None else [aio]
        return aio

    def close(self) -> None:
        """Let what callers began end, and close the files."""
        while self._lent:
            self._lent.pop().close()
        if self._callers is not None:
            self._callers.close()
            self._callers = None
        self.files.close()

    def _aio(self) -> Aio | None:
        """This thread's own; None where there is none."""
        if not hasattr(self._own, "aio"):
            self._own.aio = Aio.open() if self.batched else None
        found: Aio | None = self._own.aio
        return found

    def end_thread(self) -> None:
        """The calling thread reads no more."""
        aio = getattr(self._own, "aio", None)
        if aio is not None:
            aio.close()
