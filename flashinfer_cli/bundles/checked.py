"""Rows of a tensor in another format, or an error that names the tensor."""

from __future__ import annotations

from ..checkpoint.base import TensorInfo
from ..errors import CorruptCheckpointError, UnsupportedModelError
from .convert import Bits, Bytes, all_finite, convert, encode
from .quantize import Rounding

THREADS = 4  # that convert, a block of rows each
BLOCK_ELEMENTS = 1 << 18  # elements a thread converts at a time; GGUF blocks need about 40 bytes each meanwhile


def check_finite(raw: Bytes, info: TensorInfo) -> None:
    if not all_finite(raw, info.format):
        raise CorruptCheckpointError(f"The tensor '{info.name}' holds NaN or infinite weights.")


def convert_rows(raw: Bytes, info: TensorInfo, dtype: str) -> Bits:
    try:
        return convert(raw, info.format, dtype)
    except OverflowError:
        hint = "Ask for --dtype bf16 or f32."
        raise UnsupportedModelError(f"The tensor '{info.name}' has weights too large for {dtype}.", hint) from None


def encode_rows(raw: Bytes, info: TensorInfo, format: str, rounding: Rounding) -> Bytes:
    try:
        return encode(raw, info.format, format, rounding)
    except OverflowError:
        hint = "Ask for --dtype bf16 or f32, without --quantize."
        raise UnsupportedModelError(f"The tensor '{info.name}' has weights too large for {format}.", hint) from None
