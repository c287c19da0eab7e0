"""What a token's neurons ask of their cache, compiled: who goes, where each stands, and what is to be read.

A layer's token names a few hundred neurons. The same in numpy is some sixty calls of a few microseconds each, which a
model of thirty layers pays before every read; `cache.settling` is the plain twin.
"""

from __future__ import annotations

import math
from typing import Any

from numba import float32

from .jobs import (
    MOST_WORTH,
    S_ADDRESSES,
    S_ASKED,
    S_BLOCK,
    S_BLOCKS_READ,
    S_CAPACITY,
    S_COUNT,
    S_FREE,
    S_GUESSED,
    S_GUESSED_IDS,
    S_GUESSED_ROWS,
    S_HELD,
    S_IDS,
    S_LAST,
    S_LEFT,
    S_MARKS,
    S_MISSES,
    S_OLDEST,
    S_PASSING,
    S_PLACES,
    S_RANKS,
    S_READ_AT,
    S_READ_IDS,
    S_READS,
    S_RIGHT,
    S_SCALE,
    S_SCORES,
    S_SLOT,
    S_STAGES,
    S_STATES,
    S_TIME,
    S_USES,
    S_WIDTH,
    S_WORK,
    SCORE_STEPS,
    STATE_ABSENT,
    STATE_GUESSED,
    STATE_NEW,
    WORTH_BITS,
)
from .memory import load_byte, load_double, load_float, load_int, store_byte, store_float, store_int
from .products import compiled


