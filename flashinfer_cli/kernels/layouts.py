"""The reads that bring a token's neurons, laid out by compiled code; `store.scatter` is the plain twin."""

from __future__ import annotations

from typing import Any

from .memory import load_int, store_int
from .products import compiled


@compiled
def lay_out(
    n: Any,
    ids: Any,
    addresses: Any,
    width: Any,
    base: Any,
    gap: Any,
    most: Any,
    waste: Any,
    offsets: Any,
    sizes: Any,
    first: Any,
    views: Any,
    counts: Any,
    requests: Any,
) -> None:
    """`store.scatter.lay_out`: reads and the pieces of memory that they fill, whose numbers go to counts[0], [1]; and
    the reads as `store.aio` hands them to Linux, 8 words each, and behind n of these the address of each."""
    reads, pieces, since, before, begun = 0, 0, 0, 0, 0
    for i in range(n):
        id = load_int(ids + 8 * i)
        skipped = id - before - 1 if i > 0 else 0
        if i == 0 or skipped > gap:
            since = 0
        if since % most == 0:
            begun = id
            request = requests + 64 * reads
            store_int(request, reads)
            store_int(request + 8, 0)
            store_int(request + 24, views + 16 * pieces)
            store_int(request + 40, base + id * width)
            store_int(request + 48, 0)
            store_int(request + 56, 0)
            store_int(requests + 64 * n + 8 * reads, request)
            store_int(offsets + 8 * reads, base + id * width)
            store_int(first + 8 * reads, pieces)
            reads += 1
        elif skipped > 0:
            store_int(views + 16 * pieces, waste)
            store_int(views + 16 * pieces + 8, skipped * width)
            pieces += 1
        store_int(views + 16 * pieces, load_int(addresses + 8 * i))
        store_int(views + 16 * pieces + 8, width)
        pieces += 1
        store_int(sizes + 8 * (reads - 1), (id - begun + 1) * width)
        before = id
        since += 1
    store_int(first + 8 * reads, pieces)
    for i in range(reads):
        store_int(requests + 64 * i + 32, load_int(first + 8 * i + 8) - load_int(first + 8 * i))
    store_int(counts, reads)
    store_int(counts + 8, pieces)
