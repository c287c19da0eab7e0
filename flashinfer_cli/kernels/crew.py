"""How a job is worked on: chunks of it, by the caller and by whoever of a few waiting threads is awake.

Why threads of its own. A model asks for some two hundred small products a token. Numba's workqueue takes 100 us to
start a loop on two threads; OpenMP takes 2 us but its workers then spin for milliseconds on cores that reading needs.
Here the caller works on the job at once and whoever is awake joins: workers watch for the next job for a few tens of
microseconds, then sleep in read(2) on a pipe. A caller waits only for workers that joined, never for one that is
still waking up. Work is handed out in chunks whose bounds do not depend on the number of threads, and every sum has
one order, so neither do the results.
"""

from __future__ import annotations

from typing import Any

from numba import float32, int32

from .demands import settle, surest
from .jobs import (
    ABOVE_ZERO,
    ADD_UP,
    ATTEND,
    COPY,
    DEQUANTIZE,
    FFN_LISTED,
    GATE,
    JOB,
    LATER,
    LAY_OUT,
    LINEAR,
    LINEAR_LISTED,
    MISSED,
    NEXT,
    NORM,
    OPEN,
    PATIENCE,
    PIPE_IN,
    PIPE_OUT,
    POOL_BYTES,
    ROTATE,
    SEQUENCE,
    SETTLE,
    SLEEPERS,
    STOP,
    SUREST,
    THREADS,
)
from .layouts import lay_out
from .memory import (
    atomic_add,
    atomic_load,
    atomic_swap,
    load_float,
    load_int,
    memcpy,
    pause,
    read,
    sched_yield,
    store_float,
    store_int,
    write,
)
from .mixes import mix
from .products import F32, choose, compiled, converted, linear, neurons
from .reads import hand_over_guess
from .tokens import above_zero, attend_heads, kept_bytes, layer_norm_rows, norm_rows, rotate_heads

SPINS = 3000  # turns of waiting for workers that have joined, before the rest of the machine is given a chance
# Waking a sleeper costs its caller some 20 us and is worth it once it has missed this much, in one job or in several.
WAKE_BYTES = 1 << 20
ADD_UP_CHUNK = 16 << 10  # floats of the sums of an FFN's chunks that are added up together


@compiled
def _help(pool: Any, worker: Any) -> None:
    """Compute chunks of the open job until none is left."""
    job = pool + JOB
    kind, code, tokens, count = load_int(job), load_int(job + 8), load_int(job + 16), load_int(job + 24)
    cols, weight, width, x = load_int(job + 32), load_int(job + 40), load_int(job + 48), load_int(job + 56)
    out, stride, chunk = load_int(job + 64), load_int(job + 72), load_int(job + 80)
    scratch = load_int(job + 88) + (0 if kind == ADD_UP else worker * load_int(job + 96))
    act, gate_bias, up_bias, group = load_int(job + 104), load_int(job + 112), load_int(job + 120), load_int(job + 128)
    part = load_int(job + 136)
    if kind == LINEAR and load_int(pool + LATER):
        hand_over_guess(pool)
    while True:
        index = atomic_add(pool + NEXT, 1)
        first = index * chunk
        if first >= count:
            return
        rows = min(chunk, count - first)
        source = weight + first * width
        if kind == LINEAR:
            linear(code, rows, cols, source, width, x, tokens, out + 4 * first, stride, scratch, group)
        elif kind == LINEAR_LISTED:
            done = 0
            while done < rows:
                which = (first + done) // part
                inside = first + done - which * part
                some = min(rows - done, part - inside)
                source = load_int(weight + 8 * which) + inside * width
                into = out + 4 * (first + done)
                linear(code, some, cols, source, width, x + which * stride, 1, into, 0, scratch, group)
                done += some
        elif kind == DEQUANTIZE:
            converted(code, source, width, rows, cols, out + first * stride, stride)
        elif kind == ADD_UP:
            mix(choose(F32, 2, 1), stride + 4 * first, 4 * count, group, rows, scratch, 0, out + 4 * first, 0)
        elif kind == NORM:
            place = 4 * cols * first
            if code:
                layer_norm_rows(rows, cols, x + place, weight, gate_bias, load_float(job + 104), out + place)
            else:
                norm_rows(rows, cols, x + place, weight, load_float(job + 104), out + place, scratch)
        elif kind == ROTATE:
            here = kept_bytes(width, cols) * (load_int(group) if group else 0)
            rotate_heads(
                first, rows, tokens, (count - tokens) // 2, cols, x, weight, gate_bias, out + here, stride + here, part,
                scratch, up_bias, act, code, width,
            )  # fmt: skip
        elif kind == ATTEND:
            attend_heads(
                first, rows, tokens, cols, x, weight, stride, part, gate_bias + (load_int(group) if group else 0),
                up_bias, act, out, scratch, code, width,
            )  # fmt: skip
        elif kind == ABOVE_ZERO:
            store_int(stride, above_zero(cols, x, weight, out))
        elif kind == SUREST:
            store_int(stride, surest(cols, x, weight, group, part, out, gate_bias))
        elif kind == SETTLE:
            settle(x)
        elif kind == LAY_OUT:
            lay_out(cols, x, weight, width, act, tokens, part, gate_bias, out, stride, scratch, up_bias, group, code)
        elif kind == COPY:
            for i in range(first, first + rows):
                memcpy(load_int(out + 8 * i), load_int(weight + 8 * i), width)
        else:
            gate_biases = gate_bias + 4 * first if gate_bias else gate_bias
            up_biases = up_bias + 4 * first if up_bias else up_bias
            sums = stride + index * 4 * tokens * cols
            listed = kind == FFN_LISTED
            if listed:
                source = weight + 8 * first
            neurons(
                code, rows, cols, source, width, part, x, tokens, sums, act, gate_biases, up_biases, scratch, group,
                listed,
            )  # fmt: skip


