"""What each matrix of the source becomes in a bundle, and what the manifest and the user are told of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..checkpoint.base import FORMATS, PLAIN, TensorInfo
from ..config import WeightRef
from ..errors import CorruptCheckpointError, UnsupportedModelError
from .format import StoredFormat, is_blocks
from .layout import Rows
from .quantize import Quantization, Quantize, format_of


def is_kept(format: str, quantize: Quantize) -> bool:
    """Does a matrix in GGUF blocks stay as it is? Not those of 8 bits where 4 are asked for."""
    elements, size = FORMATS[format]
    return is_blocks(format) and not (quantize == "int4" and size >= elements)


def check_streamable(sources: Iterable[Rows]) -> None:
    """Raises UnsupportedModelError for what cannot be a record."""
    for rows in sources:
        if rows.format not in PLAIN and not is_blocks(rows.format):
            raise UnsupportedModelError(
                f"The tensor '{rows.info.name}' is {rows.format}; FFN weights are floating point or GGUF blocks."
            )


class Choices:
    """What was asked for, put to the matrices of a source one by one. `target` is the plain format that records become,
    None where they keep their own."""

    def __init__(self, tensors: Mapping[str, TensorInfo], target: str | None, quantization: Quantization) -> None:
        self.tensors, self.target, self.quantization = tensors, target, quantization
        self.formats: dict[str, StoredFormat] = {}  # of tensors in blocks
        self.notes: dict[str, None] = {}  # sentences, in order, each once
        self.exact = True

    def note(self, sentence: str) -> None:
        self.notes[sentence] = None

    def locate(self, ref: WeightRef) -> Rows:
        """Where a weight stands. Raises CorruptCheckpointError, UnsupportedModelError for an unknown format."""
        info = self.tensors.get(ref.tensor)
        if info is None:
            raise CorruptCheckpointError(f"The checkpoint has no tensor '{ref.tensor}'.")
        if info.format not in FORMATS:
            raise UnsupportedModelError(f"The tensor '{ref.tensor}' is {info.format}, a format that is not supported.")
        if ref.cols != info.cols or ref.rows < 1 or ref.row < 0 or ref.row + ref.rows > info.num_rows:
            raise CorruptCheckpointError(
                f"The tensor '{ref.tensor}' has shape {list(info.shape)}, "
                f"which does not hold rows {ref.row} to {ref.row + ref.rows} of {ref.cols} elements."
            )
        return Rows(info, ref.row, ref.rows)

    def format(self, role: str, rows: Rows, quantize: Quantize) -> str:
        """What a matrix becomes: the blocks asked for where its columns allow it, else what it is."""
        source, cols = rows.format, rows.shape[1]
        if quantize == "none" or is_kept(source, quantize):
            return source
        found = format_of(quantize, cols)
        if found is None:
            what = f"Rows of {cols} elements are no multiple of 32: they cannot become {quantize} and stay {source}"
            self.note(f"{what} ({role}).")
            return source
        self.exact = False
        return found
