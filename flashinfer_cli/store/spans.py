"""Where extents of files land in aligned memory, and the reads that bring them there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.base import Extent

ALIGN = 4096  # of file offsets, lengths and memory in direct reads; what every drive of today accepts


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
