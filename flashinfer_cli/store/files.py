"""Files opened for reading past the page cache where the drive allows it, and what really happened.

Direct reads (O_DIRECT, or F_NOCACHE on macOS) keep streamed weights from filling memory as page cache, which a budget
would have to count. An open with O_DIRECT can succeed and its first read fail, so a read is tried before the mode is
believed.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from pathlib import Path

from ..errors import StorageError
from .spans import ALIGN

_PLAIN = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)


class Files:
    """Descriptors by path, opened as they are first asked for. `direct` is "auto" or "never". Thread-safe."""

    def __init__(self, direct: str = "auto") -> None:
        self.direct = direct
        self.fallback: str | None = None  # why reads are buffered, when direct ones were asked for
        self._lock = threading.Lock()
        self._opened: dict[Path, tuple[int, bool]] = {}
        self._buffered: dict[Path, int] = {}
        self._sectors = True  # the drive takes direct reads of 512-byte sectors, as far as is known

    def open(self, path: Path) -> tuple[int, bool]:
        """(file descriptor, whether reads of it are direct)."""
        known = self._opened.get(path)
        if known is not None:
            return known
        with self._lock:
            if path in self._opened:
                return self._opened[path]
            try:
                opened = self._open_direct(path) if self.direct != "never" else None
                if opened is None:
                    opened = os.open(path, _PLAIN), False
            except OSError as error:
                raise StorageError(f"Cannot open {path}: {error.strerror}.") from error
            self._opened[path] = opened
            return opened

    def _open_direct(self, path: Path) -> tuple[int, bool] | None:
        if sys.platform == "darwin":
            import fcntl

            fd = os.open(path, os.O_RDONLY)
            fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
            return fd, True
        if not hasattr(os, "O_DIRECT"):
            self.fallback = "this system has no direct reads"
            return None
        from ..device import allocate

        fd = -1
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            os.preadv(fd, [allocate(ALIGN).data], 0)
            return fd, True
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            if error.errno in (errno.ENOENT, errno.EACCES, errno.EISDIR):
                raise
            self.fallback = f"direct reads of {path.name} fail: {error.strerror}"
            return None

    def open_for_sectors(self, path: Path) -> tuple[int, bool]:
        """As `open`, for reads that are aligned to 512 bytes only."""
        fd, direct = self.open(path)
        if not direct or self._sectors:
            return fd, direct
        with self._lock:  # a second descriptor; the kernel is told not to read on
            if path not in self._buffered:
                fd = self._buffered[path] = os.open(path, _PLAIN)
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            return self._buffered[path], False

    def refuse_sectors(self) -> None:
        """A direct read of sectors has failed: the drive's blocks are larger."""
        self._sectors = False
        self.fallback = "the drive takes no direct reads of 512 bytes"

    @property
    def mode(self) -> str:
        """What really happens: "direct", or "buffered" and why."""
        if any(not direct for _, direct in self._opened.values()) or (self.direct == "never" and not self._opened):
            return f"buffered ({self.fallback or 'as asked'})"
        return "direct"

    def close(self) -> None:
        for fd in (*(fd for fd, _ in self._opened.values()), *self._buffered.values()):
            os.close(fd)
        self._opened.clear()
        self._buffered.clear()
