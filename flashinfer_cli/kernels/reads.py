"""Reads that compiled code hands to Linux and waits for, with the calls of `store.aio`: no Python between a prediction
and its reads, nor between these and what is computed on them.

State stands in words (`jobs`): the flights F_*, which all batches share, and a batch B_* each. One thread at a time.
"""

from __future__ import annotations

from typing import Any

from numba.core import types

from .jobs import (
    B_BEGUN,
    B_FAILED,
    B_FIRST,
    B_LEFT,
    B_OFFSETS,
    B_READS,
    B_RECORDS,
    B_REQUESTS,
    B_SIZES,
    B_VIEWS,
    EVENT_BYTES,
    F_BATCHES,
    F_BUSY,
    F_BY_BITS,
    F_BYTES,
    F_CLOCK,
    F_CONTEXT,
    F_DEPTH,
    F_EVENTS,
    F_GETEVENTS,
    F_MOST,
    F_REQUESTS,
    F_SINCE,
    F_SUBMIT,
    F_UNDER_WAY,
    F_USEFUL,
    F_WAITED,
    F_WASTE,
    LATER,
    PREADV,
    S_BASE,
    S_FD,
    S_GAP,
    S_WIDTH,
)
from .layouts import lay_out
from .memory import atomic_swap, load_int, store_int
from .products import compiled

syscall: Any = types.ExternalFunction("syscall", types.int64(*[types.int64] * 6))
clock_gettime: Any = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))
MONOTONIC = 1  # Linux' number of the clock that time.perf_counter reads
AT_ONCE = 4  # reads handed over with a call: the drive begins with them while the others are prepared
FRUITLESS = 1_000_000  # calls in a row that may bring nothing: interrupted by signals, or refused for good


@compiled
def _now(flights: Any) -> Any:
    clock_gettime(MONOTONIC, flights + F_CLOCK)
    return load_int(flights + F_CLOCK) * 1_000_000_000 + load_int(flights + F_CLOCK + 8)


@compiled
def _more(address: Any, amount: Any) -> None:
    store_int(address, load_int(address) + amount)


@compiled
def _submit(flights: Any, batch: Any) -> Any:
    """Hand over what of a batch is not, while there is room; False where nothing is under way and none can be."""
    reads = load_int(batch + B_READS)
    pointers = load_int(batch + B_REQUESTS) + 64 * load_int(batch + B_RECORDS)
    while load_int(batch + B_BEGUN) < reads:
        begun, under_way = load_int(batch + B_BEGUN), load_int(flights + F_UNDER_WAY)
        room = min(reads - begun, load_int(flights + F_DEPTH) - under_way, AT_ONCE)
        if room <= 0:
            return True
        if under_way == 0:
            store_int(flights + F_SINCE, _now(flights))
        context = load_int(flights + F_CONTEXT)
        done = syscall(load_int(flights + F_SUBMIT), context, room, pointers + 8 * begun, 0, 0)
        if done <= 0:
            return under_way > 0
        _more(batch + B_BEGUN, done)
        _more(flights + F_UNDER_WAY, done)
    return True


@compiled
def _collect(flights: Any, least: Any) -> Any:
    """Wait for so many reads of any batch, and note all that have ended; returns their number."""
    events = load_int(flights + F_EVENTS)
    arrived = syscall(
        load_int(flights + F_GETEVENTS), load_int(flights + F_CONTEXT), least, load_int(flights + F_DEPTH), events, 0
    )
    if arrived <= 0:
        return 0
    for i in range(arrived):
        event = events + EVENT_BYTES * i
        batch = load_int(event)
        read = (load_int(event + 8) - load_int(batch + B_REQUESTS)) // 64
        if load_int(event + 16) != load_int(load_int(batch + B_SIZES) + 8 * read):
            _more(batch + B_FAILED, 1)
        _more(batch + B_LEFT, -1)
    _more(flights + F_UNDER_WAY, -arrived)
    if load_int(flights + F_UNDER_WAY) == 0:
        _more(flights + F_BUSY, _now(flights) - load_int(flights + F_SINCE))
    return arrived


