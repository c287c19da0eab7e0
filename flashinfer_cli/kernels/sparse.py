"""What a token computes on the neurons that its predictor named, as one job: who goes, what is read, and the sum.

The paper's loop (LLM in a Flash, 2312.11514, 3.3) for one layer: delta loads into slots, block by block, each computed
on while the next is on its way. `cache.fetch.Fetch` is the plain twin: the same reads, the same state of slots and
policy, the same bits.
"""

from __future__ import annotations

from typing import Any

from numba import float32

from .crew import compute, compute_ffn
from .demands import settle
from .jobs import (
    BATCH_WORDS,
    COPY,
    F_AT,
    F_BATCHES,
    F_BIASES,
    F_FROM,
    F_GUESS_AT,
    F_GUESS_COUNT,
    F_GUESS_IDS,
    F_GUESS_OF,
    F_GUESS_ROWS,
    F_GUESSED,
    F_IDS,
    F_RIGHT,
    F_TO,
    FFN_CHUNK_BYTES,
    FFN_CHUNK_ROWS,
    FFN_CHUNKS,
    FFN_LISTED,
    JOB,
    LATER,
    S_ADDRESSES,
    S_ADDS,
    S_ASKED,
    S_BLOCK,
    S_DONE,
    S_FLIGHTS,
    S_FOUND,
    S_GUESSED,
    S_GUESSED_IDS,
    S_GUESSED_ROWS,
    S_IDS,
    S_LAST,
    S_PLACES,
    S_READ_AT,
    S_READ_IDS,
    S_READS,
    S_RIGHT,
    S_SLOT,
    S_STAGES,
    S_STATES,
    S_TALLY,
    S_TIME,
    S_WIDTH,
    STATE_ABSENT,
    STATE_ARRIVING,
    STATE_GUESSED,
    THREADS,
)
from .memory import load_byte, load_double, load_float, load_int, store_double, store_float, store_int
from .products import compiled
from .reads import begin, drop, note, prepare, wait


@compiled
def _batch(flights: Any, index: Any) -> Any:
    """The first is a guess's, the second that of a demand's first blocks, then one for each block on its way."""
    return load_int(flights + F_BATCHES) + 8 * BATCH_WORDS * index


@compiled
def guess(pool: Any, sheet: Any) -> None:
    """Lay out reads of the layer's neurons at F_GUESS_IDS, [S_FOUND] of them, ahead of its demand. One thread hands
    them over while the others begin with the next product: that takes 4 us a read."""
    flights = load_int(sheet + S_FLIGHTS)
    if load_int(flights + F_GUESS_OF):
        store_int(flights + F_GUESSED, load_int(flights + F_GUESSED) + load_int(flights + F_GUESS_COUNT))
    found = load_int(load_int(sheet + S_FOUND))
    store_int(flights + F_GUESS_COUNT, found)
    store_int(flights + F_GUESS_OF, sheet if found > 0 else 0)
    rows, at, width = load_int(flights + F_GUESS_ROWS), load_int(flights + F_GUESS_AT), load_int(sheet + S_WIDTH)
    for i in range(found):
        store_int(rows + 8 * i, at + width * i)
    prepare(flights, _batch(flights, 0), sheet, found, load_int(flights + F_GUESS_IDS), rows)
    store_int(pool + LATER, flights if found > 0 else 0)


@compiled
def _turn(sheet: Any) -> None:
    """`NeuronPolicy.turn`, but for its time."""
    ids, asked, time = load_int(sheet + S_IDS), load_int(sheet + S_ASKED), load_int(sheet + S_TIME)
    last, tally, adds = load_int(sheet + S_LAST), load_int(sheet + S_TALLY), load_double(sheet + S_ADDS)
    for i in range(asked):
        id = load_int(ids + 8 * i)
        store_int(last + 8 * id, time)
        if tally:
            store_double(tally + 8 * id, load_double(tally + 8 * id) + adds)


@compiled
def _demand(sheet: Any, flights: Any) -> None:
    """What the predictor named is settled, and the reads of the first blocks begun."""
    note(flights)
    store_int(sheet + S_ASKED, load_int(load_int(sheet + S_FOUND)))
    _turn(sheet)
    mine = load_int(flights + F_GUESS_OF) == sheet
    store_int(sheet + S_GUESSED_IDS, load_int(flights + F_GUESS_IDS))
    store_int(sheet + S_GUESSED, load_int(flights + F_GUESS_COUNT) if mine else 0)
    store_int(sheet + S_GUESSED_ROWS, load_int(flights + F_GUESS_AT))
    settle(sheet)
    if mine:
        store_int(flights + F_GUESSED, load_int(flights + F_GUESSED) + load_int(flights + F_GUESS_COUNT))
        store_int(flights + F_RIGHT, load_int(flights + F_RIGHT) + load_int(sheet + S_RIGHT))
        store_int(flights + F_GUESS_OF, 0)
    ids, addresses = load_int(sheet + S_READ_IDS), load_int(sheet + S_READ_AT)
    begin(flights, _batch(flights, 1), sheet, load_int(sheet + S_READS), ids, addresses)


