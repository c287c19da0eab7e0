"""What every kind of checkpoint offers: tensors as named byte ranges of read-only files, and the model's own words
about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

# Elements and bytes of one block, by format. Plain formats have blocks of one element. GGUF's as in ggml-quants.h;
# two are ours. Q8_G128: a float16 scale, then 128 signed bytes; a value is scale * q. Q4_G64: two float16 pairs (scale,
# least value), one for each half, then 16 words of 32 bits, of which word j holds elements j, 16 + j .. 112 + j, four
# bits each from the lowest on; a value is scale * q + least.
FORMATS: dict[str, tuple[int, int]] = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "F64": (1, 8),
    "I8": (1, 1), "U8": (1, 1), "I16": (1, 2), "I32": (1, 4), "I64": (1, 8), "BOOL": (1, 1),
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "IQ4_NL": (32, 18), "IQ4_XS": (256, 136), "Q4_G64": (128, 72), "Q8_G128": (128, 130), "MXFP4": (32, 17),
}  # fmt: skip
PLAIN = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Extent:
    """Contiguous bytes of a file."""

    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint, never loaded: `shape` has the slowest dimension first ([out, in] for a projection)."""

    name: str
    format: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    @property
    def cols(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def num_rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        elements, size = FORMATS[self.format]
        return self.cols // elements * size

    def rows(self, start: int, count: int) -> Extent:
        """The bytes of rows [start, start + count) of the tensor seen as a matrix [num_rows, cols]."""
        assert start >= 0 and count >= 0 and start + count <= self.num_rows, (self.name, start, count, self.shape)
        return Extent(self.path, self.offset + start * self.row_bytes, count * self.row_bytes)


class Checkpoint(Protocol):
    """An opened, read-only source of weights. Opening costs the headers, whatever the size of the model."""

    path: Path  # the folder or file, as given
    kind: str  # "safetensors" | "gguf" | "bundle"
    tensors: Mapping[str, TensorInfo]
    config: dict[str, Any]  # config.json, or the same keys made from GGUF metadata
    generation_config: dict[str, Any]  # generation_config.json or what GGUF metadata says; {} where there is none

    @property
    def files(self) -> list[Path]:
        """The files that hold weights, in a fixed order."""
        ...
