"""A dense layer as neuron records, written in bands of neurons: rows of gate and up, columns of down.

Where a layer is more than one band, down is first transposed into a scratch file, a batch of its rows at a time, so
that nothing is read or written in small pieces: reading the columns straight from the source took three times as long.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from ..checkpoint.base import FORMATS, PLAIN, TensorInfo
from ..config import MiB
from .checked import BLOCK_ELEMENTS, THREADS, check_finite, convert_rows, encode_rows
from .convert import BITS, Bits, Bytes, transpose_into
from .format import is_blocks
from .layout import NeuronContent, Rows
from .publish import SYNC_BYTES, write_all
from .quantize import Rounding
from .source import SourceFiles, drop_cache, read_all

Blocks = Generator[Bytes, None, None]

BATCH_BYTES = 16 * MiB  # of transposed rows of down that go to the scratch file at once
TALL_ELEMENTS = 1 << 20  # elements of down that a thread transposes at a time
STAGING = 64 * MiB  # of the memory given: what the threads hold besides the band


def neuron_blocks(content: NeuronContent, folder: Path, memory_bytes: int, rounding: Rounding) -> Blocks:
    """The layer's records, band after band, each left as it is until the next but one is asked for."""
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


def scratch_bytes(content: NeuronContent, memory_bytes: int) -> int:
    """Size of the scratch file that `neuron_blocks` makes meanwhile."""
    if _band(content, memory_bytes) >= content.layout.count:
        return 0
    return content.layout.count * content.layout.parts[-1].cols * _turned(content)[1]


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


def _encode_tasks(
    turned: Bits, info: TensorInfo, format: str, target: Bytes, wanted: str, rounding: Rounding
) -> list[Callable[[], None]]:
    """target[n] = row n of `turned`, plain of `format`, in the blocks that are wanted; a task some rows."""
    step = max(1, BLOCK_ELEMENTS // turned.shape[1])
    info = replace(info, format=format)

    def work(start: int) -> None:
        target[start : start + step] = encode_rows(turned[start : start + step].view(np.uint8), info, wanted, rounding)

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
        check_finite(raw, info)
        target[start : start + count] = convert_rows(raw, info, dtype)


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
        check_finite(raw, info)
        part[:] = encode_rows(raw, info, format, rounding)

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
