"""The inner loop for many tokens: a tile of rows by tokens over one block of columns, as a Numba intrinsic.

A product of many tokens goes through its columns in blocks, so that a block of the activations and the rows beside it
stay in the nearest caches. Between blocks the 16 partial sums of each dot product rest in memory; they are added to
in the order of `dots.dot`, so the bits are its bits.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .lanes import F32, LANES, Lanes, has_avx512
from .loops import accumulate, bytes_of, loop, number, rows_at, whole, zeros
from .variants import Emit, choice

# Four rows by six tokens fill the 32 registers of AVX-512, two by three the 16 of AVX2.
TILE_ROWS, TILE_TOKENS = (4, 6) if has_avx512() else (2, 3)
VECTOR = 4 * LANES  # bytes


def tile_variant(rows: int, tokens: int) -> int:
    return rows * 8 + tokens


def _tile(rows: int, tokens: int) -> Emit:
    pairs = [(r, t) for r in range(rows) for t in range(tokens)]

    def emit(b: ir.IRBuilder, *given: Any) -> None:
        row, pitch, x, x_stride, n, lanes, lanes_stride, out, out_stride, place = given
        weights, inputs = rows_at(b, row, pitch, rows), rows_at(b, x, x_stride, tokens)
        resting, outputs = rows_at(b, lanes, lanes_stride, tokens), rows_at(b, out, out_stride, tokens)
        sums, tails = zeros(b, len(pairs), LANES), zeros(b, len(pairs), 1)
        main = whole(b, n, LANES)
        with b.if_then(b.icmp_signed("==", b.and_(place, number(1)), number(0))):  # not the first block
            for slot, (r, t) in zip(sums, pairs, strict=True):
                b.store(resting[t].load(VECTOR * r, F32, LANES).value, slot)
        for start, stop, step, slots in ((number(0), main, LANES, sums), (main, n, 1, tails)):
            with loop(b, start, stop, step) as i:
                value = [pointer.load(bytes_of(b, i, 4), F32, step) for pointer in inputs]
                weight = [pointer.load(bytes_of(b, i, 4), F32, step) for pointer in weights]
                for slot, (r, t) in zip(slots, pairs, strict=True):
                    accumulate(b, slot, weight[r], value[t])
        with b.if_else(b.icmp_signed("==", b.and_(place, number(2)), number(0))) as (between, last):
            with between:
                for slot, (r, t) in zip(sums, pairs, strict=True):
                    resting[t].store(VECTOR * r, Lanes(b, b.load(slot)))
            with last:
                for slot, tail, (r, t) in zip(sums, tails, pairs, strict=True):
                    outputs[t].store(4 * r, Lanes(b, b.load(slot)).total() + Lanes(b, b.load(tail)))

    return emit


_TILES = choice(
    "tile",
    10,
    {tile_variant(rows, tokens): _tile(rows, tokens) for rows in {1, TILE_ROWS} for tokens in {1, 3, TILE_TOKENS}},
)


@intrinsic
def tile(typingctx: Any, which: types.Type, row: Any, pitch: Any, x: Any, x_stride: Any, n: Any, lanes: Any, lanes_stride: Any, out: Any, out_stride: Any, place: Any) -> Any:  # fmt: skip # noqa: E501
    """lanes[t, r] += row[r] * x[t] over n float32 elements; `place` has 1 set in a product's first block of columns,
    where lanes count as zeros, and 2 in its last, which adds them up into out[t, r]. Only the last block may have an
    n that is no multiple of 16. `lanes_stride` bytes stand between tokens, 64 between rows."""
    return _TILES
