"""The compiled arithmetic of one thread: products of activations with some rows of a weight, and with some neurons."""

from __future__ import annotations

import math
from typing import Any

from numba import float32, njit

from .conversions import convert
from .dots import MOST_ROWS, MOST_TOKENS, WIDE_TOKENS, dot, variant
from .jobs import (
    BLOCK_COLS,
    BLOCK_TOKENS,
    CODES,
    DIRECT_BLOCKS,
    DIRECT_NEURONS,
    DIRECT_TOKENS,
    GATED,
    MANY_TOKENS,
    PADDING,
)
from .memory import load_float, load_int, store_float
from .mixes import mix
from .tiles import TILE_ROWS, TILE_TOKENS, VECTOR, tile, tile_variant

F32 = CODES["F32"]
BLOCKS_FROM = CODES["BF16"] + 1  # formats from this code on come in blocks
CONVERTED_FROM = BLOCKS_FROM + len(DIRECT_BLOCKS)  # and from this code on there is nothing but their conversion
# Up to DIRECT_TOKENS tokens, rows go straight from memory into the products: plain ones one after the other, since what
# limits them is memory, and one sequential stream is the fastest; blocks several side by side, since what limits them
# is the chain of additions. With more tokens, rows of 16 bits go into wide tiles where there are such; all others are
# converted once, and several stand side by side.

compiled = njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
choose = compiled(variant)
choose_tile = compiled(tile_variant)


@compiled
def _activate(act: Any, v: Any) -> Any:
    if act == 0:
        return float32(0.0) if v < 0 else v
    if act == 1:
        return float32(0.0) if v < 0 else v * v
    if act == 2:
        return float32(v / (1.0 + math.exp(-v)))
    if act == 3:
        return float32(0.5 * v * (1.0 + math.erf(v * 0.7071067811865476)))
    if act == 4:
        return float32(0.5 * v * (1.0 + math.tanh(0.7978845608028654 * (v + 0.044715 * v * v * v))))
    return float32(v / (1.0 + math.exp(-1.702 * v)))


@compiled
def tile_of(left: Any) -> Any:
    """Tokens to handle together, out of those left: 4 as 2 + 2."""
    return 2 if left == 4 else min(left, MOST_TOKENS)


@compiled
def dots(
    code: Any, row: Any, pitch: Any, rows: Any, x: Any, tokens: Any, n: Any, out: Any, stride: Any, most: Any
) -> None:
    """out[t, r] = row[r] . x[t], `most` rows side by side; x is contiguous, out has `stride` bytes from token to token.

    Tokens outside, rows inside: with many tokens, the rows are to be few enough for the second-level cache.
    """
    t = 0
    while t < tokens:
        some = tile_of(tokens - t)
        r = 0
        while r < rows:
            few = min(rows - r, most)
            dot(
                choose(code, few, some),
                row + r * pitch,
                pitch,
                x + 4 * n * t,
                4 * n,
                n,
                out + stride * t + 4 * r,
                stride,
            )
            r += few
        t += some


@compiled
def _wide_dots(
    code: Any, row: Any, pitch: Any, rows: Any, x: Any, tokens: Any, n: Any, out: Any, stride: Any, group: Any
) -> None:
    """`dots` of 16-bit rows and many tokens: a group of rows stays in the second-level cache while all tokens, a tile
    after the other, go through it."""
    whole = rows // MOST_ROWS * MOST_ROWS
    for first in range(0, whole, group):
        stop = min(first + group, whole)
        t = 0
        while t < tokens:
            tiles = (tokens - t + WIDE_TOKENS - 1) // WIDE_TOKENS
            some = (tokens - t + tiles - 1) // tiles
            for r in range(first, stop, MOST_ROWS):
                dot(
                    choose(code, MOST_ROWS, some),
                    row + r * pitch,
                    pitch,
                    x + 4 * n * t,
                    4 * n,
                    n,
                    out + stride * t + 4 * r,
                    stride,
                )
            t += some
    if whole < rows:
        dots(code, row + whole * pitch, pitch, rows - whole, x, tokens, n, out + 4 * whole, stride, MOST_ROWS)


@compiled
def converted(code: Any, row: Any, pitch: Any, rows: Any, n: Any, out: Any, stride: Any) -> None:
    """out[r] = row[r] as float32, `stride` bytes apart."""
    for r in range(rows):
        convert(code, row + r * pitch, n, out + r * stride)


