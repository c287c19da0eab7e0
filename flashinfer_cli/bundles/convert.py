"""Rows of weights as bytes: are they finite, and what are they in another format. numpy only, block by block."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoint.base import PLAIN
from .format import is_blocks
from .quantize import Rounding, quantize

Bytes = npt.NDArray[np.uint8]  # [rows, row_bytes]
Bits = npt.NDArray[Any]  # [rows, cols] of unsigned integers: the bit patterns of a plain dtype

BITS: dict[str, Any] = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16, "F64": np.uint64}
# The exponent bits; all set means infinite or not a number.
_EXPONENT = {"F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80, "F64": 0x7FF0_0000_0000_0000}
# Bytes of a block, and where in it its float16 scales are, in 16-bit words. All else in a block are integers.
_SCALES: dict[str, tuple[int, tuple[int, ...]]] = {
    "Q4_0": (18, (0,)), "Q4_1": (20, (0, 1)), "Q5_0": (22, (0,)), "Q5_1": (24, (0, 1)), "Q8_0": (34, (0,)),
    "Q2_K": (84, (40, 41)), "Q3_K": (110, (54,)), "Q4_K": (144, (0, 1)), "Q5_K": (176, (0, 1)), "Q6_K": (210, (104,)),
    "IQ4_NL": (18, (0,)), "IQ4_XS": (136, (0,)), "Q4_G64": (72, (0, 1, 2, 3)),
    "Q8_G128": (130, (0,)),
}  # fmt: skip


def all_finite(raw: Bytes, format: str) -> bool:
    """Is no element of these whole rows infinite or NaN? For GGUF blocks: no scale."""
    if format == "MXFP4":  # its scales are bytes, of which one means NaN
        return bool((np.ascontiguousarray(raw).reshape(-1, 17)[:, 0] != 255).all())
    if is_blocks(format):
        size, words = _SCALES[format]
        halves = np.ascontiguousarray(raw).reshape(-1, size).view(np.uint16)
        return all(_finite_bits(halves[:, word], "F16") for word in words)
    return format not in _EXPONENT or _finite_bits(raw.view(BITS[format]), format)


def _finite_bits(bits: Bits, dtype: str) -> bool:
    mask = bits.dtype.type(_EXPONENT[dtype])
    return bits.size == 0 or bool((bits & mask).max() != mask)


def rounds(source: str, target: str) -> bool:
    """May converting `source` (plain or GGUF blocks) to `target` change a value?"""
    return target not in (source, "F32")


def convert(raw: Bytes, source: str, target: str) -> Bits:
    """Finite rows of `source` as bit patterns of plain `target`, rounded to nearest even. May raise OverflowError."""
    assert target in PLAIN, target
    if source == target:
        return raw.view(BITS[target])
    values = _to_float32(raw, source)
    if target == "F32":
        return values.view(np.uint32)
    if target == "F16":
        with np.errstate(over="ignore"):  # found just below
            bits: Bits = values.astype(np.float16).view(np.uint16)
    else:
        wide = values.view(np.uint32)
        bits = ((wide + (np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(
            np.uint16
        )
    if not _finite_bits(bits, target):
        raise OverflowError(f"a weight is too large for {target}")
    return bits


def encode(raw: Bytes, source: str, target: str, rounding: Rounding) -> Bytes:
    """Finite rows of `source` in `target`, plain or blocks: uint8 [rows, row bytes]. May raise OverflowError."""
    if source == target:
        return raw
    if is_blocks(target):
        return quantize(_to_float32(raw, source), target, rounding)
    return convert(raw, source, target).view(np.uint8)


def _to_float32(raw: Bytes, format: str) -> npt.NDArray[np.float32]:
    if format == "F32":
        return np.ascontiguousarray(raw).view(np.float32)
    if format == "F16":
        return raw.view(np.float16).astype(np.float32)
    if format == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    from gguf import GGMLQuantizationType  # slow to import and needed for GGUF alone
    from gguf.quants import dequantize

    with np.errstate(over="ignore"):  # unused padding codes; scales are known to be finite
        values = dequantize(np.ascontiguousarray(raw), GGMLQuantizationType[format])
    return np.ascontiguousarray(values, dtype=np.float32)


def transpose_into(target: Bits, block: Bits) -> None:
    """target[n, r] = block[r, n]. A tile of 64 columns made contiguous first is 2-4 times as fast as numpy alone."""
    for start in range(0, block.shape[1], 64):
        target[start : start + 64] = np.ascontiguousarray(block[:, start : start + 64]).T
