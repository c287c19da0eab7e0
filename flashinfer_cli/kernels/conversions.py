"""Rows of any stored format as float32, as a Numba intrinsic on addresses; the variant is the format's code."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.extending import intrinsic

from ..checkpoint.base import FORMATS, PLAIN
from .codecs import DECODERS
from .jobs import BLOCKS, CODES
from .lanes import ELEMENT_BYTES, LANES, Pointer
from .loops import bytes_of, loop, number, whole
from .variants import Emit, choice


def _convert_plain(fmt: str) -> Emit:
    size = ELEMENT_BYTES[fmt]

    def emit(b: ir.IRBuilder, row: Any, n: Any, out: Any) -> None:
        weights, output = Pointer(b, row), Pointer(b, out)
        main = whole(b, n, LANES)
        for start, stop, step in ((number(0), main, LANES), (main, n, 1)):
            with loop(b, start, stop, step) as i:
                output.store(bytes_of(b, i, 4), weights.weights(bytes_of(b, i, size), fmt, step))

    return emit


def _convert_blocks(fmt: str) -> Emit:
    elements, size = FORMATS[fmt]

    def emit(b: ir.IRBuilder, row: Any, n: Any, out: Any) -> None:
        with loop(b, number(0), b.sdiv(n, number(elements)), 1) as i:
            source, target = (
                Pointer(b, b.add(base, b.mul(i, number(each)))) for base, each in ((row, size), (out, 4 * elements))
            )
            for vector, value in enumerate(DECODERS[fmt](source)):
                target.store(4 * LANES * vector, value)

    return emit


_PLAIN = {CODES[fmt]: _convert_plain(fmt) for fmt in PLAIN}
_CONVERT = choice("convert", 3, _PLAIN | {CODES[fmt]: _convert_blocks(fmt) for fmt in BLOCKS})


@intrinsic
def convert(typingctx: Any, code: Any, row: Any, n: Any, out: Any) -> Any:
    """out[:n] = row as float32."""
    return _CONVERT
