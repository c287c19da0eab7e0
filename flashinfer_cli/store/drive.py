"""What the drive can give, measured in place: the rate to hold a run's reads against."""

from __future__ import annotations

import random
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

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


def measure(path: Path, *, request_bytes: int = REQUEST_BYTES, depth: int = 8, seconds: float = 1.0) -> DriveRate:
    """Read random aligned pieces of a file for about `seconds`, always `depth` in flight, past the page cache."""
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
