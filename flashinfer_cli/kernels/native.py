"""The compiled kernels on torch's CPU tensors: checks, addresses, scratch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..checkpoint.base import FORMATS, PLAIN
from . import jobs
from .listed import Listed
from .pool import Pool, usable_cores
from .program import (
    SCRATCH,
    Program,
    address,
    attend_words,
    linear_words,
    listed_words,
    norm_words,
    surest_words,
)
from .warm import compiled


class NumbaKernels:
    """`Kernels` in compiled code, on `threads` threads (None: the cores this process may use).

    Every result has the same bits whatever the number of tokens and of threads, and for `linear` wherever its row
    stands in the weight. Any thread may call; calls at the same time run one on all threads, the others on their
    callers'. Raises ImportError, RuntimeError or OSError when the kernels cannot be compiled.
    """

    name = "numba"
    own_threads = True

    def __init__(self, threads: int | None = None) -> None:
        self._pool = Pool(compiled(), threads or usable_cores())

    @property
    def threads(self) -> int:
        return self._pool.threads

    def set_threads(self, threads: int) -> None:
        """Compute on so many threads, the caller's included, from now on."""
        self._pool.resize(threads)

    def keep_cores(self, keep: bool) -> None:
        """Keep the workers awake between products."""
        self._pool.wait_long(keep)

    def close(self) -> None:
        """Stop the workers; calls after that compute on their callers."""
        self._pool.close()

    def linear(self, x: torch.Tensor, weight: torch.Tensor, fmt: str, out: torch.Tensor, start: int) -> None:
        tokens, cols = x.shape
        passes = max(1, min(-(-4 * cols * tokens // jobs.PASS_BYTES), tokens // jobs.MANY_TOKENS))
        space, shared = self._pool.take()
        try:
            for i in range(passes):
                part = slice(i * tokens // passes, (i + 1) * tokens // passes)
                words, own = linear_words(x[part], weight, fmt, out[part], start, space.threads)
                words[SCRATCH] = space.reserve(own * space.threads)
                space.run(*words)
        finally:
            self._pool.release(shared)

    def linear_listed(self, x: torch.Tensor, weights: Sequence[torch.Tensor], fmt: str, out: torch.Tensor) -> None:
        (rows, width), count = weights[0].shape, len(weights)
        assert all(weight.shape == weights[0].shape and weight.is_contiguous() for weight in weights)
        addresses = np.array([weight.data_ptr() for weight in weights], np.int64)
        space, shared = self._pool.take()
        try:
            words, own = listed_words(x, addresses, count, rows, width, fmt, out, space.threads)
            words[SCRATCH] = space.reserve(own * space.threads)
            space.run(*words)
        finally:
            self._pool.release(shared)

    def ffn_records(
        self,
        x: torch.Tensor,
        records: torch.Tensor | Listed,
        fmt: str,
        gated: bool,
        act: str,
        bias: tuple[torch.Tensor | None, torch.Tensor | None] | None,
        out: torch.Tensor,
    ) -> None:
        tokens, d = x.shape
        direct = jobs.is_direct(fmt)
        if isinstance(records, Listed) and (tokens > jobs.DIRECT_TOKENS or not direct):
            records = records.gather()
        if isinstance(records, Listed):
            kind, count, width = jobs.FFN_LISTED, len(records.addresses), records.width
            start = records.addresses.ctypes.data
            assert records.addresses.dtype == np.int64 and records.addresses.flags.c_contiguous
        else:
            kind, (count, width) = jobs.FFN, records.shape
            start = records.data_ptr()
            assert records.is_contiguous()
        gate_bias, up_bias = bias or (None, None)
        elements, size = FORMATS[fmt]
        part = d // elements * size
        assert d % elements == 0 and (2 + gated) * part <= width and out.shape == x.shape, (fmt, d, width)
        assert x.is_contiguous() and out.is_contiguous()
        # `sparse.sparse_ffn` has the same chunks: which neurons are summed together decides the bits
        chunk = max(-(-count // jobs.FFN_CHUNKS), min(jobs.FFN_CHUNK_ROWS, jobs.FFN_CHUNK_BYTES // width), 2)
        chunks = max(1, -(-count // chunk))
        chunk = max(1, -(-count // chunks))  # of equal sizes
        passes = -(-tokens // max(1, jobs.SUMS_BYTES // (4 * chunks * d)))
        most = -(-tokens // max(1, passes))
        space, shared = self._pool.take()
        try:
            for first in range(0, tokens, max(1, most)):
                some = min(most, tokens - first)
                if some > jobs.DIRECT_TOKENS or not direct:
                    group = min(chunk, max(2, jobs.GROUP_BYTES // (4 * d) & -2))
                else:
                    group = 1 if fmt in PLAIN or kind == jobs.FFN_LISTED else jobs.DIRECT_NEURONS
                own = group * (d + jobs.PADDING // 4 + 2 * some) + 16
                scratch = space.reserve(own * space.threads + chunks * some * d)
                space.run(
                    kind, jobs.CODES[fmt], some, count, d, start, width, x.data_ptr() + 4 * d * first,
                    out.data_ptr() + 4 * d * first, scratch + 4 * own * space.threads, chunk, scratch, 4 * own,
                    jobs.ACTS[act] + jobs.GATED * gated, address(gate_bias), address(up_bias), group, part,
                )  # fmt: skip
        finally:
            self._pool.release(shared)

    def norm(self, x: torch.Tensor, weight: torch.Tensor | None, eps: float, out: torch.Tensor) -> None:
        self._norm(x, weight, eps, out, False, None)

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, out: torch.Tensor
    ) -> None:
        self._norm(x, weight, eps, out, True, bias)

    def _norm(
        self, x: torch.Tensor, weight: torch.Tensor | None, eps: float, out: torch.Tensor, layer: bool,
        bias: torch.Tensor | None,
    ) -> None:  # fmt: skip
        space, shared = self._pool.take()
        try:
            words, own = norm_words(x, weight, eps, out, layer, bias)
            words[SCRATCH] = space.reserve(own * space.threads)
            space.run(*words)
        finally:
            self._pool.release(shared)

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None,
        out: torch.Tensor,
    ) -> None:
        space, shared = self._pool.take()
        try:
            words, own = attend_words(q, keys, values, scale, window, out, space.threads)
            words[SCRATCH] = space.reserve(own * space.threads)
            space.run(*words)
        finally:
            self._pool.release(shared)

    # ---- what a demand of neurons asks for, beside the arithmetic
    def _run(self, *words: int) -> None:
        space, shared = self._pool.take()
        try:
            space.run(*words)
        finally:
            self._pool.release(shared)

    def settle(self, sheet: int) -> None:
        """A demand, by the address of its sheet (`jobs`)."""
        self._run(jobs.SETTLE, 0, 0, 1, 0, 0, 0, sheet, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0)

    def surest(
        self, scores: np.ndarray, bias: int, slot: np.ndarray, most: int, ids: np.ndarray, found: np.ndarray,
        work: np.ndarray,
    ) -> None:  # fmt: skip
        """`Program.surest`, now; `bias` is an address."""
        self._run(*surest_words(scores.ctypes.data, len(scores), bias, slot, most, ids, found, work))

    def copy(self, sources: np.ndarray, targets: np.ndarray, width: int) -> None:
        """Copy records of `width` bytes from int64 addresses [n] to others."""
        assert sources.flags.c_contiguous and targets.flags.c_contiguous and len(sources) == len(targets)
        self._run(
            jobs.COPY, 0, 0, len(sources), 0, sources.ctypes.data, width, 0, targets.ctypes.data, 0, 16, 0, 0, 0, 0, 0,
            0, 0,
        )  # fmt: skip

    def lay_out(
        self, ids: np.ndarray, addresses: np.ndarray, width: int, base: int, gap: int, most: int, waste: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """`store.scatter.lay_out`: offsets, sizes, first, and views as int64 [pieces, 2]; then the requests int64
        [reads, 8] of `store.aio` and their addresses. `waste` is an address."""
        count = len(ids)
        space = np.empty(16 * count + 3, np.int64)
        at = space.ctypes.data
        sizes, first, views, requests = at + 8 * count, at + 16 * count, at + 24 * count + 8, at + 56 * count + 8
        counts = requests + 72 * count
        self._run(
            jobs.LAY_OUT, requests, gap, 1, count, addresses.ctypes.data, width, ids.ctypes.data, at, sizes, 1, first,
            0, base, waste, views, counts, most,
        )  # fmt: skip
        reads, pieces = space[-2:].tolist()
        place, after = 3 * count + 1, 7 * count + 1
        return (
            space[:reads],
            space[count : count + reads],
            space[2 * count : 2 * count + reads + 1],
            space[place : place + 2 * pieces].reshape(-1, 2),
            space[after : after + 8 * reads].reshape(-1, 8),
            space[after + 8 * count : after + 8 * count + reads],
        )

    def run(self, program: Program) -> None:
        """All jobs of a program, with one call."""
        if not program.count:
            return
        space, shared = self._pool.take()
        try:
            where, count = program.placed(space.reserve(program.scratch * space.threads))
            space.run(jobs.PROGRAM, 0, 0, count, 0, where, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        finally:
            self._pool.release(shared)

    def dequantize(self, weight: torch.Tensor, fmt: str, cols: int) -> torch.Tensor:
        rows, width = weight.shape
        elements, size = FORMATS[fmt]
        assert weight.is_contiguous() and width * elements == cols * size, (weight.shape, fmt, cols)
        out = torch.empty(rows, cols)
        chunk = max(1, jobs.CHUNK_BYTES // (4 * cols))
        space, shared = self._pool.take()
        try:
            space.run(
                jobs.DEQUANTIZE, jobs.CODES[fmt], 0, rows, cols, weight.data_ptr(), width, 0,
                out.data_ptr(), 4 * cols, chunk, 0, 0, 0, 0, 0, 0, 0,
            )  # fmt: skip
        finally:
            self._pool.release(shared)
        return out