@compiled
def wait(flights: Any, batch: Any) -> Any:
    """Until all reads of a batch have ended; whether all have brought what they were to."""
    if load_int(batch + B_LEFT) > 0:
        began, fruitless = _now(flights), 0
        while load_int(batch + B_LEFT) > 0 and fruitless < FRUITLESS:
            later = load_int(batch + B_READS) - load_int(batch + B_BEGUN)
            if not _submit(flights, batch):
                _more(batch + B_FAILED, later)
                _more(batch + B_LEFT, -later)
                store_int(batch + B_BEGUN, load_int(batch + B_READS))
                continue
            later = load_int(batch + B_READS) - load_int(batch + B_BEGUN)
            least = 1 if later else min(load_int(batch + B_LEFT), load_int(flights + F_DEPTH))
            fruitless = 0 if _collect(flights, least) else fruitless + 1
        _more(flights + F_WAITED, _now(flights) - began)
    return load_int(batch + B_FAILED) == 0 and load_int(batch + B_LEFT) == 0


@compiled
def drop(flights: Any, batch: Any) -> None:
    """Begin no more of a batch, and wait for what has begun."""
    later = load_int(batch + B_READS) - load_int(batch + B_BEGUN)
    _more(batch + B_LEFT, -later)
    store_int(batch + B_BEGUN, load_int(batch + B_READS))
    wait(flights, batch)


@compiled
def note(flights: Any) -> None:
    """What has ended by now is noted, so that the drive does not seem busy until somebody waits."""
    if load_int(flights + F_UNDER_WAY):
        _collect(flights, 0)


@compiled
def hand_over_guess(pool: Any) -> None:
    """What `sparse.guess` has left to be handed over, if nobody has yet."""
    flights = atomic_swap(pool + LATER, 0)
    if flights:
        _submit(flights, load_int(flights + F_BATCHES))


@compiled
def begin(flights: Any, batch: Any, sheet: Any, n: Any, ids: Any, addresses: Any) -> None:
    """Read n records of the sheet's layer, ids ascending, to their addresses."""
    prepare(flights, batch, sheet, n, ids, addresses)
    _submit(flights, batch)


@compiled
def prepare(flights: Any, batch: Any, sheet: Any, n: Any, ids: Any, addresses: Any) -> None:
    """`begin`, but for handing over: the first who waits for the batch does that, or `hand_over_guess`."""
    wait(flights, batch)  # a guess that was wrong may still be under way
    if load_int(batch + B_LEFT) > 0:  # nor does it end: what it works on may not change
        _more(batch + B_FAILED, 1)
        return
    store_int(batch + B_READS, 0)
    store_int(batch + B_FAILED, 0)
    if n == 0:
        return
    requests, sizes = load_int(batch + B_REQUESTS), load_int(batch + B_SIZES)
    width = load_int(sheet + S_WIDTH)
    lay_out(
        n, ids, addresses, width, load_int(sheet + S_BASE), load_int(sheet + S_GAP), load_int(flights + F_MOST),
        load_int(flights + F_WASTE), load_int(batch + B_OFFSETS), sizes, load_int(batch + B_FIRST),
        load_int(batch + B_VIEWS), batch + B_READS, requests,
    )  # fmt: skip
    reads, how = load_int(batch + B_READS), PREADV + (load_int(sheet + S_FD) << 32)
    for i in range(reads):
        store_int(requests + 64 * i, batch)
        store_int(requests + 64 * i + 16, how)
        size, bits = load_int(sizes + 8 * i), 0
        _more(flights + F_BYTES, size)
        while size > 1 << bits:
            bits += 1
        _more(load_int(flights + F_BY_BITS) + 8 * bits, 1)
    _more(flights + F_REQUESTS, reads)
    _more(flights + F_USEFUL, n * width)
    store_int(batch + B_RECORDS, n)
    store_int(batch + B_LEFT, reads)
    store_int(batch + B_BEGUN, 0)
