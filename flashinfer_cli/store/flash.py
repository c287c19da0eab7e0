"""The flash store: many reads under way at once, first come first served unless somebody waits, counted.

Plain `os.preadv` in threads (the call releases the interpreter lock) comes close to the raw drive once enough
requests of a quarter to one megabyte are in flight; page faults through mmap do not.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..checkpoint.base import Extent
from ..config import KiB
from ..errors import StorageError
from ..recorder import Recorder
from .reader import Reader
from .scatter import GAP_BYTES, LayOut, Pieces, lay_out
from .spans import ALIGN, Span, span_of
from .tickets import Handed, Ticket

__all__ = ["ALIGN", "REQUEST_BYTES", "FlashStore", "Span", "Ticket", "span_of"]

REQUEST_BYTES = 512 * KiB
RECORD_BATCHES = 2  # threads that reads of records are dealt to: the kernel has many of each under way
RECORD_BATCH_LEAST = 8  # reads that are worth a thread of their own


# Ticket, file, offset and where to; or a batch of reads of records and None.
_Request = tuple[Ticket, Path, int, memoryview] | tuple[Ticket, Path, Pieces, None]


class FlashStore:
    """Batched asynchronous reads of a checkpoint's files into buffers of the caller.

    `direct` is "auto" or "never". Reads are split into requests of about `request_bytes` and served by `threads`
    threads, first come first served. Thread-safe. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        recorder: Recorder,
        *,
        threads: int = 8,
        direct: str = "auto",
        request_bytes: int = REQUEST_BYTES,
        lay_out: LayOut = lay_out,
    ) -> None:
        self.recorder, self._lay_out = recorder, lay_out
        self.request_bytes = request_bytes
        self.threads = threads
        self.reader = Reader(direct)
        self._waste_bytes = np.empty(0, np.uint8)
        self._queue: deque[_Request] = deque()
        self._state = threading.Condition()
        self._closed = False
        self._in_flight = 0
        self._busy_since = 0.0
        self._workers = [threading.Thread(target=self._work, name=f"flash-{i}", daemon=True) for i in range(threads)]
        for worker in self._workers:
            worker.start()

    @property
    def mode(self) -> str:
        """What really happens: "direct", or "buffered" and why."""
        return self.reader.files.mode

    # ---- asking
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
        self._enqueue([(ticket, *cut) for cut in cuts], urgent)
        return ticket

    def read_now(self, extents: Sequence[Extent], kind: str) -> list[np.ndarray]:
        """Read extents and wait: uint8 arrays, in order. For small things and for start-up."""
        from ..device import allocate

        span = span_of(extents)
        buffer = allocate(span.nbytes)
        self.read(span, buffer, 0, kind, urgent=True).wait()
        return [buffer[s : s + e.nbytes] for s, e in zip(span.starts, extents, strict=True)]

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
        going to a place of its own. The calling thread hands them to the kernel (`aio`): to give them to another costs
        as much, and then both want the interpreter. Where it cannot, they are dealt to a few threads in batches, and
        what is `urgent` goes before all that is queued. `base` and `width` are multiples of `scatter.SECTOR`.
        """
        gap = max(0, GAP_BYTES // width)
        pieces = self._lay_out(ids, addresses, width, base, gap, memory, self.waste(gap * width))
        count = len(pieces)
        batch = self.reader.begin(path, pieces) if count else None
        if batch is not None:
            with self._state:
                self._begin()
            return Handed(kind, len(ids) * width, self, path, pieces, batch)
        batches = max(1, min(self.threads, RECORD_BATCHES, count // RECORD_BATCH_LEAST)) if count else 0
        ticket = Ticket(kind, tuple(pieces.sizes.tolist()), len(ids) * width, batches)
        self._enqueue([(ticket, path, pieces.part(i, batches), None) for i in range(batches)], urgent)
        return ticket

    def waste(self, nbytes: int) -> np.ndarray:
        """A place for bytes between records that nobody wants."""
        if len(self._waste_bytes) < nbytes:
            from ..device import allocate

            self._waste_bytes = allocate(nbytes)
        return self._waste_bytes

    # ---- the queue
    def _enqueue(self, requests: Sequence[_Request], urgent: bool) -> None:
        with self._state:
            assert not self._closed, "read after close"
            if urgent:
                self._queue.extendleft(reversed(requests))
            else:
                self._queue.extend(requests)
            self._state.notify(len(requests))

    def promote(self, ticket: Ticket) -> bool:
        """What `read` began ahead of need is waited for now: what of it nobody has begun goes before all else.

        Returns whether any of it had begun.
        """
        with self._state:
            mine = self._take_back(ticket)
            self._queue.extendleft(reversed(mine))
        return len(mine) < len(ticket.sizes)

    def cancel(self, ticket: Ticket) -> bool:
        """Take back what of a `read` nobody has begun; returns whether any of it had.

        The ticket is done once what is under way has ended, and its `sizes` are those of what was read. The buffer
        must stay until then.
        """
        with self._state:
            mine = self._take_back(ticket)
            if not mine:
                return True
            ticket.sizes = ticket.sizes[: len(ticket.sizes) - len(mine)]  # begun in their order
            ticket.useful = 0
            ticket._left -= len(mine)
            over = ticket._left == 0
        if over:
            if ticket.error is None and ticket.sizes:
                self.recorder.io(ticket.kind, ticket.sizes, 0)
            ticket._done.set()
        return bool(ticket.sizes)

    def _take_back(self, ticket: Ticket) -> list[_Request]:
        """The ticket's requests that are still in the queue, out of it. Called with the lock held."""
        mine = [request for request in self._queue if request[0] is ticket]
        if mine:
            rest = [request for request in self._queue if request[0] is not ticket]
            self._queue.clear()
            self._queue.extend(rest)
        return mine

    # ---- the threads
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
                    self._begin()
                elif self._closed and ended is None:
                    self.reader.end_thread()
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

    def _begin(self) -> None:
        """Book a request as begun. Called with the lock held."""
        if self._in_flight == 0:
            self._busy_since = time.perf_counter()
        self._in_flight += 1

    def end(self, ticket: Handed, wait: bool = True) -> bool:
        """Whether the reads of a ticket have ended, and then book them."""
        error: Exception | None = None
        try:
            if not self.reader.end(ticket.path, ticket.pieces, ticket.batch, wait):
                return False
        except Exception as caught:
            error = caught
        with self._state:
            if ticket._done.is_set():
                return True
            self._finish(ticket, error)
        if error is None:
            self.recorder.io(ticket.kind, ticket.pieces.sizes.tolist(), ticket.useful)
        ticket._done.set()
        return True

    def _finish(self, ticket: Ticket, error: Exception | None) -> Ticket | None:
        """Book a request as ended; returns its ticket when that was the last of it. Called with the lock held."""
        self._in_flight -= 1
        if self._in_flight == 0:
            self.recorder.busy(time.perf_counter() - self._busy_since)
        ticket.error = ticket.error or error
        ticket._left -= 1
        return ticket if ticket._left == 0 else None

    def was_busy(self, seconds: float) -> None:
        """Reads that compiled code made were under way for so long; while others are, that time counts as theirs."""
        with self._state:
            if not self._in_flight:
                self.recorder.busy(seconds)

    def tick(self) -> None:
        """Credit reading time up to now to the phase that is current: called where one phase gives way to another."""
        with self._state:
            if self._in_flight:
                now = time.perf_counter()
                self.recorder.busy(now - self._busy_since)
                self._busy_since = now

    def _read_one(self, request: _Request) -> None:
        _, path, offset, target = request
        if isinstance(offset, Pieces):
            self.reader.scatter(path, offset)
        else:
            assert target is not None
            self.reader.read(path, offset, target)

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
        self.reader.close()

    def __enter__(self) -> FlashStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
