"""Vectors of 16 in LLVM's own words, for loops whose order of sums has to be known.

Left to itself, a compiler vectorises the loop for one token and the loop for eight differently, and their sums differ
in the last bits. Here every vector operation is written out: 16 lanes, whatever the machine's registers hold (LLVM
splits or joins them), multiply-adds in a fixed order. Used while Numba compiles (`loops`, `codecs` and what is made of
them); nothing here runs afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

LANES = 16
I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
ELEMENT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@cache
def converts_half() -> bool:
    """Whether this processor turns float16 into float32 by itself; without it LLVM calls a library function a value."""
    if llvm.get_default_triple().startswith(("aarch64", "arm64")):
        return True
    return bool(llvm.get_host_cpu_features().get("f16c"))


@cache
def has_avx512() -> bool:
    """Whether this processor has 32 registers of 16 floats, and picks any lanes of one by the lanes of another."""
    return bool(llvm.get_host_cpu_features().get("avx512f"))


class Lanes:
    """A value of LLVM, scalar or vector, with Python's operators; an int or float operand becomes a constant of its
    type.

    Shifts to the right are logical. Integers convert to float32 as unsigned (`to_float`) or signed (`to_float_signed`).
    """

    def __init__(self, builder: ir.IRBuilder, value: Any) -> None:
        self.builder, self.value = builder, value

    @property
    def type(self) -> Any:
        return self.value.type

    @property
    def count(self) -> int:
        return int(self.type.count) if isinstance(self.type, ir.VectorType) else 1

    def _same(self, other: Lanes | float) -> Any:
        if not isinstance(other, Lanes):
            vector = isinstance(self.type, ir.VectorType)
            return ir.Constant(self.type, [other] * self.count if vector else other)
        if self.count > 1 and other.count == 1:
            return other.splat(self.count).value
        return other.value

    def _of(self, value: Any) -> Lanes:
        return Lanes(self.builder, value)

    def __and__(self, other: Lanes | int) -> Lanes:
        return self._of(self.builder.and_(self.value, self._same(other)))

    def __or__(self, other: Lanes | int) -> Lanes:
        return self._of(self.builder.or_(self.value, self._same(other)))

    def __lshift__(self, other: Lanes | int) -> Lanes:
        return self if other == 0 else self._of(self.builder.shl(self.value, self._same(other)))

    def __rshift__(self, other: Lanes | int) -> Lanes:
        return self if other == 0 else self._of(self.builder.lshr(self.value, self._same(other)))

    def __add__(self, other: Lanes | float) -> Lanes:
        add = self.builder.add if self.is_integer else self.builder.fadd
        return self._of(add(self.value, self._same(other)))

    def __mul__(self, other: Lanes | float) -> Lanes:
        multiply = self.builder.mul if self.is_integer else self.builder.fmul
        return self._of(multiply(self.value, self._same(other)))

    @property
    def is_integer(self) -> bool:
        return isinstance(getattr(self.type, "element", self.type), ir.IntType)

    def _shaped(self, element: Any) -> Any:
        return ir.VectorType(element, self.count) if isinstance(self.type, ir.VectorType) else element

    def widen(self, element: Any) -> Lanes:
        """Zero-extended to a larger integer type."""
        return self._of(self.builder.zext(self.value, self._shaped(element)))

    def to_float(self) -> Lanes:
        # through i32: a conversion from unsigned bytes or shorts is then one from non-negative signed ones, which is
        # cheap
        return self._of(self.builder.sitofp(self.widen(I32).value, self._shaped(F32)))

    def to_float_signed(self) -> Lanes:
        wide = self.value if self.type == self._shaped(I32) else self.builder.sext(self.value, self._shaped(I32))
        return self._of(self.builder.sitofp(wide, self._shaped(F32)))

    def as_bits(self, element: Any) -> Lanes:
        return self._of(self.builder.bitcast(self.value, self._shaped(element)))

    def splat(self, count: int = LANES) -> Lanes:
        vector = ir.VectorType(self.type, count)
        one = self.builder.insert_element(ir.Constant(vector, ir.Undefined), self.value, ir.Constant(I32, 0))
        zeros = ir.Constant(ir.VectorType(I32, count), [0] * count)
        return self._of(self.builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros))

    def lanes(self, chosen: Sequence[int]) -> Lanes:
        """The vector made of the given lanes."""
        mask = ir.Constant(ir.VectorType(I32, len(chosen)), list(chosen))
        return self._of(self.builder.shuffle_vector(self.value, ir.Constant(self.type, ir.Undefined), mask))

    def times_plus(self, factor: Lanes, addend: Lanes) -> Lanes:
        """self * factor + addend, rounded once where the processor can."""
        name = f"llvm.fmuladd.v{self.count}f32" if self.count > 1 else "llvm.fmuladd.f32"
        module = self.builder.module
        function = module.globals.get(name)
        if function is None:
            function = ir.Function(module, ir.FunctionType(self.type, [self.type] * 3), name)
        operands = [self.value, self._same(factor), self._same(addend)]
        return self._of(self.builder.call(function, operands))

    def total(self) -> Lanes:
        """The sum over all lanes, halves first: a fixed tree."""
        value = self
        while value.count > 1:
            half = value.count // 2
            value = value.lanes(range(half)) + value.lanes(range(half, 2 * half))
        return self._of(self.builder.extract_element(value.value, ir.Constant(I32, 0)))

    def chosen_from(self, scale: Lanes, least: Lanes) -> Lanes:
        """scale * q + least for the low four bits q of each of 16 32-bit lanes.

        Where the processor can, taken from the 16 values there are: three instructions less a vector, the same bits.
        """
        if not has_avx512():
            return (self & 15).to_float().times_plus(scale, least)
        table = Lanes(self.builder, ir.Constant(self._shaped(F32), [float(q) for q in range(LANES)]))
        name, module = "llvm.x86.avx512.permvar.sf.512", self.builder.module
        function = module.globals.get(name)
        if function is None:
            function = ir.Function(module, ir.FunctionType(table.type, [table.type, self.type]), name)
        return self._of(self.builder.call(function, [table.times_plus(scale, least).value, self.value]))

    def choose(self, table: Sequence[int]) -> Lanes:
        """table[self] for bytes below 16, by a tree of selections: no gather, no processor's own shuffle."""
        candidates = [ir.Constant(self.type, [entry % 256] * self.count) for entry in table]
        for bit in range(4):
            test = (self & (1 << bit)).value
            odd = self.builder.icmp_unsigned("!=", test, ir.Constant(self.type, [0] * self.count))
            pairs = zip(candidates[0::2], candidates[1::2], strict=True)
            candidates = [self.builder.select(odd, high, low) for low, high in pairs]
        return self._of(candidates[0])


