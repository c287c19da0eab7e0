"""Weighted sums of rows, as a Numba intrinsic on addresses: what neurons add to the output, and attention's values.

Row after row is added, so the bits do not depend on how many tokens are handled together. Arguments as in `dots`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.extending import intrinsic

from ..checkpoint.base import FORMATS, PLAIN
from .codecs import decoded
from .dots import shapes, variant
from .jobs import CODES, DIRECT_BLOCKS, DIRECT_NEURONS
from .lanes import ELEMENT_BYTES, F32, LANES, Lanes, Pointer
from .loops import accumulate, ahead_of, bytes_of, loop, number, prefetch_blocks, rows_at, whole, zeros
from .variants import Emit, choice


def _mix_blocks(fmt: str, rows: int, tokens: int) -> Emit:
    """For `rows` rows of blocks, whatever `count` says."""
    elements, size = FORMATS[fmt]

    def emit(b: ir.IRBuilder, *given: Any) -> None:
        row, pitch, _, n, factors, factor_stride, sums, stride = given
        factor = [[p.load(4 * r, F32) for r in range(rows)] for p in rows_at(b, factors, factor_stride, tokens)]
        ahead = ahead_of(b, b.mul(pitch, number(rows)))
        with loop(b, number(0), b.sdiv(n, number(elements)), 1) as i:
            outputs = rows_at(b, b.add(sums, b.mul(i, number(4 * elements))), stride, tokens)
            sources = rows_at(b, b.add(row, b.mul(i, number(size))), pitch, rows)
            prefetch_blocks(b, sources, ahead, size)
            for v, weights in enumerate(decoded(fmt, sources)):
                for t, output in enumerate(outputs):
                    total = output.load(4 * LANES * v, F32, LANES)
                    for r in range(rows):
                        total = weights[r].times_plus(factor[t][r], total)
                    output.store(4 * LANES * v, total)

    return emit


def _mix(fmt: str, tokens: int, *, single: bool) -> Emit:
    size = ELEMENT_BYTES[fmt]

    def emit(b: ir.IRBuilder, *given: Any) -> None:
        row, pitch, count, n, factors, factor_stride, sums, stride = given
        outputs, scales = rows_at(b, sums, stride, tokens), rows_at(b, factors, factor_stride, tokens)
        ahead = ahead_of(b, pitch) if single else None

        def columns(i: Any, vectors: int, lanes: int) -> None:
            """sums[:, i : i + vectors * lanes], kept in registers over all rows."""
            places = [bytes_of(b, i, 4, v * lanes) for v in range(vectors)]
            slots = [zeros(b, vectors, lanes) for _ in range(tokens)]

            def add(k: Any) -> None:
                weights = Pointer(b, b.add(row, b.mul(pitch, k)))
                if ahead is not None and lanes == LANES:
                    for v in range(vectors):
                        weights.prefetch(b.add(bytes_of(b, i, size, v * lanes), ahead))
                values = [weights.weights(bytes_of(b, i, size, v * lanes), fmt, lanes) for v in range(vectors)]
                for t in range(tokens):
                    factor = scales[t].load(bytes_of(b, k, 4), F32)
                    for slot, value in zip(slots[t], values, strict=True):
                        accumulate(b, slot, value, factor)

            for t in range(tokens):
                for slot, place in zip(slots[t], places, strict=True):
                    b.store(outputs[t].load(place, F32, lanes).value, slot)
            if single:
                add(number(0))
            else:
                with loop(b, number(0), count, 1) as k:
                    add(k)
            for t in range(tokens):
                for slot, place in zip(slots[t], places, strict=True):
                    outputs[t].store(place, Lanes(b, b.load(slot)))

        wide, main = whole(b, n, 2 * LANES), whole(b, n, LANES)
        for start, stop, vectors, lanes in ((number(0), wide, 2, LANES), (wide, main, 1, LANES), (main, n, 1, 1)):
            with loop(b, start, stop, vectors * lanes) as i:
                columns(i, vectors, lanes)

    return emit


_MIXES = choice(
    "mix",
    8,
    {variant(CODES[fmt], r, t): _mix(fmt, t, single=r == 1) for fmt in PLAIN for r, t in shapes(2)}
    | {
        variant(CODES[fmt], r, t): _mix_blocks(fmt, r, t)
        for fmt in DIRECT_BLOCKS
        for r, t in shapes(DIRECT_NEURONS)
        if r in (1, DIRECT_NEURONS)
    },
)


@intrinsic
def mix(typingctx: Any, which: Any, row: Any, pitch: Any, count: Any, n: Any, factors: Any, factor_stride: Any, sums: Any, stride: Any) -> Any:  # fmt: skip # noqa: E501
    """sums[t] += factors[t, r] * row[r] over n elements, for `count` rows one after the other; variants: 1 row, or 2
    for any; for blocks 1 or DIRECT_NEURONS, as the variant says."""
    return _MIXES
