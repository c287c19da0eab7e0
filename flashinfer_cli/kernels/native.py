"""The compiled kernels on torch's CPU tensors: checks, addresses, scratch; and matrix products where there are many tokens."""

from __future__ import annotations

import torch

from ..checkpoint.base import FORMATS, PLAIN
from . import jobs
from .activations import ACTIVATIONS
from .pool import Pool, Workspace, usable_cores
from .reference import as_plain
from .warm import ensure_compiled

FEW = jobs.ROW_LIMIT  # tokens up to which a product goes row by row, past which weights are converted and multiplied as matrices
TILE_BYTES = 4 << 20  # of float32 converted at a time for many tokens


def _words(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class NumbaKernels:
    """`Kernels` in compiled code, on `threads` threads (None: the cores this process may use).

    For up to 16 tokens every result has the same bits whatever the number of tokens, the number of threads, and where its row
    stands in the weight. Any thread may call; calls at the same time run one on all threads, the others on their callers'.
    Raises ImportError, RuntimeError or OSError when the kernels cannot be compiled.
    """

    name = "numba"

    def __init__(self, threads: int | None = None) -> None:
        self._pool = Pool(ensure_compiled(), threads or usable_cores())

    @property
    def threads(self) -> int:
        return self._pool.threads

    def set_threads(self, threads: int) -> None:
        """Compute on so many threads, the caller's included, from now on."""
        self._pool.resize(threads)

    def close(self) -> None:
        """Stop the workers; calls after that compute on their callers."""
        self._pool.close()

    def linear(self, x: torch.Tensor, weight: torch.Tensor, fmt: str, out: torch.Tensor, start: int) -> None:
        tokens, cols = x.shape
        rows, width = weight.shape
        total = out.shape[1]
        elements, size = FORMATS[fmt]
        assert width * elements == cols * size and start + rows <= total and out.shape[0] == tokens, (x.shape, weight.shape)
        assert x.is_contiguous() and weight.is_contiguous() and out.is_contiguous()
        if tokens > FEW:
            self._linear_many(x, weight, fmt, out, start)
            return
        space, shared = self._pool.take()
        try:
            stride = max(cols, 64)
            scratch = space.reserve(stride * space.threads)
            space.run(
                jobs.LINEAR, jobs.CODES[fmt], tokens, rows, cols, weight.data_ptr(), width, x.data_ptr(),
                out.data_ptr() + 4 * start, 4 * total, max(1, jobs.CHUNK_BYTES // width), scratch, 4 * stride, 0, 0, 0,
            )  # fmt: skip
        finally:
            self._pool.release(shared)

    def ffn_records(
        self,
        x: torch.Tensor,
        records: torch.Tensor,
        fmt: str,
        gated: bool,
        act: str,
        bias: tuple[torch.Tensor | None, torch.Tensor | None] | None,
        out: torch.Tensor,
    ) -> None:
        tokens, d = x.shape
        count, width = records.shape
        gate_bias, up_bias = bias or (None, None)
        assert fmt in PLAIN and (2 + gated) * d * FORMATS[fmt][1] <= width and out.shape == x.shape, (fmt, d, width)
        assert x.is_contiguous() and records.is_contiguous() and out.is_contiguous()
        if tokens > FEW:
            self._ffn_many(x, records, fmt, gated, act, (gate_bias, up_bias), out)
            return
        chunks = max(8, min(jobs.MOST_CHUNKS, jobs.CHUNK_COLUMNS // d))
        chunk = max(16, -(-count // chunks))
        space, shared = self._pool.take()
        try:
            scratch = space.reserve(64 * space.threads + -(-count // chunk) * tokens * d)
            space.run(
                jobs.FFN, jobs.CODES[fmt], tokens, count, d, records.data_ptr(), width, x.data_ptr(),
                out.data_ptr(), scratch + 256 * space.threads, chunk, scratch, 256, jobs.ACTS[act] + jobs.GATED * gated,
                _words(gate_bias), _words(up_bias),
            )  # fmt: skip
        finally:
            self._pool.release(shared)

    def dequantize(self, weight: torch.Tensor, fmt: str, cols: int) -> torch.Tensor:
        elements, size = FORMATS[fmt]
        assert weight.is_contiguous() and weight.shape[1] * elements == cols * size, (weight.shape, fmt, cols)
        out = torch.empty(weight.shape[0], cols)
        space, shared = self._pool.take()
        try:
            self._convert(space, weight.data_ptr(), weight.shape[1], weight.shape[0], fmt, cols, out.data_ptr())
        finally:
            self._pool.release(shared)
        return out

    def _convert(self, space: Workspace, address: int, width: int, rows: int, fmt: str, cols: int, out: int) -> None:
        """out[row] = row as float32, for `rows` rows of `cols` elements, `width` bytes apart."""
        chunk = max(1, jobs.CHUNK_BYTES // (4 * cols))
        space.run(
            jobs.DEQUANTIZE, jobs.CODES[fmt], 0, rows, cols, address, width, 0, out, 4 * cols, chunk, 0, 0, 0, 0, 0
        )

    def _linear_many(self, x: torch.Tensor, weight: torch.Tensor, fmt: str, out: torch.Tensor, start: int) -> None:
        (rows, width), cols = weight.shape, x.shape[1]
        if fmt == "F32" and weight.data_ptr() % 4 == 0 and weight.storage_offset() % 4 == 0:
            torch.mm(x, as_plain(weight, fmt).T, out=out[:, start : start + rows])
            return
        step = min(rows, max(1, TILE_BYTES // (4 * cols)))
        space, shared = self._pool.take()
        try:
            address = space.reserve(step * cols)
            scratch = torch.from_numpy(space.scratch_array)
            for first in range(0, rows, step):
                some = min(step, rows - first)
                self._convert(space, weight.data_ptr() + first * width, width, some, fmt, cols, address)
                tile = scratch[: some * cols].view(some, cols)
                torch.mm(x, tile.T, out=out[:, start + first : start + first + some])
        finally:
            self._pool.release(shared)

    def _ffn_many(
        self,
        x: torch.Tensor,
        records: torch.Tensor,
        fmt: str,
        gated: bool,
        act: str,
        bias: tuple[torch.Tensor | None, torch.Tensor | None],
        out: torch.Tensor,
    ) -> None:
        (count, width), d = records.shape, x.shape[1]
        part, parts = d * FORMATS[fmt][1], 2 + gated
        step = min(count, max(1, TILE_BYTES // (4 * d * parts)))
        space, shared = self._pool.take()
        try:
            address = space.reserve(parts * step * d)
            scratch = torch.from_numpy(space.scratch_array)
            for first in range(0, count, step):
                some = min(step, count - first)
                tiles = []
                for index in range(parts):
                    source, at = records.data_ptr() + first * width + index * part, index * step * d
                    self._convert(space, source, width, some, fmt, d, address + 4 * at)
                    tiles.append(scratch[at : at + some * d].view(some, d))
                hidden = x @ tiles[-2].T
                if bias[1] is not None:
                    hidden += bias[1][first : first + some]
                if gated:
                    gate = x @ tiles[0].T
                    if bias[0] is not None:
                        gate += bias[0][first : first + some]
                    hidden *= ACTIVATIONS[act](gate)
                else:
                    hidden = ACTIVATIONS[act](hidden)
                out.addmm_(hidden, tiles[-1])
        finally:
            self._pool.release(shared)
