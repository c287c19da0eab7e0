"""The compiled kernels: one machine-code function, `enter`, that computes a job with the help of a few waiting threads.

Arguments are int64 throughout: addresses, counts, codes. No arrays and no torch here, so a small child process can
compile it, loading the cached code is quick, and a call costs microseconds (`native` wraps it for tensors). `crew` says
how the threads work together.
"""

from __future__ import annotations

from typing import Any

from .crew import compute, compute_ffn, serve
from .jobs import FFN, FFN_LISTED, GUESS, JOB, JOB_WORDS, PROGRAM, SPARSE
from .memory import load_int, store_int
from .products import compiled
from .reads import hand_over_guess
from .sparse import guess, sparse_ffn


@compiled
def _one(pool: Any) -> Any:
    """The job in the pool's words, and what follows it by itself; False where what comes after it has to wait."""
    kind = load_int(pool + JOB)
    if kind in (FFN, FFN_LISTED):
        compute_ffn(pool)
    elif kind == GUESS:
        guess(pool, load_int(pool + JOB + 40))
    elif kind == SPARSE:
        return sparse_ffn(pool)
    else:
        compute(pool)
    return True


@compiled
def _all(pool: Any) -> None:
    """The job in the pool's words, or those of a program."""
    job = pool + JOB
    if load_int(job) != PROGRAM:
        _one(pool)
        return
    place = load_int(job + 40)
    stop = place + 8 * JOB_WORDS * load_int(job + 24)
    while place < stop:
        for word in range(JOB_WORDS):
            store_int(job + 8 * word, load_int(place + 8 * word))
        if not _one(pool):
            return
        place += 8 * JOB_WORDS


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
    NORM: out[row] = x[row] / rms(x[row]) * weight, of `cols` floats each; the bits of act are epsilon, a float32. Where
    code is 1, LayerNorm, with the bias at `gate bias` or 0.
    ROTATE, of one token: `count` heads of `cols` floats: `tokens` of x, turned where they stand, the rest in halves:
    those at `weight`, turned too and kept at out, and those at `gate bias`, at `stride`, both at position [group] (an
    address; 0: none) of heads `part` bytes apart, in the format of code `width`; `scratch` and `up bias` are the
    cosines and sines of `act` dimensions, in neighbouring pairs where code is 1.
    ATTEND, of one token: `count` heads of `cols` floats of x, `tokens` of them with one key at `weight` and values
    at `stride`, `part` bytes apart, over `gate bias` + [group] positions, the last `up bias` where that is not 0; the
    bits of act are the scale; scratch: `code` bytes a head handed out together; keys and values are in the format of
    code `width`.
    ABOVE_ZERO: adds the bias at `weight` to `cols` floats of x; the places of those above zero, to int64 out, and their
    number to [stride].
    SUREST: of `cols` floats of x those above zero with that bias, which is not added to them there,
    and whose int64 at [group] is below zero, at most `part`; gate bias: int64 [2 cols] to work in.
    SETTLE: `demands.settle` on the sheet at x.
    LAY_OUT: `layouts.lay_out` of `cols` ids at x to addresses at `weight`: act is the base, `tokens` the gap, `part`
    the most pieces of a read, gate bias the waste; out, stride, scratch and up bias what it fills, [group] the
    counts, code the address of the requests.
    COPY: `count` records of `width` bytes from where int64 `weight` says to where int64 out says.
    GUESS: `sparse.guess` by the sheet at `weight`; handed over in the next LINEAR, or at the end.
    SPARSE: out[cols] = what the neurons of one token contribute, as `sparse.sparse_ffn` brings them by the sheet at
    `weight`; the other words as those of FFN_LISTED, biases those of all neurons; scratch: as of FFN_LISTED with
    FFN_CHUNKS chunks.
    PROGRAM: `count` jobs, whose words stand at `weight`, one after the other; what follows a SPARSE that could not read
    all it needs is left out.
    """
    if worker > 0:
        serve(pool, worker)
        return
    _all(pool)
    hand_over_guess(pool)
