"""The compiled kernels: one machine-code function, `enter`, that computes a job with the help of a few waiting threads.

Arguments are int64 throughout: addresses, counts, codes. No arrays and no torch here, so a small child process can compile
it, loading the cached code is quick, and a call costs microseconds (`native` wraps it for tensors).

Why threads of its own. A model asks for some two hundred small products a token. Numba's workqueue takes 100 us to start a
loop on two threads; OpenMP takes 2 us but its workers then spin for milliseconds on cores that reading needs. Here the caller
works on the job at once and whoever is awake joins: workers watch for the next job for a few tens of microseconds, then sleep
in read(2) on a pipe. A caller waits only for workers that joined, never for one that is still waking up. Work is handed out in
chunks whose bounds do not depend on the number of threads, and every sum has one order, so neither do the results.
"""

from __future__ import annotations

import math
from typing import Any

from numba import njit, types

from .dots import MOST_TOKENS, add_scaled, convert, dot
from .jobs import (
    CODES,
    DEQUANTIZE,
    FFN,
    GATE,
    GATED,
    JOB,
    LINEAR,
    NEXT,
    OPEN,
    PIPE_IN,
    PIPE_OUT,
    POOL_BYTES,
    ROW_LIMIT,
    SEQUENCE,
    SLEEPERS,
    STOP,
    THREADS,
)
from .memory import (
    atomic_add,
    atomic_load,
    atomic_swap,
    load_float,
    load_int,
    pause,
    read,
    sched_yield,
    store_float,
    store_int,
    write,
)

SPINS = 1500  # turns of waiting before a worker sleeps: 20 to 70 us
WAKE_BYTES = 192 << 10  # smaller jobs are over before a sleeper would be up
_BLOCKS = CODES["BF16"] + 1  # formats from this code on come in blocks
_F32 = CODES["F32"]

_compiled = njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


@_compiled
def _activate(act: Any, v: Any) -> Any:
    if act == 0:
        return types.float32(0.0) if v < 0 else v
    if act == 1:
        return types.float32(0.0) if v < 0 else v * v
    if act == 2:
        return types.float32(v / (1.0 + math.exp(-v)))
    if act == 3:
        return types.float32(0.5 * v * (1.0 + math.erf(v * 0.7071067811865476)))
    if act == 4:
        return types.float32(0.5 * v * (1.0 + math.tanh(0.7978845608028654 * (v + 0.044715 * v * v * v))))
    return types.float32(v / (1.0 + math.exp(-1.702 * v)))


@_compiled
def _dots(code: Any, row: Any, x: Any, tokens: Any, n: Any, out: Any, stride: Any) -> None:
    """out[t] = row . x[t]; x is contiguous, out has `stride` bytes from token to token."""
    t = 0
    while t < tokens:
        some = min(tokens - t, MOST_TOKENS)
        dot(code * 4 + some, row, x + 4 * n * t, 4 * n, n, out + stride * t, stride)
        t += some


@_compiled
def _linear(code: Any, first: Any, last: Any, cols: Any, weight: Any, width: Any, x: Any, tokens: Any, out: Any, stride: Any, scratch: Any) -> None:
    for index in range(first, last):
        row, plain = weight + index * width, code
        if code >= _BLOCKS:
            convert(code, row, cols, scratch)
            row, plain = scratch, _F32
        _dots(plain, row, x, tokens, cols, out + 4 * index, stride)


@_compiled
def _neurons(code: Any, first: Any, last: Any, d: Any, records: Any, width: Any, x: Any, tokens: Any, sums: Any, act: Any, gated: Any, gate_bias: Any, up_bias: Any, scratch: Any) -> None:
    """sums[t] = the contributions of neurons first .. last - 1, in that order."""
    size = 4 if code == _F32 else 2
    gate, up = scratch, scratch + 4 * ROW_LIMIT
    for t in range(tokens * d):
        store_float(sums + 4 * t, types.float32(0.0))
    for index in range(first, last):
        row = records + index * width
        if gated:
            _dots(code, row, x, tokens, d, gate, 4)
            row += d * size
        _dots(code, row, x, tokens, d, up, 4)
        row += d * size
        for t in range(tokens):
            value = load_float(up + 4 * t)
            if up_bias:
                value += load_float(up_bias + 4 * index)
            if gated:
                other = load_float(gate + 4 * t)
                if gate_bias:
                    other += load_float(gate_bias + 4 * index)
                value *= _activate(act, other)
            else:
                value = _activate(act, value)
            store_float(up + 4 * t, value)
        t = 0
        while t < tokens:
            some = min(tokens - t, MOST_TOKENS)
            add_scaled(code * 4 + some, row, d, up + 4 * t, sums + 4 * d * t, 4 * d)
            t += some


