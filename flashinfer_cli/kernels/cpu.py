"""The compiled kernels: one machine-code function, `enter`, that computes a job with the help of a few waiting threads.

Arguments are int64 throughout: addresses, counts, codes. No arrays and no torch here, so a small child process can
compile it, loading the cached code is quick, and a call costs microseconds (`native` wraps it for tensors).

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
    FFN,
    FFN_LISTED,
    GATE,
    JOB,
    JOB_WORDS,
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
    PROGRAM,
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
from .tokens import above_zero, attend_heads, norm_rows, rotate_heads

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
            norm_rows(rows, cols, x + place, weight, load_float(job + 104), out + place, scratch)
        elif kind == ROTATE:
            here = 4 * cols * (load_int(group) if group else 0)
            rotate_heads(
                first, rows, tokens, (count - tokens) // 2, cols, x, weight, gate_bias, out + here, stride + here, part,
                scratch, up_bias, act, code,
            )  # fmt: skip
        elif kind == ATTEND:
            attend_heads(
                first, rows, tokens, cols, x, weight, stride, part, gate_bias + (load_int(group) if group else 0),
                up_bias, act, out, scratch, code,
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
def _serve(pool: Any, worker: Any) -> None:
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
def _compute(pool: Any) -> None:
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
def _one(pool: Any) -> None:
    """The job in the pool's words, and what follows it by itself."""
    _compute(pool)
    job = pool + JOB
    if load_int(job) == FFN or load_int(job) == FFN_LISTED:
        chunks = (load_int(job + 24) + load_int(job + 80) - 1) // load_int(job + 80)
        ones = load_int(job + 88)
        for index in range(chunks):
            store_float(ones + 4 * index, float32(1.0))
        store_int(job, ADD_UP)
        store_int(job + 24, load_int(job + 16) * load_int(job + 32))
        store_int(job + 48, 4 * chunks)
        store_int(job + 80, ADD_UP_CHUNK)
        store_int(job + 128, chunks)
        _compute(pool)


@compiled
def enter(pool: Any, worker: Any) -> None:
    """Compute the job in the pool's words (worker 0, one caller at a time), or be worker `worker` until the pool stops.

    The words of a job, in their order: kind, format's code, tokens, count, cols, weight, width, x, out, stride,
    chunk, scratch, scratch stride, act, gate bias, up bias, group, part. `width` is the bytes from row to row of the
    weight, `chunk` the rows handed out together, the scratch stride (bytes) what each thread has for itself, `group`
    the rows whose products it works on together, after converting them into its scratch where the format asks for it.

    LINEAR: out[t, row] = weight[row] . x[t] for `count` rows; `stride` bytes between tokens; scratch [group, cols].
    LINEAR_LISTED: the same of one token and several matrices of `part` rows, `count` rows together; weight is the
    address of int64, each the address of a matrix; `stride` bytes between the x of two matrices, 0 where all have one;
    out[count].
    DEQUANTIZE: out[row] = weight[row] as float32, contiguous; `stride` bytes from row to row of out.
    FFN: out[tokens, cols] += what `count` neurons contribute, whose records are the rows of weight; `stride` is the
    address of the sums, float32 [chunks, tokens, cols]; `part` the bytes of each part of a record; scratch: [group,
    cols + PADDING / 4 + 2 * tokens] and at least 16; act has GATED added when there is a gate; a bias is an address
    or 0.
    FFN_LISTED: the same, of one to three tokens and a plain format; weight is the address of `count` int64, each the
    address of a neuron's record, which may stand anywhere. Group is 1.
    ADD_UP, which follows an FFN by itself: out[count floats] += `group` sums at `stride`, one after the other; scratch:
    as many ones.
    NORM: out[row] = x[row] / rms(x[row]) * weight, of `cols` floats each; the bits of act are epsilon, a float32.
    ROTATE, of one token: `count` heads of `cols` floats: `tokens` of x, turned where they stand, the rest in halves:
    those at `weight`, turned on their way to out, and those at `gate bias`, to `stride`, both at position [group] (an
    address; 0: none) of heads `part` bytes apart; `scratch` and `up bias` are the cosines and sines of `act`
    dimensions, in neighbouring pairs where code is 1.
    ATTEND, of one token: `count` heads of `cols` floats of x, `tokens` of them with one key at `weight` and values
    at `stride`, `part` bytes apart, over `gate bias` + [group] positions, the last `up bias` where that is not 0; the
    bits of act are the scale; scratch: `code` bytes a head handed out together.
    ABOVE_ZERO: adds the bias at `weight` to `cols` floats of x; the places of those above zero, to int64 out, and their
    number to [stride].
    SUREST: of `cols` floats of x those above zero with that bias, which is not added to them there,
    and whose int64 at [group] is below zero, at most `part`; gate bias: int64 [2 cols] to work in.
    SETTLE: `demands.settle` on the sheet at x.
    LAY_OUT: `layouts.lay_out` of `cols` ids at x to addresses at `weight`: act is the base, `tokens` the gap, `part`
    the most pieces of a read, gate bias the waste; out, stride, scratch and up bias what it fills, [group] the
    counts, code the address of the requests.
    COPY: `count` records of `width` bytes from where int64 `weight` says to where int64 out says.
    PROGRAM: `count` jobs, whose words stand at `weight`, one after the other.
    """
    if worker > 0:
        _serve(pool, worker)
        return
    job = pool + JOB
    if load_int(job) != PROGRAM:
        _one(pool)
        return
    place = load_int(job + 40)
    stop = place + 8 * JOB_WORDS * load_int(job + 24)
    while place < stop:
        for word in range(JOB_WORDS):
            store_int(job + 8 * word, load_int(place + 8 * word))
        _one(pool)
        place += 8 * JOB_WORDS
