"""The bytes of each file of a bundle, one after another, in bounded memory, however large the model.

What is converted is converted by several threads, a block of rows each.

A dense layer is written in bands of neurons: rows of gate and up, columns of down. Where a layer is more than one band,
down is first transposed into a scratch file, a batch of its rows at a time, so that nothing is read or written in small
pieces: reading the columns straight from the source took three times as long. Output is sequential, and so hashed as it
is written.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import numpy.typing as npt

from ..checkpoint.base import FORMATS, PLAIN, TensorInfo
from ..config import MiB
from ..errors import CorruptCheckpointError, UnsupportedModelError
from ..kernels.mxfp4 import join
from .convert import BITS, Bits, Bytes, all_finite, convert, encode, transpose_into
from .format import is_blocks
from .layout import ExpertContent, MatrixContent, NeuronContent, PlannedFile, Rows
from .publish import SYNC_BYTES, write_all
from .quantize import Rounding
from .source import SourceFiles, drop_cache, read_all

Blocks = Generator[npt.NDArray[np.uint8], None, None]

DEFAULT_MEMORY = 128 * MiB
THREADS = 4
BLOCK_ELEMENTS = 1 << 18  # elements a thread converts at a time; GGUF blocks need about 40 bytes each meanwhile
COPY_BYTES = 4 * MiB
BATCH_BYTES = 16 * MiB  # of transposed rows of down that go to the scratch file at once
TALL_ELEMENTS = 1 << 20  # elements of down that a thread transposes at a time
STAGING = 64 * MiB  # of the memory given: what the threads hold besides the band


def file_blocks(file: PlannedFile, folder: Path, memory_bytes: int = DEFAULT_MEMORY) -> Blocks:
    """The file's bytes after its header, as consecutive arrays, each left as it is until the next but one is asked for.

    `folder` takes the scratch file, without a name and gone with the process: see `scratch_bytes`. Raises
    CorruptCheckpointError naming a tensor that holds NaN or infinity or that its file is too short for.
    """
    content = file.content
    if isinstance(content, NeuronContent):
        return _neuron_blocks(content, folder, memory_bytes, file.rounding)
    if isinstance(content, ExpertContent):
        return _expert_blocks(content, file.rounding)
    return _matrix_blocks(content, file.rounding)


def scratch_bytes(file: PlannedFile, memory_bytes: int = DEFAULT_MEMORY) -> int:
    """Size of the scratch file that `file_blocks` makes meanwhile."""
    content = file.content
    if not isinstance(content, NeuronContent) or _band(content, memory_bytes) >= content.layout.count:
        return 0
    return content.layout.count * content.layout.parts[-1].cols * _turned(content)[1]


def _check(raw: npt.NDArray[np.uint8], info: TensorInfo) -> None:
    if not all_finite(raw, info.format):
        raise CorruptCheckpointError(f"The tensor '{info.name}' holds NaN or infinite weights.")


def _convert(raw: npt.NDArray[np.uint8], info: TensorInfo, dtype: str) -> Bits:
    try:
        return convert(raw, info.format, dtype)
    except OverflowError:
        hint = "Ask for --dtype bf16 or f32."
        raise UnsupportedModelError(f"The tensor '{info.name}' has weights too large for {dtype}.", hint) from None


def _encode(raw: Bytes, info: TensorInfo, format: str, rounding: Rounding) -> Bytes:
    try:
        return encode(raw, info.format, format, rounding)
    except OverflowError:
        hint = "Ask for --dtype bf16 or f32, without --quantize."
        raise UnsupportedModelError(f"The tensor '{info.name}' has weights too large for {format}.", hint) from None


def _copy(source: SourceFiles, rows: Rows, format: str, rounding: Rounding, pool: ThreadPoolExecutor) -> Blocks:
    """These rows in `format`, row-major."""
    info = rows.info
    most = COPY_BYTES // max(info.row_bytes, 1) if format == info.format else BLOCK_ELEMENTS // max(info.cols, 1)
    step = max(1, most)
    first = info.rows(rows.row, rows.rows).offset

    def part(start: int) -> Bytes:
        raw = np.empty((min(step, rows.rows - start), info.row_bytes), np.uint8)
        source.read(info.path, info.rows(rows.row + start, len(raw)).offset, raw)
        _check(raw, info)
        return _encode(raw, info, format, rounding)

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
    _check(made, info)
    step = max(1, BLOCK_ELEMENTS // cols)
    starts = range(0, count, step)
    yield from pool.map(lambda start: _encode(made[start : start + step], info, format, rounding), starts)


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


# ------------------------------------------------------------------ neurons


def _turned(content: NeuronContent) -> tuple[str, int]:
    """The plain format in which down is turned, and its bytes an element: that of the records, or before rounding."""
    format, source = content.layout.parts[-1].format, content.sources["down"].info.format
    if is_blocks(format):
        format = source if source in PLAIN else "F32"
    return format, FORMATS[format][1]


def _band(content: NeuronContent, memory_bytes: int) -> int:
    """Neurons written at a time: as many as fit twice, for one band is read while the one before is written."""
    layout = content.layout
    a_neuron = 2 * layout.width_bytes
    if is_blocks(layout.parts[-1].format):
        a_neuron += layout.parts[-1].cols * _turned(content)[1]
    return max(1, max(memory_bytes - STAGING, memory_bytes // 4) // a_neuron)


def _neuron_blocks(content: NeuronContent, folder: Path, memory_bytes: int, rounding: Rounding) -> Blocks:
    layout, sources = content.layout, content.sources
    *straight, last = layout.parts  # gate and up by rows; down by columns
    format = _turned(content)[0]
    band = min(layout.count, _band(content, memory_bytes))
    with (
        TemporaryFile(dir=folder, buffering=0) as scratch,
        SourceFiles(scattered=True) as source,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        spilled = _spill(pool, source, sources["down"], format, scratch.fileno()) if band < layout.count else 0
        # The padding stays zero.
        buffers = cycle([np.zeros((band, layout.width_bytes), np.uint8) for _ in range(2)])
        staging = np.empty((band, last.cols), BITS[format]) if is_blocks(last.format) else None
        for first in range(0, layout.count, band):
            out = next(buffers)[: min(band, layout.count - first)]
            tasks: list[Callable[[], None]] = []
            for part in straight:
                place = out[:, part.offset : part.offset + part.nbytes]
                tasks += _row_tasks(source, sources[part.role], first, place, part.format, rounding)
            place = out[:, last.offset : last.offset + last.nbytes]
            target = place.view(BITS[format]) if staging is None else staging[: len(out)]
            if spilled:
                tasks += _scratch_tasks(scratch.fileno(), spilled, layout.count, first, target)
            else:
                tasks += _turn_tasks(source, sources["down"], 0, target, format)
            _run(pool, tasks)
            if staging is not None:
                _run(pool, _encode_tasks(target, sources["down"].info, format, place, last.format, rounding))
            source.drop_all()
            drop_cache(scratch.fileno(), 0, 0)
            yield out.reshape(-1)


def _encode_tasks(
    turned: Bits, info: TensorInfo, format: str, target: Bytes, wanted: str, rounding: Rounding
) -> list[Callable[[], None]]:
    """target[n] = row n of `turned`, plain of `format`, in the blocks that are wanted; a task some rows."""
    step = max(1, BLOCK_ELEMENTS // turned.shape[1])
    info = replace(info, format=format)

    def work(start: int) -> None:
        target[start : start + step] = _encode(turned[start : start + step].view(np.uint8), info, wanted, rounding)

    return [partial(work, start) for start in range(0, len(turned), step)]


def _run(pool: ThreadPoolExecutor, tasks: list[Callable[[], None]]) -> None:
    futures = [pool.submit(task) for task in tasks]
    try:
        for future in futures:
            future.result()
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def _read_rows(source: SourceFiles, rows: Rows, first: int, target: Bits, dtype: str) -> None:
    """target[i] = row first + i, in `dtype`."""
    info = rows.info
    step = max(1, BLOCK_ELEMENTS // info.cols)
    for start in range(0, len(target), step):
        count = min(step, len(target) - start)
        raw = np.empty((count, info.row_bytes), np.uint8)
        source.read(info.path, info.rows(rows.row + first + start, count).offset, raw)
        _check(raw, info)
        target[start : start + count] = _convert(raw, info, dtype)


def _row_tasks(
    source: SourceFiles, rows: Rows, first: int, target: Bytes, format: str, rounding: Rounding
) -> list[Callable[[], None]]:
    """target[n] = row first + n in `format`, a task some rows."""
    info = rows.info
    step = max(1, BLOCK_ELEMENTS // info.cols)

    def work(start: int) -> None:
        part = target[start : start + step]
        raw = np.empty((len(part), info.row_bytes), np.uint8)
        source.read(info.path, info.rows(rows.row + first + start, len(part)).offset, raw)
        _check(raw, info)
        part[:] = _encode(raw, info, format, rounding)

    return [partial(work, start) for start in range(0, len(target), step)]


def _turn_tasks(source: SourceFiles, rows: Rows, first: int, target: Bits, dtype: str) -> list[Callable[[], None]]:
    """target[n, r] = element (first + r, n), for all columns n, a task some rows."""
    step = max(1, min(TALL_ELEMENTS // rows.info.cols, -(-target.shape[1] // THREADS)))

    def turn(start: int) -> None:
        columns = target[:, start : start + step]
        block = np.empty(columns.shape[::-1], columns.dtype)
        _read_rows(source, rows, first + start, block, dtype)
        transpose_into(columns, block)

    return [partial(turn, start) for start in range(0, target.shape[1], step)]


def _spill(pool: ThreadPoolExecutor, source: SourceFiles, rows: Rows, dtype: str, fd: int) -> int:
    """Write the matrix to `fd` as transposed batches of rows, one after another; returns the rows of a batch."""
    bits, count = BITS[dtype], rows.info.cols
    batch = min(rows.rows, max(1, BATCH_BYTES // (count * np.dtype(bits).itemsize)))
    unsynced = 0
    for first in range(0, rows.rows, batch):
        turned = np.empty((count, min(batch, rows.rows - first)), bits)
        _run(pool, _turn_tasks(source, rows, first, turned, dtype))
        source.drop_all()
        write_all(fd, turned.reshape(-1).view(np.uint8).data)
        unsynced += turned.nbytes
        if unsynced >= SYNC_BYTES:
            os.fdatasync(fd)
            drop_cache(fd, 0, 0)
            unsynced = 0
    return batch


def _scratch_tasks(fd: int, batch: int, count: int, first: int, target: Bits) -> list[Callable[[], None]]:
    """target[n, r] = element (r, first + n) of what `_spill` wrote for `count` columns."""
    step = max(1, BLOCK_ELEMENTS // batch)

    def read(row: int, start: int) -> None:
        block = target[start : start + step, row : row + batch]
        turned = np.empty(block.shape, block.dtype)
        offset = (row * count + (first + start) * block.shape[1]) * block.itemsize
        read_all(fd, offset, turned.reshape(-1).view(np.uint8))
        block[:] = turned

    rows = range(0, target.shape[1], batch)
    return [partial(read, row, start) for row in rows for start in range(0, len(target), step)]