@_compiled
def _help(pool: Any, worker: Any) -> None:
    """Compute chunks of the open job until none is left."""
    job = pool + JOB
    kind, code, tokens, count = load_int(job), load_int(job + 8), load_int(job + 16), load_int(job + 24)
    cols, weight, width, x = load_int(job + 32), load_int(job + 40), load_int(job + 48), load_int(job + 56)
    out, stride, chunk = load_int(job + 64), load_int(job + 72), load_int(job + 80)
    scratch = load_int(job + 88) + worker * load_int(job + 96)
    act, gate_bias, up_bias = load_int(job + 104), load_int(job + 112), load_int(job + 120)
    while True:
        index = atomic_add(pool + NEXT, 1)
        first = index * chunk
        if first >= count:
            return
        last = min(first + chunk, count)
        if kind == LINEAR:
            _linear(code, first, last, cols, weight, width, x, tokens, out, stride, scratch)
        elif kind == DEQUANTIZE:
            for row in range(first, last):
                convert(code, weight + row * width, cols, out + row * stride)
        else:
            sums = stride + index * 4 * tokens * cols
            gated = act >= GATED
            _neurons(code, first, last, cols, weight, width, x, tokens, sums, act % GATED, gated, gate_bias, up_bias, scratch)


@_compiled
def _serve(pool: Any, worker: Any) -> None:
    """A worker's life: join jobs while they are open, sleep when there have been none for a while."""
    done, spins = 0, 0
    while atomic_load(pool + STOP) == 0:
        if atomic_load(pool + SEQUENCE) == done:
            spins += 1
            if spins < SPINS:
                pause()
                continue
            atomic_add(pool + SLEEPERS, 1)
            # a job that came just now leaves the mark standing: its byte ends some later sleep too early, and no harm is done
            if atomic_load(pool + SEQUENCE) == done and atomic_load(pool + STOP) == 0:
                read(types.int32(load_int(pool + PIPE_IN)), pool + POOL_BYTES + worker * 64, 1)
            spins = 0
            continue
        done = atomic_load(pool + SEQUENCE)
        if atomic_add(pool + GATE, 1) >= OPEN:
            _help(pool, worker)
        atomic_add(pool + GATE, -1)
        spins = 0


@_compiled
def enter(pool: Any, worker: Any) -> None:
    """Compute the job in the pool's words (worker 0, one caller at a time), or be worker number `worker` until it stops.

    The words of a job, in their order: kind, format's code, tokens, count, cols, weight, width, x, out, stride, chunk, scratch,
    scratch stride, act, gate bias, up bias. `width` is the bytes from row to row of the weight, `chunk` the rows handed out
    together, the scratch stride (bytes) what each thread has for itself.

    LINEAR: out[t, row] = weight[row] . x[t] for `count` rows; `stride` bytes from token to token; scratch: cols floats.
    DEQUANTIZE: out[row] = weight[row] as float32; `stride` bytes from row to row of out.
    FFN: out[tokens, cols] += what `count` neurons contribute, whose records are the rows of weight; `stride` is the address of
    the sums, float32 [chunks, tokens, cols]; scratch: 32 floats; act has 8 added when gated; a bias is an address or 0.
    """
    if worker > 0:
        _serve(pool, worker)
        return
    job = pool + JOB
    kind, count, width, chunk = load_int(job), load_int(job + 24), load_int(job + 48), load_int(job + 80)
    atomic_swap(pool + NEXT, 0)
    shared = load_int(pool + THREADS) > 1 and count > chunk
    if shared:
        atomic_add(pool + GATE, OPEN)
        atomic_add(pool + SEQUENCE, 1)
        if count * width > WAKE_BYTES and atomic_load(pool + SLEEPERS) > 0:
            for _ in range(atomic_swap(pool + SLEEPERS, 0)):
                write(types.int32(load_int(pool + PIPE_OUT)), pool, 1)
    _help(pool, 0)
    if shared:
        atomic_add(pool + GATE, -OPEN)
        spins = 0
        while atomic_load(pool + GATE) != 0:
            pause()
            spins += 1
            if spins > SPINS:
                sched_yield()
    if kind == FFN:
        floats = load_int(job + 16) * load_int(job + 32)
        one, out, sums = load_int(job + 88), load_int(job + 64), load_int(job + 72)
        store_float(one, types.float32(1.0))
        for index in range((count + chunk - 1) // chunk):
            add_scaled(_F32 * 4 + 1, sums + index * 4 * floats, floats, one, out, 0)
