"""Plain reads of rows, for tensors that are small or read once; what streams goes through store/ instead."""

from __future__ import annotations

import os

import numpy as np

from ..errors import CorruptCheckpointError
from .base import FORMATS, TensorInfo
from .files import opened


def read_rows(info: TensorInfo, start: int, count: int) -> np.ndarray:
    """Rows [start, start + count) of a tensor as stored: uint8 [count * row_bytes], contiguous and writable.

    Raises StorageError when the file cannot be read and CorruptCheckpointError when it ends too early.
    """
    extent = info.rows(start, count)
    out = np.empty(extent.nbytes, np.uint8)
    view, done = out.data, 0
    with opened(extent.path) as (file, _):
        file.seek(extent.offset, os.SEEK_SET)
        while done < extent.nbytes:
            read = file.readinto(view[done : done + (64 << 20)])  # type: ignore[attr-defined]
            if not read:
                raise CorruptCheckpointError(
                    f"{extent.path} ends inside of tensor '{info.name}': "
                    f"byte {extent.offset + done} is the last of {extent.offset + extent.nbytes}."
                )
            done += read
    return out


def read_floats(info: TensorInfo) -> list[float]:
    """All values of a small F32, F16 or F64 tensor, as Python floats."""
    dtype = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}.get(info.format)
    if dtype is None:
        raise CorruptCheckpointError(
            f"Tensor '{info.name}' of {info.path} is {info.format}; plain numbers are expected."
        )
    assert FORMATS[info.format][0] == 1
    return [float(value) for value in read_rows(info, 0, info.num_rows).view(dtype)]
