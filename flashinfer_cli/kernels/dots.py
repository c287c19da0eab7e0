"""Dot products of a few rows with a few tokens, as a Numba intrinsic on addresses.

Activations are float32, weights stand in a plain or block format at any address. Every sum has one order, whatever
else is computed beside it, so its bits do not depend on how many tokens are handled together: a dot product adds
element i to partial sum i mod 16, then the partial sums along a fixed tree, then the tail.

Every argument is an int64: addresses, and counts of elements or, for pitches and strides, of bytes. The first one
names the variant: `variant(code, rows, tokens)`. Two rows by three tokens are what the 16 vector registers of AVX2
hold; the 32 of AVX-512 hold four by three of blocks, and of 16-bit rows, which take two instructions to widen, four by
six: twelve instructions a widened vector are enough to hide them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.extending import intrinsic

from ..checkpoint.base import FORMATS, PLAIN
from .codecs import decoded
from .jobs import CODES, DIRECT_BLOCKS
from .lanes import ELEMENT_BYTES, F32, LANES, Lanes, has_avx512
from .loops import accumulate, ahead_of, bytes_of, loop, number, prefetch_blocks, rows_at, whole, zeros
from .variants import Emit, choice

MOST_ROWS, MOST_TOKENS = 4 if has_avx512() else 2, 3
WIDE_TOKENS = 6 if has_avx512() else 0  # by MOST_ROWS rows of 16 bits; 0: there is no such tile


def variant(code: int, rows: int, tokens: int) -> int:
    return (code * 8 + rows) * 8 + tokens


def shapes(most_rows: int) -> list[tuple[int, int]]:
    return [(rows, tokens) for rows in range(1, most_rows + 1) for tokens in range(1, MOST_TOKENS + 1)]


def _dot(fmt: str, rows: int, tokens: int) -> Emit:
    size = ELEMENT_BYTES[fmt]
    pairs = [(r, t) for r in range(rows) for t in range(tokens)]

    def emit(b: ir.IRBuilder, row: Any, pitch: Any, x: Any, x_stride: Any, n: Any, out: Any, out_stride: Any) -> None:
        weights, inputs, outputs = (
            rows_at(b, *which) for which in ((row, pitch, rows), (x, x_stride, tokens), (out, out_stride, tokens))
        )
        sums, tails = zeros(b, len(pairs), LANES), zeros(b, len(pairs), 1)
        main, ahead = whole(b, n, LANES), ahead_of(b, pitch) if rows == 1 else None
        next_rows = b.mul(pitch, number(rows)) if tokens > MOST_TOKENS else None
        for start, stop, step, slots in ((number(0), main, LANES, sums), (main, n, 1, tails)):
            with loop(b, start, stop, step) as i:
                if ahead is not None and step == LANES:
                    weights[0].prefetch(b.add(bytes_of(b, i, size), ahead))
                if next_rows is not None and step == LANES:
                    for pointer in weights:
                        pointer.prefetch(b.add(bytes_of(b, i, size), next_rows))
                weight = [pointer.weights(bytes_of(b, i, size), fmt, step) for pointer in weights]
                value = [pointer.load(bytes_of(b, i, 4), F32, step) for pointer in inputs]
                for slot, (r, t) in zip(slots, pairs, strict=True):
                    accumulate(b, slot, weight[r], value[t])
        for vector, tail, (r, t) in zip(sums, tails, pairs, strict=True):
            outputs[t].store(4 * r, Lanes(b, b.load(vector)).total() + Lanes(b, b.load(tail)))

    return emit


def _dot_blocks(fmt: str, rows: int, tokens: int) -> Emit:
    """The same sums in the same order as those of the rows converted to float32: bit for bit the same results."""
    elements, size = FORMATS[fmt]
    pairs = [(r, t) for r in range(rows) for t in range(tokens)]

    def emit(b: ir.IRBuilder, row: Any, pitch: Any, x: Any, x_stride: Any, n: Any, out: Any, out_stride: Any) -> None:
        outputs, sums = rows_at(b, out, out_stride, tokens), zeros(b, len(pairs), LANES)
        ahead = ahead_of(b, b.mul(pitch, number(rows)))
        with loop(b, number(0), b.sdiv(n, number(elements)), 1) as i:
            sources = rows_at(b, b.add(row, b.mul(i, number(size))), pitch, rows)
            prefetch_blocks(b, sources, ahead, size)
            inputs = rows_at(b, b.add(x, b.mul(i, number(4 * elements))), x_stride, tokens)
            for v, weights in enumerate(decoded(fmt, sources)):
                values = [pointer.load(4 * LANES * v, F32, LANES) for pointer in inputs]
                for slot, (r, t) in zip(sums, pairs, strict=True):
                    accumulate(b, slot, weights[r], values[t])
        for vector, (r, t) in zip(sums, pairs, strict=True):
            outputs[t].store(4 * r, Lanes(b, b.load(vector)).total() + 0.0)

    return emit


_WIDE = [(fmt, t) for fmt in ("F16", "BF16") for t in range(MOST_TOKENS + 1, WIDE_TOKENS + 1)]
_DOTS = choice(
    "dot",
    7,
    {variant(CODES[fmt], r, t): _dot(fmt, r, t) for fmt in PLAIN for r, t in shapes(MOST_ROWS)}
    | {variant(CODES[fmt], MOST_ROWS, t): _dot(fmt, MOST_ROWS, t) for fmt, t in _WIDE}
    | {variant(CODES[fmt], r, t): _dot_blocks(fmt, r, t) for fmt in DIRECT_BLOCKS for r, t in shapes(MOST_ROWS)},
)


@intrinsic
def dot(
    typingctx: Any, which: Any, row: Any, pitch: Any, x: Any, x_stride: Any, n: Any, out: Any, out_stride: Any
) -> Any:
    """out[t, r] = row[r] . x[t] over n elements, up to MOST_ROWS rows; out has neighbouring rows next to each other."""
    return _DOTS