@compiled
def kth(words: Any, n: Any, k: Any) -> Any:
    """The k-th smallest, from 0, of n int64 at `words`, which are put into another order."""
    low, high = 0, n - 1
    while low < high:
        pivot = load_int(words + 8 * ((low + high) // 2))
        i, j = low, high
        while i <= j:
            while load_int(words + 8 * i) < pivot:
                i += 1
            while load_int(words + 8 * j) > pivot:
                j -= 1
            if i <= j:
                kept = load_int(words + 8 * i)
                store_int(words + 8 * i, load_int(words + 8 * j))
                store_int(words + 8 * j, kept)
                i += 1
                j -= 1
        if k <= j:
            high = j
        elif k >= i:
            low = i
        else:
            break
    return load_int(words + 8 * k)


@compiled
def _worth(sheet: Any, id: Any) -> Any:
    """`cache.window.Foresight._worths` of one neuron."""
    uses, scores, most = load_int(sheet + S_USES), load_int(sheet + S_SCORES), float32(MOST_WORTH)
    worth = math.floor(load_double(uses + 8 * id) * load_double(sheet + S_SCALE))
    if scores != 0:
        worth += math.floor(min(max(load_float(scores + 4 * id) * float32(SCORE_STEPS), -most), most))
    return worth


@compiled
def _let_go(id: Any, sheet: Any) -> None:
    """The neuron is not held any more, and its slot, if it has one, is free."""
    store_byte(load_int(sheet + S_HELD) + id, 0)
    place = load_int(sheet + S_SLOT) + 8 * id
    slot = load_int(place)
    if slot >= 0:
        left = load_int(load_int(sheet + S_LEFT))
        store_int(load_int(sheet + S_FREE) + 8 * left, slot)
        store_int(load_int(sheet + S_LEFT), left + 1)
        store_int(place, -1)


@compiled
def _admit_surest(sheet: Any, free: Any) -> None:
    """Of what is asked for and not held, hold so many: those of most worth, of equals the first."""
    held, work = load_int(sheet + S_HELD), load_int(sheet + S_WORK)
    ids, asked = load_int(sheet + S_IDS), load_int(sheet + S_ASKED)
    found = 0
    for i in range(asked):
        id = load_int(ids + 8 * i)
        if not load_byte(held + id):
            store_int(work + 8 * found, _worth(sheet, id))
            found += 1
    limit, ties = kth(work, found, found - free), free
    for i in range(found):
        ties -= load_int(work + 8 * i) > limit
    for i in range(asked):
        id = load_int(ids + 8 * i)
        if not load_byte(held + id):
            worth = _worth(sheet, id)
            if worth > limit or (worth == limit and ties > 0):
                ties -= worth == limit
                store_byte(held + id, 1)


@compiled
def _make_room(sheet: Any) -> None:
    """`NeuronPolicy.demand`, and the slots of those that go."""
    count, time, oldest = load_int(sheet + S_COUNT), load_int(sheet + S_TIME), load_int(sheet + S_OLDEST)
    held, last, ranks = load_int(sheet + S_HELD), load_int(sheet + S_LAST), load_int(sheet + S_RANKS)
    foresees = load_int(sheet + S_USES) != 0
    ids, asked = load_int(sheet + S_IDS), load_int(sheet + S_ASKED)
    work = load_int(sheet + S_WORK)
    missing = 0
    for i in range(asked):
        missing += 1 - load_byte(held + load_int(ids + 8 * i))
    store_int(sheet + S_MISSES, missing)
    holding, candidates, id = 0, 0, 0  # candidates to go: ids, and behind them their ranks
    while id < count:
        if id + 8 <= count and load_int(held + id) == 0:  # most of a large layer is not here
            id += 8
            continue
        if load_byte(held + id):
            used = load_int(last + 8 * id)
            if used <= oldest:
                _let_go(id, sheet)
            else:
                holding += 1
                if used < time:
                    store_int(work + 8 * candidates, id)
                    rank = load_int(ranks + 8 * id)
                    if foresees:
                        rank += _worth(sheet, id) << WORTH_BITS
                    store_int(work + 8 * (count + candidates), rank)
                    candidates += 1
        id += 1
    free = load_int(sheet + S_CAPACITY) - holding
    going = min(missing - free, candidates)
    if going > 0:
        sorting = work + 16 * count
        for i in range(candidates):
            store_int(sorting + 8 * i, load_int(work + 8 * (count + i)))
        limit = kth(sorting, candidates, going - 1)
        ties = going
        for i in range(candidates):
            ties -= load_int(sorting + 8 * i) < limit
        for i in range(candidates):
            rank = load_int(work + 8 * (count + i))
            if rank < limit:
                _let_go(load_int(work + 8 * i), sheet)
            elif rank == limit and ties > 0:
                ties -= 1
                _let_go(load_int(work + 8 * i), sheet)
        free += going
    if foresees and 0 < free < missing:
        _admit_surest(sheet, free)
        return
    i = 0
    while i < asked and free > 0:
        id = load_int(ids + 8 * i)
        if not load_byte(held + id):
            store_byte(held + id, 1)
            free -= 1
        i += 1


@compiled
def settle(sheet: Any) -> None:
    """A demand of a layer, by the words of its sheet: who goes, who takes a slot, where each is computed on, and what
    of the first blocks has to be read."""
    _make_room(sheet)
    ids, asked = load_int(sheet + S_IDS), load_int(sheet + S_ASKED)
    held, slots, places = load_int(sheet + S_HELD), load_int(sheet + S_SLOT), load_int(sheet + S_PLACES)
    free, marks = load_int(sheet + S_FREE), load_int(sheet + S_MARKS)
    guessed_ids, guessed = load_int(sheet + S_GUESSED_IDS), load_int(sheet + S_GUESSED)
    rows, width, block = load_int(sheet + S_GUESSED_ROWS), load_int(sheet + S_WIDTH), load_int(sheet + S_BLOCK)
    addresses, states = load_int(sheet + S_ADDRESSES), load_int(sheet + S_STATES)
    read_ids, read_at = load_int(sheet + S_READ_IDS), load_int(sheet + S_READ_AT)
    until, stages, passing = load_int(sheet + S_BLOCKS_READ), load_int(sheet + S_STAGES), load_int(sheet + S_PASSING)
    left = load_int(load_int(sheet + S_LEFT))
    for i in range(guessed):
        store_int(marks + 8 * load_int(guessed_ids + 8 * i), i + 1)
    reads, right, through = 0, 0, 0
    for i in range(asked):
        if i % block == 0:
            through = 0
        id, state = load_int(ids + 8 * i), 0
        slot, row = load_int(slots + 8 * id), 0
        if slot < 0:
            state = STATE_ABSENT
            if load_byte(held + id) and left > 0:
                left -= 1
                slot = load_int(free + 8 * left)
                store_int(slots + 8 * id, slot)
                state += STATE_NEW
            row = load_int(marks + 8 * id)
            if row > 0:
                state += STATE_GUESSED
                right += 1
        if slot >= 0:
            address = load_int(places + 8 * slot)
        else:
            address = load_int(passing + 8 * (i // block % stages)) + width * through
            through += 1
        if row > 0:
            address = rows + width * (row - 1)
        elif state and i < until * block:
            store_int(read_ids + 8 * reads, id)
            store_int(read_at + 8 * reads, address)
            reads += 1
        store_int(addresses + 8 * i, address)
        store_byte(states + i, state)
    for i in range(guessed):
        store_int(marks + 8 * load_int(guessed_ids + 8 * i), 0)
    store_int(load_int(sheet + S_LEFT), left)
    store_int(sheet + S_READS, reads)
    store_int(sheet + S_RIGHT, right)


@compiled
def surest(n: Any, scores: Any, bias: Any, slots: Any, most: Any, ids: Any, work: Any) -> Any:
    """Of n neurons without a slot those with a score above zero, its bias added, at most the `most` highest: ids,
    ascending; returns their number. work: int64 [2 n]."""
    found = 0
    for id in range(n):
        score = load_float(scores + 4 * id) + load_float(bias + 4 * id)
        if score > float32(0.0) and load_int(slots + 8 * id) < 0:
            bits = work + 8 * found  # of a float above zero: in the order of the floats
            store_int(bits, 0)
            store_float(bits, score)
            store_int(ids + 8 * found, id)
            found += 1
    if found <= most:
        return found
    copy = work + 8 * n
    for i in range(found):
        store_int(copy + 8 * i, load_int(work + 8 * i))
    limit = kth(copy, found, found - most)
    ties = most
    for i in range(found):
        ties -= load_int(work + 8 * i) > limit
    kept = 0
    for i in range(found):
        bits = load_int(work + 8 * i)
        if bits > limit or (bits == limit and ties > 0):
            ties -= bits == limit
            store_int(ids + 8 * kept, load_int(ids + 8 * i))
            kept += 1
    return kept