@compiled
def _begin_block(sheet: Any, flights: Any, index: Any, first: Any, count: Any) -> None:
    """Begin to read what of a later block is missing and not on its way."""
    ids, at = load_int(flights + F_IDS), load_int(flights + F_AT)
    n = 0
    for i in range(first, first + count):
        if load_byte(load_int(sheet + S_STATES) + i) & (STATE_ABSENT | STATE_GUESSED) == STATE_ABSENT:
            store_int(ids + 8 * n, load_int(load_int(sheet + S_IDS) + 8 * i))
            store_int(at + 8 * n, load_int(load_int(sheet + S_ADDRESSES) + 8 * i))
            n += 1
    begin(flights, _batch(flights, 2 + index % load_int(sheet + S_STAGES)), sheet, n, ids, at)


@compiled
def _keep(pool: Any, sheet: Any, flights: Any, first: Any, count: Any, width: Any) -> None:
    """Copy what was guessed, and is to stay, to its slot."""
    n, source, target = 0, load_int(flights + F_FROM), load_int(flights + F_TO)
    for i in range(first, first + count):
        if load_byte(load_int(sheet + S_STATES) + i) == STATE_ARRIVING:
            slot = load_int(load_int(sheet + S_SLOT) + 8 * load_int(load_int(sheet + S_IDS) + 8 * i))
            store_int(source + 8 * n, load_int(load_int(sheet + S_ADDRESSES) + 8 * i))
            store_int(target + 8 * n, load_int(load_int(sheet + S_PLACES) + 8 * slot))
            n += 1
    if n:
        job = pool + JOB
        store_int(job, COPY)
        store_int(job + 24, n)
        store_int(job + 40, source)
        store_int(job + 48, width)
        store_int(job + 64, target)
        store_int(job + 80, 16)
        compute(pool)


@compiled
def _gathered(sheet: Any, biases: Any, first: Any, count: Any, into: Any) -> Any:
    """Biases of a block's neurons, side by side; 0 where there are none."""
    if not biases:
        return biases
    for i in range(count):
        id = load_int(load_int(sheet + S_IDS) + 8 * (first + i))
        store_float(into + 4 * i, load_float(biases + 4 * id))
    return into


@compiled
def _give_up(flights: Any, stages: Any) -> Any:
    """Read nothing more of this demand, and let what is under way end: the memory will be somebody else's."""
    for index in range(1, 2 + stages):
        drop(flights, _batch(flights, index))
    return False


@compiled
def sparse_ffn(pool: Any) -> Any:
    """The SPARSE job in the pool's words. Where a read fails it ends, with the blocks before it computed (S_DONE), and
    returns False."""
    job = pool + JOB
    code, d, sheet, width, x = (
        load_int(job + 8), load_int(job + 32), load_int(job + 40), load_int(job + 48), load_int(job + 56),
    )  # fmt: skip
    out, scratch, own, act = load_int(job + 64), load_int(job + 88), load_int(job + 96), load_int(job + 104)
    gate_bias, up_bias, part = load_int(job + 112), load_int(job + 120), load_int(job + 136)
    flights, block, stages = load_int(sheet + S_FLIGHTS), load_int(sheet + S_BLOCK), load_int(sheet + S_STAGES)
    store_int(sheet + S_DONE, 0)
    _demand(sheet, flights)
    for i in range(d):
        store_float(out + 4 * i, float32(0.0))
    asked, spare = load_int(sheet + S_ASKED), load_int(flights + F_BIASES)
    for index in range((asked + block - 1) // block):
        first = index * block
        count = min(block, asked - first)
        if load_int(sheet + S_RIGHT):
            if not wait(flights, _batch(flights, 0)):
                return _give_up(flights, stages)
            _keep(pool, sheet, flights, first, count, width)  # while the others come
        waits_for = 1 if index < stages else 2 + index % stages
        if not wait(flights, _batch(flights, waits_for)):
            return _give_up(flights, stages)
        # chunks as `native.ffn_records` has them: which neurons are summed together decides the bits
        chunk = max((count + FFN_CHUNKS - 1) // FFN_CHUNKS, min(FFN_CHUNK_ROWS, FFN_CHUNK_BYTES // width), 2)
        chunks = max(1, (count + chunk - 1) // chunk)
        store_int(job, FFN_LISTED)
        store_int(job + 8, code)
        store_int(job + 16, 1)
        store_int(job + 24, count)
        store_int(job + 32, d)
        store_int(job + 40, load_int(sheet + S_ADDRESSES) + 8 * first)
        store_int(job + 48, width)
        store_int(job + 56, x)
        store_int(job + 64, out)
        store_int(job + 72, scratch + own * max(1, load_int(pool + THREADS)))
        store_int(job + 80, (count + chunks - 1) // chunks)
        store_int(job + 88, scratch)
        store_int(job + 96, own)
        store_int(job + 104, act)
        store_int(job + 112, _gathered(sheet, gate_bias, first, count, spare))
        store_int(job + 120, _gathered(sheet, up_bias, first, count, spare + 4 * block))
        store_int(job + 128, 1)
        store_int(job + 136, part)
        compute_ffn(pool)
        store_int(sheet + S_DONE, index + 1)
        after = (index + stages) * block
        if after < asked:
            _begin_block(sheet, flights, index + stages, after, min(block, asked - after))
    note(flights)
    return True
