"""The inner loops over one row: dot products, scaled additions and conversions, as Numba intrinsics on addresses.

Activations are float32, weights stand in a plain or block format at any address. A dot product of one row with one token
always sums in the same order (32 partial sums, element i in sum i mod 32, then a fixed tree, then the tail), so that its bits
do not depend on how many tokens are handled together.

Every argument is an int64: addresses, and counts of elements or, for strides, of bytes. The first one of each intrinsic names
the variant: a format's code, or `variant(code, tokens)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..checkpoint.base import FORMATS, PLAIN
from .codecs import DECODERS
from .jobs import BLOCKS, CODES
from .lanes import ELEMENT_BYTES, F32, I64, LANES, Lanes, Pointer, loop

STEP = 2 * LANES  # elements a turn of the main loops
MOST_TOKENS = 3  # handled together by one dot product: what the vector registers hold

Emit = Callable[..., None]


def variant(code: int, tokens: int) -> int:
    return code * 4 + tokens


def _number(value: int) -> Any:
    return ir.Constant(I64, value)


def _whole_steps(b: ir.IRBuilder, count: Any) -> Any:
    return b.and_(count, _number(-STEP))


def _bytes(b: ir.IRBuilder, index: Any, element: int, extra: int = 0) -> Any:
    return b.mul(b.add(index, _number(extra)), _number(element))


def _rows(b: ir.IRBuilder, address: Any, stride: Any, count: int) -> list[Pointer]:
    return [Pointer(b, b.add(address, b.mul(stride, _number(row)))) for row in range(count)]


def _dot(fmt: str, tokens: int) -> Emit:
    size = ELEMENT_BYTES[fmt]

    def emit(b: ir.IRBuilder, row: Any, x: Any, x_stride: Any, n: Any, out: Any, out_stride: Any) -> None:
        weights, inputs, zero = Pointer(b, row), _rows(b, x, x_stride, tokens), Lanes(b, ir.Constant(F32, 0.0))
        sums = [[cgutils.alloca_once(b, zero.splat().type) for _ in range(2)] for _ in range(tokens)]
        tails = [cgutils.alloca_once(b, F32) for _ in range(tokens)]
        for t in range(tokens):
            b.store(zero.value, tails[t])
            for slot in sums[t]:
                b.store(zero.splat().value, slot)

        def accumulate(slot: Any, weight: Lanes, value: Lanes) -> None:
            b.store(weight.times_plus(value, Lanes(b, b.load(slot))).value, slot)

        main = _whole_steps(b, n)
        with loop(b, _number(0), main, STEP) as i:
            for half in range(2):
                weight = weights.weights(_bytes(b, i, size, half * LANES), fmt, LANES)
                for t in range(tokens):
                    accumulate(sums[t][half], weight, inputs[t].load(_bytes(b, i, 4, half * LANES), F32, LANES))
        with loop(b, main, n, 1) as i:
            weight = weights.weights(_bytes(b, i, size), fmt)
            for t in range(tokens):
                accumulate(tails[t], weight, inputs[t].load(_bytes(b, i, 4), F32))
        for t, result in enumerate(_rows(b, out, out_stride, tokens)):
            low, high = (Lanes(b, b.load(slot)) for slot in sums[t])
            result.store(0, (low + high).total() + Lanes(b, b.load(tails[t])))

    return emit


def _add_scaled(fmt: str, tokens: int) -> Emit:
    size = ELEMENT_BYTES[fmt]

    def emit(b: ir.IRBuilder, row: Any, n: Any, factors: Any, sums: Any, stride: Any) -> None:
        weights, outputs, scales = Pointer(b, row), _rows(b, sums, stride, tokens), Pointer(b, factors)
        factor = [scales.load(4 * t, F32) for t in range(tokens)]
        wide = [f.splat() for f in factor]
        main = _whole_steps(b, n)
        with loop(b, _number(0), main, STEP) as i:
            for half in range(2):
                weight = weights.weights(_bytes(b, i, size, half * LANES), fmt, LANES)
                where = _bytes(b, i, 4, half * LANES)
                for t in range(tokens):
                    outputs[t].store(where, weight.times_plus(wide[t], outputs[t].load(where, F32, LANES)))
        with loop(b, main, n, 1) as i:
            weight = weights.weights(_bytes(b, i, size), fmt)
            where = _bytes(b, i, 4)
            for t in range(tokens):
                outputs[t].store(where, weight.times_plus(factor[t], outputs[t].load(where, F32)))

    return emit


def _convert_plain(fmt: str) -> Emit:
    size = ELEMENT_BYTES[fmt]

    def emit(b: ir.IRBuilder, row: Any, n: Any, out: Any) -> None:
        weights, output = Pointer(b, row), Pointer(b, out)
        main = _whole_steps(b, n)
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


_DOTS = _choice("dot", 6, {variant(CODES[fmt], t): _dot(fmt, t) for fmt in PLAIN for t in range(1, MOST_TOKENS + 1)})
_SCALED = _choice("add_scaled", 5, {variant(CODES[fmt], t): _add_scaled(fmt, t) for fmt in PLAIN for t in range(1, MOST_TOKENS + 1)})
_CONVERSIONS = {CODES[fmt]: _convert_plain(fmt) for fmt in PLAIN} | {CODES[fmt]: _convert_blocks(fmt) for fmt in BLOCKS}
_CONVERT = _choice("convert", 3, _CONVERSIONS)


@intrinsic  # type: ignore[misc]
def dot(typingctx: Any, which: Any, row: Any, x: Any, x_stride: Any, n: Any, out: Any, out_stride: Any) -> Any:
    """out[t] = row . x[t] over n elements."""
    return _DOTS


@intrinsic  # type: ignore[misc]
def add_scaled(typingctx: Any, which: Any, row: Any, n: Any, factors: Any, sums: Any, stride: Any) -> Any:
    """sums[t] += factors[t] * row over n elements."""
    return _SCALED


@intrinsic  # type: ignore[misc]
def convert(typingctx: Any, code: Any, row: Any, n: Any, out: Any) -> Any:
    """out[:n] = row as float32."""
    return _CONVERT
