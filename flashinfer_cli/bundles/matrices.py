"""The files of a bundle that hold whole matrices: the trunk, and dense layers that are no records."""

from __future__ import annotations

from math import prod

from ..checkpoint.base import FORMATS
from ..config import WeightMap, WeightRef
from .choices import Choices
from .format import TRUNK_FILE, StoredFormat, align_up, format_bytes, is_blocks, safetensors_header
from .layout import MatrixContent, Piece, PlannedFile
from .quantize import Quantize
from .roles import AFTER, BEFORE, LAYER, ROUNDED, is_before, is_streamed, ordered


class MatrixFile:
    """A safetensors file of whole matrices, tensor by tensor."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.pieces: list[Piece | int] = []
        self.header: list[tuple[str, str, tuple[int, ...]]] = []
        self.placed: dict[tuple[str, int, int], str] = {}  # rows of the source -> their tensor: a tied head once
        self.offset = 0

    def place(self, role: str, ref: WeightRef, quantize: Quantize) -> WeightRef:
        """Append a weight, unless it is there already; where it stands now."""
        rows = self.choices.locate(ref)
        info, key = rows.info, (ref.tensor, ref.row, ref.rows)
        if key not in self.placed:
            whole = rows.rows == info.num_rows
            name = self.placed[key] = ref.tensor if whole else f"{ref.tensor}.{role}"
            shape = (info.shape or (1,)) if whole else (rows.rows, info.cols)
            format = dtype = self.choices.format(role, rows, quantize)
            if is_blocks(dtype):
                self.choices.formats[name] = StoredFormat(dtype, shape)
                dtype, shape = "U8", (prod(shape[:-1]), format_bytes(dtype, shape[-1]))
            # Blocks can have odd sizes, and some readers view the data as the dtype: its elements are kept aligned.
            gap = align_up(self.offset, FORMATS[dtype][1]) - self.offset
            if gap:
                self.header.append((f"padding.{len(self.header)}", "U8", (gap,)))
                self.pieces.append(gap)
            self.header.append((name, dtype, shape))
            self.pieces.append(Piece(rows, format))
            self.offset += gap + self.pieces[-1].nbytes  # type: ignore[union-attr]
        return WeightRef(self.placed[key], 0, ref.rows, ref.cols)

    def file(self, name: str) -> PlannedFile:
        data = safetensors_header(self.header)
        content = MatrixContent(tuple(self.pieces))
        return PlannedFile(name, len(data) + self.offset, data, content, self.choices.quantization.rounding)


def trunk_file(choices: Choices, weights: WeightMap) -> tuple[PlannedFile, WeightMap]:
    """What always stays, in the order of the forward pass, and where it stands now."""
    trunk = MatrixFile(choices)

    def place_all(roles: dict[str, WeightRef], order: list[str]) -> dict[str, WeightRef]:
        return {
            role: trunk.place(role, roles[role], choices.quantization.trunk if role in ROUNDED else "none")
            for role in order
        }

    model = place_all(weights.model, ordered(filter(is_before, weights.model), BEFORE))
    layers = tuple(
        place_all(roles, ordered((role for role in roles if not is_streamed(role)), LAYER)) for roles in weights.layers
    )
    model |= place_all(weights.model, ordered((role for role in weights.model if not is_before(role)), AFTER))
    return trunk.file(TRUNK_FILE), WeightMap(model, layers)
