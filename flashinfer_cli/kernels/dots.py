"""The inner loops over a few rows: dot products, weighted sums and conversions, as Numba intrinsics on addresses.

Activations are float32, weights stand in a plain or block format at any address. Every sum has one order, whatever
else is computed beside it, so its bits do not depend on how many tokens are handled together: a dot product adds
element i to partial sum i mod 16, then the partial sums along a fixed tree, then the tail; a weighted sum of rows
adds row after row.

Every argument is an int64: addresses, and counts of elements or, for pitches and strides, of bytes. The first one of
each intrinsic names the variant: a format's code, or `variant(code, rows, tokens)`. Two rows by three tokens are what
the 16 vector registers of AVX2 hold; the 32 of AVX-512 hold four by three of blocks, and of 16-bit rows, which take
two instructions to widen, four by six: twelve instructions a widened vector are enough to hide them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..checkpoint.base import FORMATS, PLAIN
from .codecs import DECODERS
from .jobs import BLOCKS, CODES, DIRECT_BLOCKS, DIRECT_NEURONS
from .lanes import ELEMENT_BYTES, F32, I64, LANES, Lanes, Pointer, has_avx512, loop

MOST_ROWS, MOST_TOKENS = 4 if has_avx512() else 2, 3
WIDE_TOKENS = 6 if has_avx512() else 0  # by MOST_ROWS rows of 16 bits; 0: there is no such tile

AHEAD = 8192  # bytes to fetch ahead of use, at least: what the processor fetches by itself stops at every 4 KiB

Emit = Callable[..., None]


def variant(code: int, rows: int, tokens: int) -> int:
    return (code * 8 + rows) * 8 + tokens


def _number(value: int) -> Any:
    return ir.Constant(I64, value)


def _whole(b: ir.IRBuilder, count: Any, step: int) -> Any:
    """The part of `count` that whole steps (a power of two) cover."""
    return b.and_(count, _number(-step))


def _bytes(b: ir.IRBuilder, index: Any, element: int, extra: int = 0) -> Any:
    return b.mul(b.add(index, _number(extra)), _number(element))


def _rows(b: ir.IRBuilder, address: Any, stride: Any, count: int) -> list[Pointer]:
    return [Pointer(b, b.add(address, b.mul(stride, _number(row)))) for row in range(count)]


def _ahead(b: ir.IRBuilder, pitch: Any) -> Any:
    """Distance in bytes to the first row that is at least AHEAD away: rows are gone through one after the other.

    One that stands before this one is the next of a list, wherever that is."""
    rows = b.mul(pitch, b.sdiv(b.add(pitch, _number(AHEAD - 1)), pitch))
    return b.select(b.icmp_signed("<", pitch, _number(0)), pitch, rows)


def _zeros(b: ir.IRBuilder, count: int, lanes: int) -> list[Any]:
    """Sums on the stack, which LLVM turns into registers."""
    zero = Lanes(b, ir.Constant(F32, 0.0))
    start = zero if lanes == 1 else zero.splat(lanes)
    slots = [cgutils.alloca_once(b, start.type) for _ in range(count)]
    for slot in slots:
        b.store(start.value, slot)
    return slots


def _accumulate(b: ir.IRBuilder, slot: Any, weight: Lanes, value: Lanes) -> None:
    b.store(weight.times_plus(value, Lanes(b, b.load(slot))).value, slot)


def _dot(fmt: str, rows: int, tokens: int) -> Emit:
    size = ELEMENT_BYTES[fmt]
    pairs = [(r, t) for r in range(rows) for t in range(tokens)]

    def emit(b: ir.IRBuilder, row: Any, pitch: Any, x: Any, x_stride: Any, n: Any, out: Any, out_stride: Any) -> None:
        weights, inputs, outputs = (
            _rows(b, *which) for which in ((row, pitch, rows), (x, x_stride, tokens), (out, out_stride, tokens))
        )
        sums, tails = _zeros(b, len(pairs), LANES), _zeros(b, len(pairs), 1)
        main, ahead = _whole(b, n, LANES), _ahead(b, pitch) if rows == 1 else None
        next_rows = b.mul(pitch, _number(rows)) if tokens > MOST_TOKENS else None
        for start, stop, step, slots in ((_number(0), main, LANES, sums), (main, n, 1, tails)):
            with loop(b, start, stop, step) as i:
                if ahead is not None and step == LANES:
                    weights[0].prefetch(b.add(_bytes(b, i, size), ahead))
                if next_rows is not None and step == LANES:
                    for pointer in weights:
                        pointer.prefetch(b.add(_bytes(b, i, size), next_rows))
                weight = [pointer.weights(_bytes(b, i, size), fmt, step) for pointer in weights]
                value = [pointer.load(_bytes(b, i, 4), F32, step) for pointer in inputs]
                for slot, (r, t) in zip(slots, pairs, strict=True):
                    _accumulate(b, slot, weight[r], value[t])
        for vector, tail, (r, t) in zip(sums, tails, pairs, strict=True):
            outputs[t].store(4 * r, Lanes(b, b.load(vector)).total() + Lanes(b, b.load(tail)))

    return emit


class _Decoded:
    """A block's values in registers, in their order: what a decoder that is given this as its target leaves."""

    def __init__(self, fmt: str, source: Pointer) -> None:
        self.values: list[Lanes] = []
        DECODERS[fmt](source, self)

    def store(self, offset: int, value: Lanes) -> None:
        assert offset == 4 * LANES * len(self.values) and value.count == LANES, offset
        self.values.append(value)


