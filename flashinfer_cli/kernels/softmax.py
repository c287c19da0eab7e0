"""exp, and with it softmax, in LLVM's own words: 16 lanes whatever the machine, so the bits do not hang on a compiler.

exp(x) = 2^n exp(r) with n the whole number nearest to x / ln 2 and a polynomial of degree seven for exp(r), as in
Cephes: within 2 units in the last place.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from .lanes import F32, I32, LANES, Lanes, Pointer
from .loops import bytes_of, loop, number, zeros
from .variants import choice

MAGIC = 1.5 * 2**23  # added to a small float it leaves the nearest whole number in the last bits
LEAST = -87.0  # exp of less is taken for this one: some 1e-38
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
TERMS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def _pick(b: ir.IRBuilder, sign: str, left: Lanes, right: Lanes) -> Lanes:
    """The larger (">") or smaller of two, `left` only where the comparison holds."""
    return Lanes(b, b.select(b.fcmp_ordered(sign, left.value, right.value), left.value, right.value))


def exp(b: ir.IRBuilder, x: Lanes) -> Lanes:
    """x not above 88; NaN stays NaN."""
    floor = Lanes(b, ir.Constant(F32, LEAST)).splat(x.count)
    x = Lanes(b, b.select(b.fcmp_ordered("<", x.value, floor.value), floor.value, x.value))
    shifted = x * (1 / math.log(2)) + MAGIC
    n = shifted + -MAGIC
    r = n.times_plus(Lanes(b, n._same(-LN2_HIGH)), x)
    r = n.times_plus(Lanes(b, n._same(-LN2_LOW)), r)
    p = Lanes(b, r._same(TERMS[0]))
    for term in TERMS[1:]:
        p = p.times_plus(r, Lanes(b, r._same(term)))
    y = (p * r).times_plus(r, r) + 1.0
    power = ((shifted.as_bits(I32) << 23) + 0x3F800000).as_bits(F32)
    return y * power


def _softmax(b: ir.IRBuilder, scores: Any, n: Any, scale: Any, total: Any) -> None:
    row = Pointer(b, scores)
    factor = Lanes(b, b.bitcast(b.trunc(scale, I32), F32)).splat(LANES)
    most = cgutils.alloca_once(b, factor.type)
    b.store(factor._same(float("-inf")), most)
    with loop(b, number(0), n, LANES) as i:
        b.store(_pick(b, ">", row.load(bytes_of(b, i, 4), F32, LANES), Lanes(b, b.load(most))).value, most)
    top = Lanes(b, b.load(most))
    while top.count > 1:
        half = top.count // 2
        top = _pick(b, ">", top.lanes(range(half)), top.lanes(range(half, 2 * half)))
    top = (Lanes(b, b.extract_element(top.value, ir.Constant(I32, 0))) * -1.0).splat(LANES)
    sums = zeros(b, 1, LANES)[0]
    with loop(b, number(0), n, LANES) as i:
        value = exp(b, (row.load(bytes_of(b, i, 4), F32, LANES) + top) * factor)
        row.store(bytes_of(b, i, 4), value)
        b.store((Lanes(b, b.load(sums)) + value).value, sums)
    Pointer(b, total).store(0, Lanes(b, b.load(sums)).total())


_SOFTMAX = choice("softmax", 4, {0: _softmax})


@intrinsic
def exponentials(typingctx: Any, which: Any, scores: Any, n: Any, scale: Any, total: Any) -> Any:
    """scores[i] = exp(scale * (scores[i] - their largest)) for n float32, a multiple of 16; total[0] is their sum.
    `which` is 0, `scale` the bits of a float32 above zero."""
    return _SOFTMAX
