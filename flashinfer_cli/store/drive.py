"""What the drive can give, measured in place: the rate to hold a run's reads against."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.base import Extent
from ..device import allocate
from ..report import Recorder
from .flash import ALIGN, REQUEST_BYTES, FlashStore, Span, span_of


@dataclass(frozen=True)
class DriveRate:
    """Bytes a second of reads of `request_bytes` with `depth` in flight."""

    request_bytes: int
    depth: int
    bytes_per_second: float
    mode: str


def measure(path: Path, *, request_bytes: int = REQUEST_BYTES, depth: int = 8, seconds: float = 0.5) -> DriveRate:
    """Read random aligned pieces of a file for about `seconds`, past the page cache where that works."""
    blocks = max(1, (path.stat().st_size - request_bytes) // ALIGN)
    order = random.Random(0)
    done = 0
    with FlashStore(Recorder(), threads=depth) as store:
        buffer = allocate(2 * depth * (request_bytes + 2 * ALIGN))
        room = request_bytes + 2 * ALIGN
        start = time.perf_counter()
        while True:
            tickets = []
            for slot in range(2 * depth):
                extent = Extent(path, order.randrange(blocks) * ALIGN, min(request_bytes, path.stat().st_size))
                span: Span = span_of([extent])
                tickets.append(store.read(span, buffer, slot * room, "measure"))
                done += span.nbytes
            for ticket in tickets:
                ticket.wait()
            elapsed = time.perf_counter() - start
            if elapsed >= seconds:
                return DriveRate(request_bytes, depth, done / elapsed, store.mode)
