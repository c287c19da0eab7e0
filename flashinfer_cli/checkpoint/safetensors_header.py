"""The header of a safetensors file: 8 bytes of length (little-endian), a JSON object, then the data without holes.

The file is taken for hostile: nothing is believed before it is checked against the size of the file, and only the
header is read. Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from ..errors import CorruptCheckpointError, UnsupportedModelError
from .base import TensorInfo
from .files import MOST_JSON, opened, parse_object, quoted, read_exactly

# Bytes of an element. Names are those of FORMATS, which are safetensors' own for what is not quantized.
DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FOREIGN = ("U16", "U32", "U64", "C64", "F4", "F6_E2M3", "F6_E3M2", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ",
           "F8_E5M2FNUZ")  # fmt: skip
_MOST_DIMENSIONS = 16


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _tensor(name: str, entry: Any, path: Path, data: int, size: int) -> TensorInfo:
    where = f"{path}: tensor {quoted(name)}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CorruptCheckpointError(f"{where} is not described by dtype, shape and data_offsets.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        if isinstance(dtype, str) and (dtype in FOREIGN or dtype.startswith("F8_")):
            raise UnsupportedModelError(
                f"{where} has the number format {quoted(dtype)[1:-1]}, which is not supported.",
                f"Supported are {', '.join(DTYPES)}; take a BF16 or F16 version of the model.",
            )
        raise CorruptCheckpointError(f"{where} has the unknown dtype {quoted(str(dtype))}.")
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS or not all(_is_size(n) for n in shape):
        raise CorruptCheckpointError(f"{where} has a shape that is no list of sizes.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise CorruptCheckpointError(f"{where} has data_offsets that are not two whole numbers of at least 0.")
    begin, end = offsets
    if begin > end:
        raise CorruptCheckpointError(f"{where} ends at {end}, before it begins at {begin}.")
    if data + end > size:
        raise CorruptCheckpointError(
            f"{where} ends at byte {data + end} of a file of {size} bytes: the file is cut off or its header lies."
        )
    if end - begin != prod(shape) * DTYPES[dtype]:
        raise CorruptCheckpointError(
            f"{where} has {end - begin} bytes, where {dtype} of shape {shape} takes {prod(shape) * DTYPES[dtype]}."
        )
    return TensorInfo(name, dtype, tuple(shape), path, data + begin, end - begin)


def _check_layout(tensors: list[TensorInfo], path: Path, data: int, size: int) -> None:
    """Every byte of the data belongs to exactly one tensor."""
    here = data
    for info in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if info.offset < here:
            raise CorruptCheckpointError(f"{path}: tensor {quoted(info.name)} overlaps the one before it.")
        if info.offset > here:
            raise CorruptCheckpointError(
                f"{path}: {info.offset - here} bytes before tensor {quoted(info.name)} belong to none."
            )
        here += info.nbytes
    if here != size:
        raise CorruptCheckpointError(f"{path}: the last {size - here} bytes of the file belong to no tensor.")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file, in the header's order, as byte ranges that lie within the file and do not overlap.

    Raises CorruptCheckpointError naming the file and the tensor, and UnsupportedModelError for formats such as F8_E4M3.
    """
    with opened(path) as (file, size):
        if size < 8:
            raise CorruptCheckpointError(f"{path} has {size} bytes, too few for a safetensors file.")
        length = int.from_bytes(read_exactly(file, 0, 8, path), "little")
        if length > MOST_JSON:
            raise CorruptCheckpointError(f"{path} claims a header of {length} bytes, more than the format's 100 MB.")
        if 8 + length > size:
            raise CorruptCheckpointError(
                f"{path} claims a header of {length} bytes, longer than the file of {size} bytes."
            )
        header = parse_object(read_exactly(file, 8, length, path), f"The header of {path}", unique=True)
    extra = header.pop("__metadata__", {})
    if not isinstance(extra, dict):
        raise CorruptCheckpointError(f"The header of {path} has a __metadata__ that is not an object.")
    tensors = {name: _tensor(name, entry, path, 8 + length, size) for name, entry in header.items()}
    _check_layout(list(tensors.values()), path, 8 + length, size)
    return tensors
