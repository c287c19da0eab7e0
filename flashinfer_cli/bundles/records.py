"""The bytes of each file of a bundle, one after another, in bounded memory, however large the model.

What is converted is converted by several threads, a block of rows each. Output is sequential, and so hashed as it is
written.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..config import MiB
from ..kernels.mxfp4 import join
from . import bands
from .bands import Blocks
from .checked import BLOCK_ELEMENTS, THREADS, check_finite, encode_rows
from .convert import BITS, Bytes
from .layout import ExpertContent, MatrixContent, NeuronContent, PlannedFile, Rows
from .quantize import Rounding
from .source import SourceFiles

DEFAULT_MEMORY = 128 * MiB
COPY_BYTES = 4 * MiB


def file_blocks(file: PlannedFile, folder: Path, memory_bytes: int = DEFAULT_MEMORY) -> Blocks:
    """The file's bytes after its header, as consecutive arrays, each left as it is until the next but one is asked for.

    `folder` takes the scratch file, without a name and gone with the process: see `scratch_bytes`. Raises
    CorruptCheckpointError naming a tensor that holds NaN or infinity or that its file is too short for.
    """
    content = file.content
    if isinstance(content, NeuronContent):
        return bands.neuron_blocks(content, folder, memory_bytes, file.rounding)
    if isinstance(content, ExpertContent):
        return _expert_blocks(content, file.rounding)
    return _matrix_blocks(content, file.rounding)


def scratch_bytes(file: PlannedFile, memory_bytes: int = DEFAULT_MEMORY) -> int:
    """Size of the scratch file that `file_blocks` makes meanwhile."""
    content = file.content
    return bands.scratch_bytes(content, memory_bytes) if isinstance(content, NeuronContent) else 0


def _copy(source: SourceFiles, rows: Rows, format: str, rounding: Rounding, pool: ThreadPoolExecutor) -> Blocks:
    """These rows in `format`, row-major."""
    info = rows.info
    most = COPY_BYTES // max(info.row_bytes, 1) if format == info.format else BLOCK_ELEMENTS // max(info.cols, 1)
    step = max(1, most)
    first = info.rows(rows.row, rows.rows).offset

    def part(start: int) -> Bytes:
        raw = np.empty((min(step, rows.rows - start), info.row_bytes), np.uint8)
        source.read(info.path, info.rows(rows.row + start, len(raw)).offset, raw)
        check_finite(raw, info)
        return encode_rows(raw, info, format, rounding)

    starts = range(0, rows.rows, step)
    ahead = 1 if format == info.format else THREADS + 1
    under_way = deque(pool.submit(part, start) for start in starts[:ahead])
    try:
        for start in starts:
            done = under_way.popleft().result()
            if start + ahead * step < rows.rows:
                under_way.append(pool.submit(part, start + ahead * step))
            source.drop(info.path, first, min(start + step, rows.rows) * info.row_bytes)
            yield done
    finally:
        for future in under_way:
            future.cancel()


def _made(source: SourceFiles, rows: Rows, format: str, rounding: Rounding, pool: ThreadPoolExecutor) -> Blocks:
    """A matrix that does not stand in the source row by row, of an expert: read whole."""

    def read(rows: Rows) -> Bytes:
        raw = np.empty((rows.rows, rows.info.row_bytes), np.uint8)
        source.read(rows.info.path, rows.info.rows(rows.row, rows.rows).offset, raw)
        return raw

    raw, (count, cols) = read(rows), rows.shape
    if rows.scales is not None:
        scales = read(rows.scales)
        made = np.empty((*scales.shape, 17), np.uint8)
        join(raw.reshape(*scales.shape, 16), scales, made)
        made = made.reshape(count, -1)
    else:
        made = np.ascontiguousarray(raw.view(BITS[rows.format]).T).view(np.uint8)
    info = replace(rows.info, format=rows.format)
    check_finite(made, info)
    step = max(1, BLOCK_ELEMENTS // cols)
    starts = range(0, count, step)
    yield from pool.map(lambda start: encode_rows(made[start : start + step], info, format, rounding), starts)


def _matrix_blocks(content: MatrixContent, rounding: Rounding) -> Blocks:
    with SourceFiles() as source, ThreadPoolExecutor(THREADS) as pool:
        for piece in content.pieces:
            if isinstance(piece, int):
                yield np.zeros(piece, np.uint8)
            else:
                yield from _copy(source, piece.rows, piece.format, rounding, pool)


def _expert_blocks(content: ExpertContent, rounding: Rounding) -> Blocks:
    layout = content.layout
    with SourceFiles() as source, ThreadPoolExecutor(THREADS) as pool:
        for matrices in content.experts:
            end = 0
            for part, rows in zip(layout.parts, matrices, strict=True):
                if part.offset > end:
                    yield np.zeros(part.offset - end, np.uint8)
                copy = _copy if rows.format == rows.info.format and not rows.turned else _made
                yield from copy(source, rows, part.format, rounding, pool)
                end = part.offset + part.nbytes
            if layout.width_bytes > end:
                yield np.zeros(layout.width_bytes - end, np.uint8)
