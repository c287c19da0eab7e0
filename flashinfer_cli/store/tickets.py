"""Reads under way, as those who asked for them see them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from .aio import Batch
from .scatter import Pieces

if TYPE_CHECKING:
    from .flash import FlashStore


class Ticket:
    """A batch of reads under way. `wait` returns when all have ended and raises what went wrong."""

    __slots__ = ("_done", "_left", "error", "kind", "sizes", "useful")

    def __init__(self, kind: str, sizes: tuple[int, ...], useful: int, requests: int | None = None) -> None:
        self.kind = kind
        self.sizes = sizes  # bytes of each read
        self.useful = useful
        self.error: Exception | None = None
        self._left = len(sizes) if requests is None else requests  # of these, not yet ended
        self._done = threading.Event()
        if not self._left:
            self._done.set()

    @property
    def ready(self) -> bool:
        return self._done.is_set()

    def wait(self) -> None:
        self._done.wait()
        if self.error is not None:
            raise self.error

    def end(self) -> None:
        """Wait, whatever comes of it: the memory is not written to any more."""
        self._done.wait()


class Handed(Ticket):
    """A batch of reads that the asking thread handed to the kernel itself."""

    __slots__ = ("batch", "path", "pieces", "store")

    def __init__(self, kind: str, useful: int, store: FlashStore, path: Path, pieces: Pieces, batch: Batch) -> None:
        super().__init__(kind, (), useful, 1)
        self.store, self.path, self.pieces, self.batch = store, path, pieces, batch

    @property
    def ready(self) -> bool:
        return self._done.is_set() or self.store.end(self, wait=False)

    def wait(self) -> None:
        if not self._done.is_set():
            self.store.end(self)
        super().wait()

    def end(self) -> None:
        if not self._done.is_set():
            self.store.end(self)
        super().end()