def _dot_blocks(fmt: str, rows: int, tokens: int) -> Emit:
    """The same sums in the same order as those of the rows converted to float32: bit for bit the same results."""
    elements, size = FORMATS[fmt]
    pairs = [(r, t) for r in range(rows) for t in range(tokens)]

    def emit(b: ir.IRBuilder, row: Any, pitch: Any, x: Any, x_stride: Any, n: Any, out: Any, out_stride: Any) -> None:
        outputs, sums = _rows(b, out, out_stride, tokens), _zeros(b, len(pairs), LANES)
        ahead = _ahead(b, b.mul(pitch, _number(rows)))
        with loop(b, _number(0), b.sdiv(n, _number(elements)), 1) as i:
            sources = _rows(b, b.add(row, b.mul(i, _number(size))), pitch, rows)
            for source in sources:
                source.prefetch(ahead)
            inputs = _rows(b, b.add(x, b.mul(i, _number(4 * elements))), x_stride, tokens)
            weights = [_Decoded(fmt, source).values for source in sources]
            for v in range(elements // LANES):
                values = [pointer.load(4 * LANES * v, F32, LANES) for pointer in inputs]
                for slot, (r, t) in zip(sums, pairs, strict=True):
                    _accumulate(b, slot, weights[r][v], values[t])
        for vector, (r, t) in zip(sums, pairs, strict=True):
            outputs[t].store(4 * r, Lanes(b, b.load(vector)).total() + 0.0)

    return emit


def _mix_blocks(fmt: str, rows: int, tokens: int) -> Emit:
    """For `rows` rows of blocks, whatever `count` says."""
    elements, size = FORMATS[fmt]

    def emit(
        b: ir.IRBuilder,
        row: Any,
        pitch: Any,
        count: Any,
        n: Any,
        factors: Any,
        factor_stride: Any,
        sums: Any,
        stride: Any,
    ) -> None:
        factor = [[p.load(4 * r, F32) for r in range(rows)] for p in _rows(b, factors, factor_stride, tokens)]
        ahead = _ahead(b, b.mul(pitch, _number(rows)))
        with loop(b, _number(0), b.sdiv(n, _number(elements)), 1) as i:
            outputs = _rows(b, b.add(sums, b.mul(i, _number(4 * elements))), stride, tokens)
            sources = _rows(b, b.add(row, b.mul(i, _number(size))), pitch, rows)
            for source in sources:
                source.prefetch(ahead)
            weights = [_Decoded(fmt, source).values for source in sources]
            for place in range(0, elements, LANES):
                for t, output in enumerate(outputs):
                    total = output.load(4 * place, F32, LANES)
                    for r in range(rows):
                        total = weights[r][place // LANES].times_plus(factor[t][r], total)
                    output.store(4 * place, total)

    return emit


def _mix(fmt: str, tokens: int, *, single: bool) -> Emit:
    size = ELEMENT_BYTES[fmt]

    def emit(
        b: ir.IRBuilder,
        row: Any,
        pitch: Any,
        count: Any,
        n: Any,
        factors: Any,
        factor_stride: Any,
        sums: Any,
        stride: Any,
    ) -> None:
        outputs, scales = _rows(b, sums, stride, tokens), _rows(b, factors, factor_stride, tokens)
        ahead = _ahead(b, pitch) if single else None

        def columns(i: Any, vectors: int, lanes: int) -> None:
            """sums[:, i : i + vectors * lanes], kept in registers over all rows."""
            places = [_bytes(b, i, 4, v * lanes) for v in range(vectors)]
            slots = [_zeros(b, vectors, lanes) for _ in range(tokens)]

            def add(k: Any) -> None:
                weights = Pointer(b, b.add(row, b.mul(pitch, k)))
                if ahead is not None and lanes == LANES:
                    for v in range(vectors):
                        weights.prefetch(b.add(_bytes(b, i, size, v * lanes), ahead))
                values = [weights.weights(_bytes(b, i, size, v * lanes), fmt, lanes) for v in range(vectors)]
                for t in range(tokens):
                    factor = scales[t].load(_bytes(b, k, 4), F32)
                    for slot, value in zip(slots[t], values, strict=True):
                        _accumulate(b, slot, value, factor)

            for t in range(tokens):
                for slot, place in zip(slots[t], places, strict=True):
                    b.store(outputs[t].load(place, F32, lanes).value, slot)
            if single:
                add(_number(0))
            else:
                with loop(b, _number(0), count, 1) as k:
                    add(k)
            for t in range(tokens):
                for slot, place in zip(slots[t], places, strict=True):
                    outputs[t].store(place, Lanes(b, b.load(slot)))

        wide, main = _whole(b, n, 2 * LANES), _whole(b, n, LANES)
        for start, stop, vectors, lanes in ((_number(0), wide, 2, LANES), (wide, main, 1, LANES), (main, n, 1, 1)):
            with loop(b, start, stop, vectors * lanes) as i:
                columns(i, vectors, lanes)

    return emit


def _convert_plain(fmt: str) -> Emit:
    size = ELEMENT_BYTES[fmt]

    def emit(b: ir.IRBuilder, row: Any, n: Any, out: Any) -> None:
        weights, output = Pointer(b, row), Pointer(b, out)
        main = _whole(b, n, LANES)
        for start, stop, step in ((_number(0), main, LANES), (main, n, 1)):
            with loop(b, start, stop, step) as i:
                output.store(_bytes(b, i, 4), weights.weights(_bytes(b, i, size), fmt, step))

    return emit


def _convert_blocks(fmt: str) -> Emit:
    elements, size = FORMATS[fmt]

    def emit(b: ir.IRBuilder, row: Any, n: Any, out: Any) -> None:
        with loop(b, _number(0), b.sdiv(n, _number(elements)), 1) as i:
            source, target = (b.add(base, b.mul(i, _number(each))) for base, each in ((row, size), (out, 4 * elements)))
            DECODERS[fmt](Pointer(b, source), Pointer(b, target))

    return emit


def _choice(name: str, arity: int, variants: dict[int, Emit]) -> Any:
    """An intrinsic op(which, *arguments): the code that variants[which] emits, chosen at run time.

    Each variant is a function of its own that is never inlined: compiled once, however often it is used.
    """
    signature = types.void(*[types.int64] * (arity + 1))
    kind = ir.FunctionType(ir.VoidType(), [I64] * arity)

    def function(module: ir.Module, which: int, emit: Emit) -> Any:
        symbol = f"genai_run_{name}_{which}"
        if symbol not in module.globals:
            made = ir.Function(module, kind, symbol)
            made.linkage = "linkonce_odr"
            made.attributes.add("noinline")
            b = ir.IRBuilder(made.append_basic_block("entry"))
            emit(b, *made.args)
            b.ret_void()
        return module.globals[symbol]

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        end = b.append_basic_block("chosen")
        chooser = b.switch(args[0], end)
        for which, emit in variants.items():
            block = b.append_basic_block(f"variant.{which}")
            chooser.add_case(_number(which), block)
            b.position_at_end(block)
            b.call(function(b.module, which, emit), args[1:])
            b.branch(end)
        b.position_at_end(end)
        return context.get_dummy_value()

    return signature, codegen


def _shapes(most_rows: int) -> list[tuple[int, int]]:
    return [(rows, tokens) for rows in range(1, most_rows + 1) for tokens in range(1, MOST_TOKENS + 1)]


_WIDE = [(fmt, t) for fmt in ("F16", "BF16") for t in range(MOST_TOKENS + 1, WIDE_TOKENS + 1)]
_DOTS = _choice(
    "dot",
    7,
    {variant(CODES[fmt], r, t): _dot(fmt, r, t) for fmt in PLAIN for r, t in _shapes(MOST_ROWS)}
    | {variant(CODES[fmt], MOST_ROWS, t): _dot(fmt, MOST_ROWS, t) for fmt, t in _WIDE}
    | {variant(CODES[fmt], r, t): _dot_blocks(fmt, r, t) for fmt in DIRECT_BLOCKS for r, t in _shapes(MOST_ROWS)},
)
_MIXES = _choice(
    "mix",
    8,
    {variant(CODES[fmt], r, t): _mix(fmt, t, single=r == 1) for fmt in PLAIN for r, t in _shapes(2)}
    | {
        variant(CODES[fmt], r, t): _mix_blocks(fmt, r, t)
        for fmt in DIRECT_BLOCKS
        for r, t in _shapes(DIRECT_NEURONS)
        if r in (1, DIRECT_NEURONS)
    },
)
_CONVERSIONS = {CODES[fmt]: _convert_plain(fmt) for fmt in PLAIN} | {CODES[fmt]: _convert_blocks(fmt) for fmt in BLOCKS}
_CONVERT = _choice("convert", 3, _CONVERSIONS)


@intrinsic
def dot(
    typingctx: Any, which: Any, row: Any, pitch: Any, x: Any, x_stride: Any, n: Any, out: Any, out_stride: Any
) -> Any:
    """out[t, r] = row[r] . x[t] over n elements, up to MOST_ROWS rows; out has neighbouring rows next to each other."""
    return _DOTS


@intrinsic
def mix(typingctx: Any, which: Any, row: Any, pitch: Any, count: Any, n: Any, factors: Any, factor_stride: Any, sums: Any, stride: Any) -> Any:  # fmt: skip # noqa: E501
    """sums[t] += factors[t, r] * row[r] over n elements, for `count` rows one after the other; variants: 1 row, or 2
    for any; for blocks 1 or DIRECT_NEURONS, as the variant says."""
    return _MIXES


@intrinsic
def convert(typingctx: Any, code: Any, row: Any, n: Any, out: Any) -> Any:
    """out[:n] = row as float32."""
    return _CONVERT