@compiled
def serve(pool: Any, worker: Any) -> None:
    """A worker's life: join jobs while they are open, sleep when there have been none for a while."""
    done, spins = 0, 0
    while atomic_load(pool + STOP) == 0:
        if atomic_load(pool + SEQUENCE) == done:
            spins += 1
            if spins < load_int(pool + PATIENCE):
                pause()
                continue
            atomic_add(pool + SLEEPERS, 1)
            # a job that came just now leaves the mark standing: its byte ends some later sleep too early, no harm done
            if atomic_load(pool + SEQUENCE) == done and atomic_load(pool + STOP) == 0:
                read(int32(load_int(pool + PIPE_IN)), pool + POOL_BYTES + worker * 64, 1)
            spins = 0
            continue
        done = atomic_load(pool + SEQUENCE)
        if atomic_add(pool + GATE, 1) >= OPEN:
            _help(pool, worker)
        atomic_add(pool + GATE, -1)
        spins = 0


@compiled
def compute(pool: Any) -> None:
    """Open the job in the pool's words, work on it, and wait for those who have joined."""
    job = pool + JOB
    count, width, chunk = load_int(job + 24), load_int(job + 48), load_int(job + 80)
    atomic_swap(pool + NEXT, 0)
    shared = load_int(pool + THREADS) > 1 and count > chunk
    if shared:
        atomic_add(pool + GATE, OPEN)
        atomic_add(pool + SEQUENCE, 1)
        if atomic_load(pool + SLEEPERS) > 0:
            missed = load_int(pool + MISSED) + count * width
            if missed > WAKE_BYTES:
                missed = 0
                for _ in range(atomic_swap(pool + SLEEPERS, 0)):
                    write(int32(load_int(pool + PIPE_OUT)), pool, 1)
            store_int(pool + MISSED, missed)
    _help(pool, 0)
    if shared:
        atomic_add(pool + GATE, -OPEN)
        spins = 0
        while atomic_load(pool + GATE) != 0:
            pause()
            spins += 1
            if spins > SPINS:
                sched_yield()


@compiled
def compute_ffn(pool: Any) -> None:
    """The FFN or FFN_LISTED job in the pool's words, and the ADD_UP of what its chunks gave."""
    compute(pool)
    job = pool + JOB
    chunks = (load_int(job + 24) + load_int(job + 80) - 1) // load_int(job + 80)
    ones = load_int(job + 88)
    for index in range(chunks):
        store_float(ones + 4 * index, float32(1.0))
    store_int(job, ADD_UP)
    store_int(job + 24, load_int(job + 16) * load_int(job + 32))
    store_int(job + 48, 4 * chunks)
    store_int(job + 80, ADD_UP_CHUNK)
    store_int(job + 128, chunks)
    compute(pool)