@compiled
def _blocked(
    code: Any,
    rows: Any,
    cols: Any,
    weight: Any,
    width: Any,
    x: Any,
    tokens: Any,
    out: Any,
    stride: Any,
    scratch: Any,
    group: Any,
) -> None:
    """out[t, r] = row[r] . x[t] for many tokens: `group` rows, BLOCK_TOKENS tokens and BLOCK_COLS columns at a time.

    scratch: float32 rows [group, BLOCK_COLS] with PADDING bytes between, then partial sums [BLOCK_TOKENS, group, 16].
    """
    pitch = 4 * BLOCK_COLS + PADDING
    lanes, line = scratch + group * pitch, VECTOR * group
    for first in range(0, rows, group):
        some = min(group, rows - first)
        for begin in range(0, tokens, BLOCK_TOKENS):
            end = min(begin + BLOCK_TOKENS, tokens)
            for k in range(0, cols, BLOCK_COLS):
                n = min(BLOCK_COLS, cols - k)
                place = (1 if k == 0 else 0) + (2 if k + n == cols else 0)
                converted(code, weight + first * width + k * width // cols, width, some, n, scratch, pitch)
                r = 0
                while r < some:
                    few = TILE_ROWS if some - r >= TILE_ROWS else 1
                    t = begin
                    while t < end:
                        left = end - t
                        many = TILE_TOKENS if left >= TILE_TOKENS else 3 if left >= 3 else 1
                        tile(
                            choose_tile(few, many),
                            scratch + r * pitch,
                            pitch,
                            x + 4 * (cols * t + k),
                            4 * cols,
                            n,
                            lanes + line * (t - begin) + VECTOR * r,
                            line,
                            out + stride * t + 4 * (first + r),
                            stride,
                            place,
                        )
                        t += many
                    r += few


@compiled
def linear(
    code: Any,
    rows: Any,
    cols: Any,
    weight: Any,
    width: Any,
    x: Any,
    tokens: Any,
    out: Any,
    stride: Any,
    scratch: Any,
    group: Any,
) -> None:
    if code < CONVERTED_FROM and tokens <= DIRECT_TOKENS:
        dots(code, weight, width, rows, x, tokens, cols, out, stride, 1 if code < BLOCKS_FROM else MOST_ROWS)
        return
    if tokens >= MANY_TOKENS:
        _blocked(code, rows, cols, weight, width, x, tokens, out, stride, scratch, group)
        return
    if code == F32:
        dots(code, weight, width, rows, x, tokens, cols, out, stride, MOST_ROWS)
        return
    if WIDE_TOKENS > 0 and code < BLOCKS_FROM:
        _wide_dots(code, weight, width, rows, x, tokens, cols, out, stride, 2 * group // MOST_ROWS * MOST_ROWS)
        return
    for first in range(0, rows, group):
        some = min(group, rows - first)
        converted(code, weight + first * width, width, some, cols, scratch, 4 * cols)
        dots(F32, scratch, 4 * cols, some, x, tokens, cols, out + 4 * first, stride, MOST_ROWS)


@compiled
def neurons(
    code: Any,
    rows: Any,
    d: Any,
    records: Any,
    width: Any,
    part: Any,
    x: Any,
    tokens: Any,
    sums: Any,
    act: Any,
    gate_bias: Any,
    up_bias: Any,
    scratch: Any,
    group: Any,
    listed: Any,
) -> None:
    """sums[t] = the contributions of `rows` neurons, added one after the other, `group` of them worked on together.

    `listed`: records is not their address but that of a list of their addresses.
    """
    direct = tokens <= DIRECT_TOKENS and code < CONVERTED_FROM
    plain = direct and code < BLOCKS_FROM
    gated = act >= GATED
    padded = 4 * d + PADDING
    line = 4 * group
    gate = scratch + padded * group
    up = gate + line * tokens
    most = 1 if plain else MOST_ROWS
    for i in range(tokens * d):
        store_float(sums + 4 * i, float32(0.0))
    for first in range(0, rows, group):
        some = min(group, rows - first)
        row, pitch = records + first * width, width
        if listed:  # where the next one stands is all that the distance is for: it is fetched ahead
            row = load_int(records + 8 * first)
            pitch = load_int(records + 8 * (first + 1)) - row if first + 1 < rows else width
        for role in range(0 if gated else 1, 3):
            if direct:
                source, apart, kind = row, pitch, code
            else:
                converted(code, row, width, some, d, scratch, padded)
                source, apart, kind = scratch, padded, F32
            row += part
            if role == 0:
                dots(kind, source, apart, some, x, tokens, d, gate, line, most)
                continue
            if role == 1:
                dots(kind, source, apart, some, x, tokens, d, up, line, most)
                _activate_all(act, gate, up, tokens, some, line, gate_bias, up_bias, first)
                continue
            step = DIRECT_NEURONS if direct and not plain and some == DIRECT_NEURONS else 1 if direct else some
            for r in range(0, some, step):
                t = 0
                while t < tokens:
                    few = tile_of(tokens - t)
                    mix(
                        choose(kind, step if direct else min(some, 2), few),
                        source + r * apart,
                        apart,
                        some,
                        d,
                        up + line * t + 4 * r,
                        line,
                        sums + 4 * d * t,
                        4 * d,
                    )
                    t += few


@compiled
def _activate_all(
    act: Any, gate: Any, up: Any, tokens: Any, rows: Any, line: Any, gate_bias: Any, up_bias: Any, first: Any
) -> None:
    """up = act(gate + gate bias) * (up + up bias), or act(up + up bias); biases from neuron `first` on."""
    for t in range(tokens):
        for r in range(rows):
            at = line * t + 4 * r
            value = load_float(up + at)
            if up_bias:
                value += load_float(up_bias + 4 * (first + r))
            if act >= GATED:
                other = load_float(gate + at)
                if gate_bias:
                    other += load_float(gate_bias + 4 * (first + r))
                value *= _activate(act - GATED, other)
            else:
                value = _activate(act, value)
            store_float(up + at, value)
