"""The flash store: many reads under way at once, past the page cache where the drive allows it, counted.

Plain `os.preadv` in threads (the call releases the interpreter lock) comes close to the raw drive once enough
requests of a quarter to one megabyte are in flight; page faults through mmap do not. Direct reads (O_DIRECT, or
F_NOCACHE on macOS) keep streamed weights from filling memory as page cache, which a budget would have to count. An
open with O_DIRECT can succeed and its first read fail, so a read is tried before the mode is believed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..checkpoint.base import Extent
from ..config import KiB
from ..errors import CorruptCheckpointError, StorageError
from ..report import Recorder
from .aio import IOVEC, Aio

ALIGN = 4096  # of file offsets, lengths and memory in direct reads; what every drive of today accepts
REQUEST_BYTES = 512 * KiB
SECTOR = 512  # of records' places and widths
GAP_BYTES = 8 * KiB  # between two wanted records that are still read as one
MOST_VIEWS = 256  # records of one read, each with a gap before it; systems allow 1,024 pieces of memory
RECORD_BATCHES = 2  # threads that reads of records are dealt to: the kernel has many of each under way
RECORD_BATCH_LEAST = 8  # reads that are worth a thread of their own


@dataclass(frozen=True)
class Span:
    """Where extents land in an aligned buffer: `starts[i]` is the first byte of extent i, `reads` the aligned
    requests."""

    nbytes: int
    starts: tuple[int, ...]
    reads: tuple[tuple[Path, int, int, int, int], ...]  # path, file offset, length, place in the buffer, useful bytes


def span_of(extents: Sequence[Extent]) -> Span:
    """Lay extents out for direct reads; neighbours in a file become one read.

    Each read covers its extents rounded out to ALIGN, so a buffer of `nbytes` holds all of them wherever they begin.
    """
    starts: list[int] = []
    reads: list[tuple[Path, int, int, int, int]] = []
    place = 0
    run: list[Extent] = []

    def close() -> None:
        nonlocal place
        if not run:
            return
        first, end = run[0].offset, run[-1].offset + run[-1].nbytes
        low, high = first // ALIGN * ALIGN, -(-end // ALIGN) * ALIGN
        starts.extend(place + e.offset - low for e in run)
        reads.append((run[0].path, low, high - low, place, end - first))
        place += high - low
        run.clear()

    for extent in extents:
        if run and (run[-1].path, run[-1].offset + run[-1].nbytes) != (extent.path, extent.offset):
            close()
        run.append(extent)
    close()
    return Span(place, tuple(starts), tuple(reads))


class Ticket:
    """A batch of reads under way. `wait` returns when all have ended and raises what went wrong."""

    __slots__ = ("_done", "_left", "error", "kind", "sizes", "useful")

    def __init__(self, kind: str, sizes: tuple[int, ...], useful: int) -> None:
        self.kind = kind
        self.sizes = sizes  # bytes of each request
        self.useful = useful
        self.error: Exception | None = None
        self._left = len(sizes)
        self._done = threading.Event()
        if not sizes:
            self._done.set()

    @property
    def ready(self) -> bool:
        return self._done.is_set()

    def wait(self) -> None:
        self._done.wait()
        if self.error is not None:
            raise self.error


@dataclass(frozen=True)
class Pieces:
    """Reads of records: read i, `sizes[i]` bytes from `offsets[i]` on, goes to memory views[first[i] : first[i + 1]].

    `memory` keeps alive what the views point into.
    """

    offsets: np.ndarray
    sizes: np.ndarray
    first: np.ndarray  # int64 [reads + 1]
    views: np.ndarray  # IOVEC
    memory: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.offsets)

    def part(self, index: int, parts: int) -> Pieces:
        """The index-th of so many equal runs of reads."""
        low, high = (len(self) * i // parts for i in (index, index + 1))
        first = self.first[low : high + 1]
        views = self.views[first[0] : first[-1]]
        return Pieces(self.offsets[low:high], self.sizes[low:high], first - first[0], views, self.memory)


def lay_out(
    ids: np.ndarray, addresses: np.ndarray, width: int, base: int, gap: int, memory: tuple[np.ndarray, ...],
    waste: np.ndarray,
) -> Pieces:  # fmt: skip
    """Records `ids`, ascending, to `addresses`, in as few reads as gaps of up to `gap` records allow; what is between
    them goes to `waste`. Work by arrays: nothing is done record by record."""
    count = len(ids)
    ids = np.asarray(ids, np.int64)
    skipped = np.diff(ids, prepend=ids[:1]) - 1  # records between one and the one before it
    starts = skipped > gap
    starts[:1] = True
    place = np.arange(count)
    since = place - np.maximum.accumulate(np.where(starts, place, 0))  # places since the run began
    starts |= since % MOST_VIEWS == 0  # the system takes no more pieces in one call, gaps between them included
    through = (skipped > 0) & ~starts
    slot = np.cumsum(through) + place  # of a record's view, behind that of the gap before it
    views = np.zeros(count + int(through.sum()), IOVEC)
    views["base"], views["len"] = waste.ctypes.data, width
    views["base"][slot] = addresses
    views["len"][slot[through] - 1] = skipped[through] * width
    begin = np.flatnonzero(starts)
    first = np.append((slot - through)[begin], len(views))
    last = np.append(begin[1:], count)[: len(begin)] - 1
    sizes = (ids[last] - ids[begin] + 1) * width
    return Pieces(base + ids[begin] * width, sizes, first, views, (*memory, waste))


def _one_by_one(fd: int, pieces: Pieces) -> np.ndarray:
    """The plain twin of `Aio.read`."""
    views = [(ctypes.c_char * size).from_address(base) for base, size in pieces.views.tolist()]
    got = np.zeros(len(pieces), np.int64)
    for index, offset in enumerate(pieces.offsets.tolist()):
        got[index] = os.preadv(fd, views[pieces.first[index] : pieces.first[index + 1]], offset)
    return got


# Ticket, file, offset and where to; or a batch of reads of records and None.
_Request = tuple[Ticket, Path, int, memoryview] | tuple[Ticket, Path, Pieces, None]


class FlashStore:
    """Batched asynchronous reads of a checkpoint's files into buffers of the caller.

    `direct` is "auto" or "never". Reads are split into requests of about `request_bytes` and served by `threads`
    threads, first come first served. Thread-safe. Close it, or use it as a context manager.
    """

    def __init__(
        self, recorder: Recorder, *, threads: int = 8, direct: str = "auto", request_bytes: int = REQUEST_BYTES
    ) -> None:
        self.recorder = recorder
        self.request_bytes = request_bytes
        self.threads = threads
        self.direct = direct
        self.batched = True  # records by Aio, where there is any
        self._own = threading.local()
        self.fallback: str | None = None  # why reads are buffered, when direct ones were asked for
        self._files: dict[Path, tuple[int, bool]] = {}
        self._buffered: dict[Path, int] = {}
        self._sectors = True  # the drive takes direct reads of 512-byte sectors, as far as is known
        self._waste_bytes = np.empty(0, np.uint8)
        self._queue: deque[_Request] = deque()
        self._state = threading.Condition()
        self._closed = False
        self._in_flight = 0
        self._busy_since = 0.0
        self._workers = [threading.Thread(target=self._work, name=f"flash-{i}", daemon=True) for i in range(threads)]
        for worker in self._workers:
            worker.start()

    # ---- opening
    def _open(self, path: Path) -> tuple[int, bool]:
        """(file descriptor, whether reads of it are direct)."""
        with self._state:
            if path in self._files:
                return self._files[path]
            try:
                opened = self._open_direct(path) if self.direct != "never" else None
                if opened is None:
                    opened = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)), False
            except OSError as error:
                raise StorageError(f"Cannot open {path}: {error.strerror}.") from error
            self._files[path] = opened
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

    @property
    def mode(self) -> str:
        """What really happens: "direct", or "buffered" and why."""
        if any(not direct for _, direct in self._files.values()) or (self.direct == "never" and not self._files):
            return f"buffered ({self.fallback or 'as asked'})"
        return "direct"

    # ---- reading
    def read(self, span: Span, buffer: np.ndarray, place: int, kind: str, *, urgent: bool = False) -> Ticket:
        """Start reading a span into buffer[place:]; `place` and the buffer's address are multiples of ALIGN.

        `urgent` reads, which somebody waits for now, go before those that are made ahead of need.
        """
        view = buffer.data
        cuts = []
        for path, offset, length, at, _ in span.reads:
            # Requests of equal size, so that none is a sliver of the alignment.
            step = -(-length // (max(1, round(length / self.request_bytes)) * ALIGN)) * ALIGN
            for cut in range(0, length, step):
                start = place + at + cut
                cuts.append((path, offset + cut, view[start : start + min(step, length - cut)]))
        ticket = Ticket(kind, tuple(len(target) for _, _, target in cuts), sum(useful for *_, useful in span.reads))
        with self._state:
            assert not self._closed, "read after close"
            if urgent:
                self._queue.extendleft((ticket, *cut) for cut in reversed(cuts))
            else:
                self._queue.extend((ticket, *cut) for cut in cuts)
            self._state.notify(len(cuts))
        return ticket

    def promote(self, ticket: Ticket) -> bool:
        """What `read` began ahead of need is waited for now: what of it nobody has begun goes before all else.

        Returns whether any of it had begun.
        """
        with self._state:
            mine = [request for request in self._queue if request[0] is ticket]
            if mine and len(mine) < len(self._queue):
                rest = [request for request in self._queue if request[0] is not ticket]
                self._queue.clear()
                self._queue.extend((*mine, *rest))
        return len(mine) < len(ticket.sizes)

    def cancel(self, ticket: Ticket) -> bool:
        """Take back what of a `read` nobody has begun; returns whether any of it had.

        The ticket is done once what is under way has ended, and its `sizes` are those of what was read. The buffer
        must stay until then.
        """
        with self._state:
            mine = [request for request in self._queue if request[0] is ticket]
            if not mine:
                return True
            rest = [request for request in self._queue if request[0] is not ticket]
            self._queue.clear()
            self._queue.extend(rest)
            ticket.sizes = ticket.sizes[: len(ticket.sizes) - len(mine)]  # begun in their order
            ticket.useful = 0
            ticket._left -= len(mine)
            over = ticket._left == 0
        if over:
            if ticket.error is None and ticket.sizes:
                self.recorder.io(ticket.kind, ticket.sizes, 0)
            ticket._done.set()
        return bool(ticket.sizes)

    def read_now(self, extents: Sequence[Extent], kind: str) -> list[np.ndarray]:
        """Read extents and wait: uint8 arrays, in order. For small things and for start-up."""
        from ..device import allocate

        span = span_of(extents)
        buffer = allocate(span.nbytes)
        self.read(span, buffer, 0, kind, urgent=True).wait()
        return [buffer[s : s + e.nbytes] for s, e in zip(span.starts, extents, strict=True)]

    def _work(self) -> None:
        request: _Request | None = None
        error: Exception | None = None
        while True:
            ended: Ticket | None = None
            with self._state:  # taken once a request: to end the one before and fetch the next
                if request is not None:
                    ended = self._finish(request[0], error)
                    request = None  # an idle thread must not keep the buffer alive
                while ended is None and not self._queue and not self._closed:
                    self._state.wait()
                request = self._queue.popleft() if self._queue else None
                if request is not None:
                    if self._in_flight == 0:
                        self._busy_since = time.perf_counter()
                    self._in_flight += 1
                elif self._closed and ended is None:
                    if getattr(self._own, "aio", None) is not None:
                        self._own.aio.close()
                    return
            if ended is not None:
                if ended.error is None:
                    self.recorder.io(ended.kind, ended.sizes, ended.useful)
                ended._done.set()
            if request is not None:
                error = None
                if request[0].error is None:
                    try:
                        self._read_one(request)
                    except Exception as caught:
                        error = caught

    def _finish(self, ticket: Ticket, error: Exception | None) -> Ticket | None:
        """Book a request as ended; returns its ticket when that was the last of it. Called with the lock held."""
        self._in_flight -= 1
        if self._in_flight == 0:
            self.recorder.busy(time.perf_counter() - self._busy_since)
        ticket.error = ticket.error or error
        ticket._left -= 1
        return ticket if ticket._left == 0 else None

    def _read_one(self, request: _Request) -> None:
        _, path, offset, target = request
        if isinstance(offset, Pieces):
            self._read_scattered(path, offset)
            return
        assert target is not None
        fd, direct = self._files.get(path) or self._open(path)
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

    def tick(self) -> None:
        """Credit reading time up to now to the phase that is current: called where one phase gives way to another."""
        with self._state:
            if self._in_flight:
                now = time.perf_counter()
                self.recorder.busy(now - self._busy_since)
                self._busy_since = now

    # ---- records
    def read_records(
        self,
        path: Path,
        base: int,
        width: int,
        ids: np.ndarray,
        addresses: np.ndarray,
        memory: tuple[np.ndarray, ...],
        kind: str,
        *,
        urgent: bool = True,
    ) -> Ticket:
        """Read records `ids`, ascending, `width` bytes each, from `base` on in a file to where `addresses` say.

        ids and addresses int64 [n]; `memory` is what the addresses stand in, which must live until then. Records whose
        neighbours are wanted too come in one read, scattered to their places; so do those a small gap apart, the gap
        going to a place of its own. Reads are dealt to a few threads in batches, each of which hands its own to the
        kernel at once (`aio`), or goes through them one by one. `base` and `width` are multiples of SECTOR. What is
        `urgent` goes before all that is queued.
        """
        gap = max(0, GAP_BYTES // width)
        pieces = lay_out(ids, addresses, width, base, gap, memory, self._waste(gap * width))
        count = len(pieces)
        ticket = Ticket(kind, tuple(pieces.sizes.tolist()), len(ids) * width)
        batches = max(1, min(self.threads, RECORD_BATCHES, count // RECORD_BATCH_LEAST)) if count else 0
        ticket._left = batches
        with self._state:
            assert not self._closed, "read after close"
            requests: list[_Request] = [(ticket, path, pieces.part(i, batches), None) for i in range(batches)]
            if urgent:
                self._queue.extendleft(reversed(requests))
            else:
                self._queue.extend(requests)
            self._state.notify(batches)
        return ticket

    def _waste(self, nbytes: int) -> np.ndarray:
        """A place for bytes between records that nobody wants."""
        if len(self._waste_bytes) < nbytes:
            from ..device import allocate

            self._waste_bytes = allocate(nbytes)
        return self._waste_bytes

    def _read_scattered(self, path: Path, pieces: Pieces) -> None:
        fd, direct = self._files.get(path) or self._open(path)
        if direct and not self._sectors:
            fd, direct = self._open_buffered(path), False
        aio = self._aio() if direct and len(pieces) > 1 else None
        try:
            got = _one_by_one(fd, pieces) if aio is None else aio.read(fd, pieces.offsets, pieces.first, pieces.views)
            if (got < 0).any():
                raise OSError(-int(got.min()), os.strerror(-int(got.min())))
        except OSError as error:
            if direct and error.errno == errno.EINVAL:  # the drive's blocks are larger than our sectors
                self._sectors = False
                self.fallback = "the drive takes no direct reads of 512 bytes"
                return self._read_scattered(path, pieces)
            raise StorageError(f"Reading {path} failed: {error.strerror}.") from error
        short = np.flatnonzero(got != pieces.sizes)
        if len(short):
            end = int(pieces.offsets[short[0]] + got[short[0]])
            raise CorruptCheckpointError(f"{path} ended at byte {end}: it has shrunk since it was opened.")

    def _aio(self) -> Aio | None:
        """This thread's own; None where there is none."""
        if not hasattr(self._own, "aio"):
            self._own.aio = Aio.open() if self.batched else None
        found: Aio | None = self._own.aio
        return found

    def _open_buffered(self, path: Path) -> int:
        """A second descriptor, for records that the drive will not give directly; the kernel is told not to read on."""
        with self._state:
            if path not in self._buffered:
                fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
                self._buffered[path] = fd
            return self._buffered[path]

    # ---- ending
    def close(self) -> None:
        """Let reads that are under way end, and close the files."""
        with self._state:
            self._closed = True
            left = {request[0] for request in self._queue}
            self._queue.clear()
            self._state.notify_all()
        for worker in self._workers:
            worker.join()
        for ticket in left:  # nobody is to wait for what will not come
            ticket.error = ticket.error or StorageError("The file was closed before it was read.")
            ticket._done.set()
        for fd in (*(fd for fd, _ in self._files.values()), *self._buffered.values()):
            os.close(fd)
        self._files.clear()
        self._buffered.clear()

    def __enter__(self) -> FlashStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
