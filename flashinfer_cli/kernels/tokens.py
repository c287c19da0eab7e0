"""What one token needs beside products, compiled: norms, rotated heads, attention over the cache, ids above zero.

Each of these is little work, which torch does in several operators of some microseconds and one thread each; sixty
layers' worth of them take longer than reading the layers' weights. Sums have one order, as in `dots`.
"""

from __future__ import annotations

import math
from typing import Any

from numba import float32

from .dots import MOST_ROWS
from .jobs import CODES, DIRECT_NEURONS
from .memory import load_float, load_half, store_byte, store_float, store_half, store_int
from .mixes import mix
from .products import F32, choose, compiled, dots, tile_of
from .softmax import exponentials

NONE = float32(-math.inf)
F16, Q8_0 = CODES["F16"], CODES["Q8_0"]
LARGEST_HALF = float32(65504.0)
TO_WHOLE = float32(1.5 * 2**23)  # added and taken away again, it leaves the nearest whole number, of two the even one


@compiled
def norm_rows(rows: Any, n: Any, x: Any, weight: Any, eps: Any, out: Any, scratch: Any) -> None:
    """out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight, weight an address or 0; scratch: one float."""
    for r in range(rows):
        source, target = x + 4 * n * r, out + 4 * n * r
        dots(F32, source, 4 * n, 1, source, 1, n, scratch, 4, 1)
        inverse = float32(1.0) / math.sqrt(load_float(scratch) / float32(n) + eps)
        if weight:
            for i in range(n):
                store_float(target + 4 * i, load_float(source + 4 * i) * inverse * load_float(weight + 4 * i))
        else:
            for i in range(n):
                store_float(target + 4 * i, load_float(source + 4 * i) * inverse)


@compiled
def layer_norm_rows(rows: Any, n: Any, x: Any, weight: Any, bias: Any, eps: Any, out: Any) -> None:
    """out[r] = (x[r] - mean) / sqrt(variance + eps) * weight + bias, these addresses or 0; sums in float64."""
    for r in range(rows):
        source, target = x + 4 * n * r, out + 4 * n * r
        total = 0.0
        for i in range(n):
            total += load_float(source + 4 * i)
        mean, total = total / n, 0.0
        for i in range(n):
            off = load_float(source + 4 * i) - mean
            total += off * off
        inverse = 1.0 / math.sqrt(total / n + eps)
        for i in range(n):
            value = float32((load_float(source + 4 * i) - mean) * inverse)
            if weight:
                value *= load_float(weight + 4 * i)
            if bias:
                value += load_float(bias + 4 * i)
            store_float(target + 4 * i, value)


@compiled
def kept_bytes(kept: Any, n: Any) -> Any:
    """Of n elements of keys or values in a format of `kept`: F32, F16 or Q8_0."""
    return 4 * n if kept == F32 else 2 * n if kept == F16 else n // 32 * 34


@compiled
def _clipped(value: Any, most: Any) -> Any:
    return min(max(value, -most), most) if value == value else value  # NaN stays


