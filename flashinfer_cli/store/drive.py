"""What the drive can give, measured in place: the rate to hold a run's reads against."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..checkpoint.base import Extent
from ..device import allocate
from ..recorder import Recorder
from .flash import REQUEST_BYTES, FlashStore, Ticket
from .spans import ALIGN, span_of

BATCHES = 3  # of `depth` requests each, so that some wait whenever one ends


@dataclass(frozen=True)
class DriveRate:
    """Bytes a second of reads of `request_bytes` with `depth` in flight."""

    request_bytes: int
    depth: int
    bytes_per_second: float
    mode: str


MEASURED = BATCHES * 8 * (REQUEST_BYTES + 2 * ALIGN)  # bytes that `measure` takes


def measure(path: Path, *, request_bytes: int = REQUEST_BYTES, depth: int = 8, seconds: float = 1.0) -> DriveRate:
    """Read random aligned pieces of a file for about `seconds`, always `depth` in flight, past the page cache.

    A request is of whole blocks of ALIGN bytes, as few as hold `request_bytes`.
    """
    request_bytes = -(-request_bytes // ALIGN) * ALIGN
    size = path.stat().st_size
    blocks = max(1, (size - request_bytes) // ALIGN)
    order = random.Random(0)
    room = depth * (request_bytes + 2 * ALIGN)
    buffer = allocate(BATCHES * room)
    under_way: deque[tuple[int, Ticket]] = deque()
    with FlashStore(Recorder(), threads=depth, request_bytes=request_bytes) as store:

        def start(slot: int) -> int:
            """Ask for `depth` pieces at once; returns their bytes."""
            places = (order.randrange(blocks) * ALIGN for _ in range(depth))
            span = span_of([Extent(path, place, min(request_bytes, size)) for place in places])
            under_way.append((slot, store.read(span, buffer, slot * room, "measure")))
            return span.nbytes

        for slot in range(BATCHES):  # fills the pipe, opens the file and touches the buffer: not timed
            start(slot)
        done, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            slot, ticket = under_way.popleft()
            ticket.wait()
            done += start(slot)
        elapsed = time.perf_counter() - begin
        for _, ticket in under_way:
            ticket.wait()
        return DriveRate(request_bytes, depth, done / elapsed, store.mode)


def measure_records(path: Path, width: int, demands: Sequence[np.ndarray]) -> float:
    """Seconds that reading a demand takes, on average, each when the one before has come.

    A demand is the ids, ascending, of records of `width` bytes (a multiple of 512), read as runs of a model read
    neurons; the records stand side by side at some place in the file.
    """
    count = max((int(ids[-1]) + 1 for ids in demands if len(ids)), default=0)
    if not count:
        return 0.0
    blocks, order = max(0, (path.stat().st_size - count * width) // ALIGN), random.Random(0)
    buffer = allocate(count * width)
    buffer[::ALIGN] = 0  # touched: not timed
    with FlashStore(Recorder()) as store:
        seconds = 0.0
        for number, ids in enumerate((demands[0][:1], *demands)):  # the first opens the file
            begin = time.perf_counter()
            at = buffer.ctypes.data + width * np.arange(len(ids))
            base = order.randint(0, blocks) * ALIGN
            store.read_records(path, base, width, ids, at, (buffer,), "measure").wait()
            seconds += (time.perf_counter() - begin) * (number > 0)
    return seconds / len(demands)
