"""Records of one width, read from one place in a file and scattered to their own in memory: ids become few reads by
array arithmetic."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from ..config import KiB
from .aio import IOVEC

if TYPE_CHECKING:
    from ..kernels import Kernels
    from ..kernels.native import NumbaKernels

SECTOR = 512  # of records' places and widths
GAP_BYTES = 8 * KiB  # between two wanted records that are still read as one
MOST_VIEWS = 256  # records of one read, each with a gap before it; systems allow 1,024 pieces of memory


class LayOut(Protocol):
    """`lay_out`, and what does the same."""

    def __call__(
        self, ids: np.ndarray, addresses: np.ndarray, width: int, base: int, gap: int, memory: tuple[np.ndarray, ...],
        waste: np.ndarray, /,
    ) -> Pieces: ...  # fmt: skip


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
    requests: tuple[np.ndarray, np.ndarray] | None = None  # for `Aio.begin`, and their addresses; where they are known

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


def layout_by(kernels: Kernels) -> LayOut:
    """`lay_out`, or the same with one call of code where kernels are compiled."""
    if kernels.name != "numba":
        return lay_out
    numba = cast("NumbaKernels", kernels)

    def compiled(
        ids: np.ndarray, addresses: np.ndarray, width: int, base: int, gap: int, memory: tuple[np.ndarray, ...],
        waste: np.ndarray,
    ) -> Pieces:  # fmt: skip
        ids, addresses = np.ascontiguousarray(ids, np.int64), np.ascontiguousarray(addresses, np.int64)
        found = numba.lay_out(ids, addresses, width, base, gap, MOST_VIEWS, waste.ctypes.data)
        offsets, sizes, first, views, requests, pointers = found
        views = views.view(IOVEC).reshape(-1)
        return Pieces(offsets, sizes, first, views, (*memory, waste), (requests, pointers))

    return compiled


def read_one_by_one(fd: int, offsets: np.ndarray, first: np.ndarray, views: np.ndarray) -> np.ndarray:
    """The plain twin of `Aio.read`."""
    targets = [(ctypes.c_char * size).from_address(base) for base, size in views.tolist()]
    got = np.zeros(len(offsets), np.int64)
    for index, offset in enumerate(offsets.tolist()):
        got[index] = os.preadv(fd, targets[first[index] : first[index + 1]], offset)
    return got