class Pointer:
    """An address; `load` and `store` take byte offsets, and any alignment."""

    def __init__(self, builder: ir.IRBuilder, address: Any) -> None:
        self.builder = builder
        self.base = builder.inttoptr(address, I8.as_pointer())

    def _at(self, offset: Any, kind: Any) -> Any:
        index = ir.Constant(I64, offset) if isinstance(offset, int) else offset
        return self.builder.bitcast(self.builder.gep(self.base, [index], source_etype=I8), kind.as_pointer())

    def load(self, offset: Any, element: Any, count: int = 1) -> Lanes:
        kind = ir.VectorType(element, count) if count > 1 else element
        return Lanes(self.builder, self.builder.load(self._at(offset, kind), align=1, typ=kind))

    def store(self, offset: Any, value: Lanes) -> None:
        self.builder.store(value.value, self._at(offset, value.type), align=1)

    def store_half(self, offset: Any, value: Lanes) -> None:
        """A float32 as the nearest float16, of two the even one; what is larger than any becomes infinite."""
        b = self.builder
        if converts_half():
            self.store(offset, Lanes(b, b.bitcast(b.fptrunc(value.value, value._shaped(F16)), value._shaped(I16))))
            return
        bits = value.as_bits(I32)
        sign, magnitude = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
        # Adding a half leaves the last bits as those of a subnormal float16; an odd last bit rounds up at the middle.
        small = (magnitude.as_bits(F32) + 0.5).as_bits(I32) + -0x3F000000
        normal = (magnitude + (((magnitude >> 13) & 1) + (0xFFF - (112 << 23)))) >> 13
        below, above = (
            b.icmp_unsigned(test, magnitude.value, magnitude._same(edge))
            for test, edge in (("<", 113 << 23), (">=", 143 << 23))
        )
        is_nan = b.icmp_unsigned(">", magnitude.value, magnitude._same(0x7F800000))
        special = b.select(is_nan, magnitude._same(0x7E00), magnitude._same(0x7C00))
        found = b.select(above, special, b.select(below, small.value, normal.value))
        self.store(offset, Lanes(b, b.trunc((Lanes(b, found) | sign).value, value._shaped(I16))))

    def prefetch(self, offset: Any) -> None:
        """Ask for the cache line there; an address that is nobody's does no harm."""
        kind, module = I8.as_pointer(), self.builder.module
        function = module.globals.get("llvm.prefetch.p0")
        if function is None:
            function = ir.Function(module, ir.FunctionType(ir.VoidType(), [kind, I32, I32, I32]), "llvm.prefetch.p0")
        # to read, into the second-level cache, data: the first one is for the activations
        hints = [ir.Constant(I32, hint) for hint in (0, 2, 1)]
        self.builder.call(function, [self._at(offset, I8), *hints])

    def half(self, offset: Any, count: int = 1) -> Lanes:
        """float16 values as float32."""
        bits = self.load(offset, I16, count)
        if converts_half():
            half = self.builder.bitcast(bits.value, bits._shaped(F16))
            return Lanes(self.builder, self.builder.fpext(half, bits._shaped(F32)))
        wide = bits.widen(I32)
        magnitude = (
            wide & 0x7FFF
        ) << 13  # the exponent is now 112 too small: a multiplication puts it right, subnormals too
        scaled = (magnitude.as_bits(F32) * 2.0**112).as_bits(I32)
        threshold = magnitude._same(0x7C00 << 13)
        special = self.builder.icmp_unsigned(
            ">=", magnitude.value, threshold
        )  # infinities and NaN keep the largest exponent
        fixed = self.builder.select(special, (scaled | 0x7F800000).value, scaled.value)
        return (Lanes(self.builder, fixed) | ((wide & 0x8000) << 16)).as_bits(F32)

    def scale(self, offset: Any) -> Lanes:
        """The float16 value there, in all lanes; two more bytes are read. A load of one alone becomes an insertion into
        what a register held, and each block's values then wait for those of the block before."""
        return self.half(offset, 2).lanes([0] * LANES)

    def weights(self, offset: Any, fmt: str, count: int = 1) -> Lanes:
        """`count` elements of a plain format as float32."""
        if fmt == "F32":
            return self.load(offset, F32, count)
        if fmt == "F16":
            return self.half(offset, count)
        return (self.load(offset, I16, count).widen(I32) << 16).as_bits(F32)
