"""Block formats, decoded to float32: one function a format; GGUF's as ggml-quants.h lays their bytes out, and ours.

Each takes the address of a block and yields its 32, 128 or 256 float32 values in order, 16 at a time, writing LLVM
instructions through `lanes` as it is asked: what uses the first values then stands before what makes the next, and few
registers hold them. The arithmetic is value = scale * q + offset in float32, where q is an unsigned or signed small
integer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from .lanes import F32, I8, I16, I32, LANES, Lanes, Pointer

MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _scaled(q: Lanes, scale: Lanes, offset: Lanes) -> Lanes:
    """scale * q + offset, q being 16 unsigned bytes."""
    return q.to_float().times_plus(scale, offset)


def _scaled_bytes(count: int, source: Pointer) -> Iterator[Lanes]:
    scale = source.scale(0)
    for i in range(0, count, LANES):
        yield source.load(2 + i, I8, LANES).to_float_signed() * scale


def _q4_0(source: Pointer) -> Iterator[Lanes]:
    scale, q = source.scale(0), source.load(2, I8, LANES)
    yield _scaled(q & 15, scale, scale * -8.0)
    yield _scaled(q >> 4, scale, scale * -8.0)


def _q4_1(source: Pointer) -> Iterator[Lanes]:
    both, q = source.half(0, 2), source.load(4, I8, LANES).widen(I32)
    scale, least = both.lanes([0] * LANES), both.lanes([1] * LANES)
    yield q.chosen_from(scale, least)
    yield (q >> 4).chosen_from(scale, least)


def _q4_g64(source: Pointer) -> Iterator[Lanes]:
    both, q = source.half(0, 4), source.load(8, I32, LANES)
    for group in range(2):
        scale, least = both.lanes([2 * group] * LANES), both.lanes([2 * group + 1] * LANES)
        for vector in range(4 * group, 4 * group + 4):
            yield (q >> (4 * vector)).chosen_from(scale, least)


def _fifth_bits(source: Pointer, offset: int, first: int) -> Lanes:
    """Bits first .. first + 15 of a 32-bit word, each as 16 in a byte of its own."""
    two = source.load(offset + first // 8, I8, 2).lanes([0] * 8 + [1] * 8)
    builder = source.builder
    own_bit = Lanes(builder, two.value.type([1 << (lane % 8) for lane in range(LANES)]))
    there = builder.icmp_unsigned("!=", (two & own_bit).value, two.value.type([0] * LANES))
    return Lanes(builder, builder.select(there, two.value.type([16] * LANES), two.value.type([0] * LANES)))


def _q5_0(source: Pointer) -> Iterator[Lanes]:
    scale, q = source.scale(0), source.load(6, I8, LANES)
    yield _scaled((q & 15) | _fifth_bits(source, 2, 0), scale, scale * -16.0)
    yield _scaled((q >> 4) | _fifth_bits(source, 2, 16), scale, scale * -16.0)


def _q5_1(source: Pointer) -> Iterator[Lanes]:
    scale, least, q = source.half(0), source.half(2), source.load(8, I8, LANES)
    yield _scaled((q & 15) | _fifth_bits(source, 4, 0), scale, least)
    yield _scaled((q >> 4) | _fifth_bits(source, 4, 16), scale, least)


def _q2_k(source: Pointer) -> Iterator[Lanes]:
    scale, least = source.half(80), source.half(82) * -1.0
    for group in range(16):  # 16 values that share a scale and a least value, four bits each
        both = source.load(group, I8)
        half, shift, part = group // 8, group % 8 // 2, group % 2
        q = (source.load(16 + 32 * half + 16 * part, I8, LANES) >> (2 * shift)) & 3
        yield _scaled(q, (both & 15).to_float() * scale, (both >> 4).to_float() * least)


def _q3_k(source: Pointer) -> Iterator[Lanes]:
    scale = source.half(108)
    for group in range(16):
        low = (source.load(96 + group % 8, I8) >> (4 * (group // 8))) & 15
        high = (source.load(104 + group % 4, I8) >> (2 * (group // 4))) & 3
        own = ((low | (high << 4)).to_float() + -32.0) * scale
        half, shift, part = group // 8, group % 8 // 2, group % 2
        q = (source.load(32 + 32 * half + 16 * part, I8, LANES) >> (2 * shift)) & 3
        third = (source.load(16 * part, I8, LANES) >> (4 * half + shift)) & 1
        yield _scaled(q | (third << 2), own, own * -4.0)


def _six_bit_pairs(source: Pointer, scales: int, group: int) -> tuple[Lanes, Lanes]:
    """Scale and least value of one of 8 groups, six bits each, packed in 12 bytes."""
    if group < 4:
        return source.load(scales + group, I8) & 63, source.load(scales + group + 4, I8) & 63
    low = source.load(scales + group + 4, I8)
    scale = (low & 15) | ((source.load(scales + group - 4, I8) >> 6) << 4)
    return scale, (low >> 4) | ((source.load(scales + group, I8) >> 6) << 4)


def _q4_k(source: Pointer) -> Iterator[Lanes]:
    scale, least = source.half(0), source.half(2) * -1.0
    for group in range(8):
        own, offset = _six_bit_pairs(source, 4, group)
        factor, shift = own.to_float() * scale, offset.to_float() * least
        for part in range(2):
            q = source.load(16 + 32 * (group // 2) + 16 * part, I8, LANES)
            yield _scaled(q >> 4 if group % 2 else q & 15, factor, shift)


def _q5_k(source: Pointer) -> Iterator[Lanes]:
    scale, least = source.half(0), source.half(2) * -1.0
    for group in range(8):
        own, offset = _six_bit_pairs(source, 4, group)
        factor, shift = own.to_float() * scale, offset.to_float() * least
        for part in range(2):
            q = source.load(48 + 32 * (group // 2) + 16 * part, I8, LANES)
            fifth = (source.load(16 + 16 * part, I8, LANES) >> group) & 1
            q = (q >> 4 if group % 2 else q & 15) | (fifth << 4)
            yield _scaled(q, factor, shift)


def _q6_k(source: Pointer) -> Iterator[Lanes]:
    scale = source.half(208)
    for group in range(16):
        half, quarter, part = group // 8, group % 8 // 2, group % 2
        own = source.load(192 + group, I8).to_float_signed() * scale
        low = source.load(64 * half + 32 * (quarter % 2) + 16 * part, I8, LANES)
        high = (source.load(128 + 32 * half + 16 * part, I8, LANES) >> (2 * quarter)) & 3
        q = (low >> 4 if quarter > 1 else low & 15) | (high << 4)
        yield _scaled(q, own, own * -32.0)


def _iq4_pair(source: Pointer, at: int, scale: Lanes) -> Iterator[Lanes]:
    q = source.load(at, I8, LANES)
    for nibble in (q & 15, q >> 4):
        yield nibble.choose(IQ4_VALUES).to_float_signed() * scale


def _iq4_nl(source: Pointer) -> Iterator[Lanes]:
    return _iq4_pair(source, 2, source.scale(0))


def _iq4_xs(source: Pointer) -> Iterator[Lanes]:
    scale, high = source.half(0), source.load(2, I16)
    for group in range(8):
        low = (source.load(4 + group // 2, I8) >> (4 * (group % 2))) & 15
        own = (low.widen(I32) | (((high >> (2 * group)) & 3).widen(I32) << 4)).to_float_signed() + -32.0
        yield from _iq4_pair(source, 8 + 16 * group, own * scale)


def _mxfp4(source: Pointer) -> Iterator[Lanes]:
    """A power of two, e8m0, and e2m1 values: twice the values are small integers, so half of the power multiplies."""
    bits = source.load(0, I8).widen(I32) << 23
    least = bits._same(0x00400000)  # 2^-127, below float32's normal numbers
    builder = source.builder
    scale = Lanes(builder, builder.select(builder.icmp_unsigned(">", bits.value, least), bits.value, least))
    half, q = scale.as_bits(F32) * 0.5, source.load(1, I8, LANES)
    for nibble in (q & 15, q >> 4):
        yield nibble.choose(MXFP4_VALUES).to_float_signed() * half


DECODERS: dict[str, Callable[[Pointer], Iterator[Lanes]]] = {
    "Q8_0": partial(_scaled_bytes, 32), "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "Q4_G64": _q4_g64,
    "Q8_G128": partial(_scaled_bytes, 128),
    "MXFP4": _mxfp4,
}  # fmt: skip


def decoded(fmt: str, sources: Sequence[Pointer]) -> Iterator[tuple[Lanes, ...]]:
    """The blocks at several addresses side by side: the first 16 values of each, then the next."""
    return zip(*(DECODERS[fmt](source) for source in sources), strict=True)