@compiled
def keep(kept: Any, source: Any, n: Any, target: Any) -> None:
    """n floats at `target`, in the format that keys and values are kept in; as `kept.keep` does."""
    if kept == F32:
        for i in range(n):
            store_float(target + 4 * i, load_float(source + 4 * i))
    elif kept == F16:
        for i in range(n):
            store_half(target + 2 * i, _clipped(load_float(source + 4 * i), LARGEST_HALF))
    else:
        for block in range(n // 32):
            values, into, most = source + 128 * block, target + 34 * block, float32(0.0)
            for i in range(32):
                value = abs(load_float(values + 4 * i))
                if value > most or value != value:
                    most = value
            store_half(into, _clipped(most / float32(127.0), LARGEST_HALF))
            scale = load_half(into)
            inverse = float32(0.0) if scale == float32(0.0) else float32(1.0) / scale
            for i in range(32):
                level = _clipped(load_float(values + 4 * i) * inverse, float32(127.0))
                whole = (level + TO_WHOLE) - TO_WHOLE
                store_byte(into + 2 + i, int(whole) if whole == whole else 0)


@compiled
def rotate_heads(
    first: Any,
    rows: Any,
    heads: Any,
    kv_heads: Any,
    hd: Any,
    q: Any,
    k: Any,
    v: Any,
    keys: Any,
    values: Any,
    head_bytes: Any,
    cos: Any,
    sin: Any,
    turned: Any,
    interleaved: Any,
    kept: Any,
) -> None:
    """Of the heads of q, k and v, one after the other: q's and k's are turned where they stand, then k's go to `keys`
    and v's to `values`, in the format `kept`. The first `turned` of hd dimensions turn (`layers.rope`); the caches'
    heads stand head_bytes apart."""
    half = turned // 2
    for head in range(first, first + rows):
        if head < heads:
            source, target, turn = q + 4 * hd * head, 0, half
        elif head < heads + kv_heads:
            source = k + 4 * hd * (head - heads)
            target, turn = keys + head_bytes * (head - heads), half
        else:
            source = v + 4 * hd * (head - heads - kv_heads)
            target, turn = values + head_bytes * (head - heads - kv_heads), 0
        for j in range(turn):
            one = 8 * j if interleaved else 4 * j
            other = one + 4 if interleaved else 4 * (j + half)
            a, b = load_float(source + one), load_float(source + other)
            c, s = load_float(cos + 4 * j), load_float(sin + 4 * j)
            store_float(source + one, a * c - b * s)
            store_float(source + other, b * c + a * s)
        if target:
            keep(kept, source, hd, target)


@compiled
def attend_heads(
    first: Any,
    rows: Any,
    group: Any,
    hd: Any,
    q: Any,
    keys: Any,
    values: Any,
    head_bytes: Any,
    length: Any,
    window: Any,
    scale: Any,
    out: Any,
    scratch: Any,
    line: Any,
    kept: Any,
) -> None:
    """out[h] = softmax(scale q[h] . keys) values over `length` places, the last `window` of them where that is not 0.

    Heads [first, first + rows) of q and out, float32 [.., hd]; `group` of them share a head of keys and values, which
    are in the format `kept` and stand head_bytes apart. scratch: `line` bytes a head, for 16 floats more than
    positions.
    """
    pitch = kept_bytes(kept, hd)
    low = max(0, length - window) if window else 0
    count = length - low
    padded = (count + 15) // 16 * 16
    done = 0
    while done < rows:
        head = first + done
        shared = head // group
        some = min(rows - done, (shared + 1) * group - head)
        place = shared * head_bytes + pitch * low
        dots(kept, keys + place, pitch, count, q + 4 * hd * head, some, hd, scratch, line, MOST_ROWS)
        for t in range(some):
            scores, into = scratch + line * t, out + 4 * hd * (head + t)
            for i in range(count, padded):
                store_float(scores + 4 * i, NONE)
            exponentials(0, scores, padded, scale, scores + 4 * padded)
            for i in range(hd):
                store_float(into + 4 * i, float32(0.0))
        t = 0
        while t < some:
            few = tile_of(some - t)
            into = out + 4 * hd * (head + t)
            if kept == Q8_0:
                whole = count // DIRECT_NEURONS * DIRECT_NEURONS
                for i in range(0, whole, DIRECT_NEURONS):
                    factors = scratch + line * t + 4 * i
                    wide = choose(kept, DIRECT_NEURONS, few)
                    mix(wide, values + place + pitch * i, pitch, DIRECT_NEURONS, hd, factors, line, into, 4 * hd)
                for i in range(whole, count):
                    factors = scratch + line * t + 4 * i
                    mix(choose(kept, 1, few), values + place + pitch * i, pitch, 1, hd, factors, line, into, 4 * hd)
            else:
                mix(choose(kept, 2, few), values + place, pitch, count, hd, scratch + line * t, line, into, 4 * hd)
            for one in range(few):
                inverse = float32(1.0) / load_float(scratch + line * (t + one) + 4 * padded)
                for i in range(hd):
                    at = into + 4 * (hd * one + i)
                    store_float(at, load_float(at) * inverse)
            t += few
        done += some


@compiled
def above_zero(n: Any, scores: Any, bias: Any, ids: Any) -> Any:
    """Adds its bias to each of n scores; the places of those above zero, ascending, to ids, int64 [n + 1]; their
    number."""
    found = 0
    for i in range(n):
        score = load_float(scores + 4 * i) + load_float(bias + 4 * i)
        store_float(scores + 4 * i, score)
        store_int(ids + 8 * found, i)
        if score > float32(0.0):
            found += 1
    return found
