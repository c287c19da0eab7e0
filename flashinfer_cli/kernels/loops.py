"""What the inner loops are made of: counts and addresses, loops over them, rows side by side, sums in registers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from .lanes import F32, I64, Lanes, Pointer

LINE = 64  # bytes of a cache line
AHEAD = 8192  # bytes to fetch ahead of use, at least: what the processor fetches by itself stops at every 4 KiB


def number(value: int) -> Any:
    return ir.Constant(I64, value)


@contextmanager
def loop(builder: ir.IRBuilder, start: Any, stop: Any, step: int) -> Iterator[Any]:
    """for index in range(start, stop, step), over int64 values; yields the index."""
    before = builder.basic_block
    head, body, end = (builder.append_basic_block(name) for name in ("loop.head", "loop.body", "loop.end"))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(I64)
    index.add_incoming(start, before)
    builder.cbranch(builder.icmp_signed("<", index, stop), body, end)
    builder.position_at_end(body)
    yield index
    index.add_incoming(builder.add(index, ir.Constant(I64, step)), builder.basic_block)
    builder.branch(head)
    builder.position_at_end(end)


def whole(b: ir.IRBuilder, count: Any, step: int) -> Any:
    """The part of `count` that whole steps (a power of two) cover."""
    return b.and_(count, number(-step))


def bytes_of(b: ir.IRBuilder, index: Any, element: int, extra: int = 0) -> Any:
    return b.mul(b.add(index, number(extra)), number(element))


def rows_at(b: ir.IRBuilder, address: Any, stride: Any, count: int) -> list[Pointer]:
    return [Pointer(b, b.add(address, b.mul(stride, number(row)))) for row in range(count)]


def ahead_of(b: ir.IRBuilder, pitch: Any) -> Any:
    """Distance in bytes to the first row that is at least AHEAD away: rows are gone through one after the other.

    One that stands before this one is the next of a list, wherever that is."""
    rows = b.mul(pitch, b.sdiv(b.add(pitch, number(AHEAD - 1)), pitch))
    return b.select(b.icmp_signed("<", pitch, number(0)), pitch, rows)


def prefetch_blocks(b: ir.IRBuilder, blocks: list[Pointer], ahead: Any, size: int) -> None:
    """Ask for all of what stands `ahead` bytes behind each: one line in 65 left out cost an eighth of the rate."""
    for block in blocks:
        for at in range(0, size, LINE):
            block.prefetch(b.add(ahead, number(at)))


def zeros(b: ir.IRBuilder, count: int, lanes: int) -> list[Any]:
    """Sums on the stack, which LLVM turns into registers."""
    zero = Lanes(b, ir.Constant(F32, 0.0))
    start = zero if lanes == 1 else zero.splat(lanes)
    slots = [cgutils.alloca_once(b, start.type) for _ in range(count)]
    for slot in slots:
        b.store(start.value, slot)
    return slots


def accumulate(b: ir.IRBuilder, slot: Any, weight: Lanes, value: Lanes) -> None:
    b.store(weight.times_plus(value, Lanes(b, b.load(slot))).value, slot)
