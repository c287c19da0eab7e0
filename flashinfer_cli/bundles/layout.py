"""The parts of a bundle before it is written: which rows of the source, in which format, make which file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..checkpoint.base import TensorInfo
from ..config import WeightMap
from .format import RecordLayout, StoredFormat, format_bytes
from .quantize import Rounding


@dataclass(frozen=True)
class Rows:
    """Rows [row, row + rows) of a source tensor, as a matrix of `shape` and `format`.

    `turned`: they are its columns. `scales`: they are pairs of FP4 values, 16 bytes a row, whose scales stand there.
    """

    info: TensorInfo
    row: int
    rows: int
    turned: bool = False
    scales: Rows | None = None

    @property
    def shape(self) -> tuple[int, int]:
        if self.scales is not None:
            return self.scales.rows, 32 * self.scales.info.cols
        return (self.info.cols, self.rows) if self.turned else (self.rows, self.info.cols)

    @property
    def format(self) -> str:
        return self.info.format if self.scales is None else "MXFP4"

    @property
    def nbytes(self) -> int:
        return self.rows * self.info.row_bytes


@dataclass(frozen=True)
class Piece:
    """A tensor to write: rows of the source, in `format`."""

    rows: Rows
    format: str

    @property
    def nbytes(self) -> int:
        return self.rows.rows * format_bytes(self.format, self.rows.info.cols)


@dataclass(frozen=True)
class MatrixContent:
    """Tensors one after the other; an int is that many zero bytes between them."""

    pieces: tuple[Piece | int, ...]


@dataclass(frozen=True)
class NeuronContent:
    """One dense layer: its layout and the source of each part, by role."""

    layout: RecordLayout
    sources: dict[str, Rows]


@dataclass(frozen=True)
class ExpertContent:
    """One layer of experts: its layout and, by expert, the source of each part in the layout's order."""

    layout: RecordLayout
    experts: tuple[tuple[Rows, ...], ...]


@dataclass(frozen=True)
class PlannedFile:
    """One safetensors file to write: `nbytes` in all, of which `header` comes first."""

    name: str
    nbytes: int
    header: bytes
    content: MatrixContent | NeuronContent | ExpertContent
    rounding: Rounding = "search"


@dataclass(frozen=True)
class BundlePlan:
    """What a bundle will be. Sizes are in bytes, of weights with their headers; the model's small files come on top.

    `notes` are sentences for the user: what was asked for and could not be done.
    """

    parameters: dict[str, str]
    exactness: Literal["exact", "quantized"]
    files: tuple[PlannedFile, ...]
    weights: WeightMap
    formats: dict[str, StoredFormat]
    records: dict[int, RecordLayout]
    small: dict[int, RecordLayout]
    notes: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        return sum(file.nbytes for file in self.files)
