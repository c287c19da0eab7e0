"""Jobs of compiled kernels as words, and programs: jobs on places that do not move, computed with one call.

A call of a kernel costs its caller some ten microseconds of Python: sixty layers of eight calls cost more than a small
layer's weights take to read. What a token does between two things that only Python can decide is written down once and
run with one call; the same jobs called one by one are the plain twin, bit for bit.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import torch

from ..checkpoint.base import FORMATS
from . import jobs
from .kept import kept_format, kept_width

SCRATCH = 11  # the place of the scratch's address among a job's words


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _bits(value: float) -> int:
    """Of a float32, as a word."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def linear_words(
    x: torch.Tensor, weight: torch.Tensor, fmt: str, out: torch.Tensor, start: int, threads: int
) -> tuple[list[int], int]:
    """The job of `Kernels.linear`, its scratch left open, and the floats of scratch that a thread needs."""
    tokens, cols = x.shape
    rows, width = weight.shape
    total = out.shape[1]
    elements, size = FORMATS[fmt]
    assert width * elements == cols * size, (x.shape, weight.shape, fmt)
    assert start + rows <= total and out.shape[0] == tokens, (out.shape, start, rows)
    assert x.is_contiguous() and weight.is_contiguous() and out.is_contiguous()
    group = max(2, jobs.GROUP_BYTES // (4 * cols) & -2)
    share = rows * width // (jobs.CHUNKS_A_THREAD * threads)
    wanted = min(max(share, jobs.CHUNK_BYTES), jobs.LARGEST_CHUNK_BYTES) // width & -4
    # many tokens: enough rows at once that the activations are not fetched again for every few
    chunk = max(2, wanted, group if tokens > 1 else 0)
    own = group * cols
    if tokens >= jobs.MANY_TOKENS:
        group = jobs.BLOCK_ROWS
        chunk = max(group, min(wanted, -(-rows // (4 * threads))) // group * group)
        own = group * (jobs.BLOCK_COLS + jobs.PADDING // 4 + jobs.BLOCK_TOKENS * jobs.SUMS)
    words = [
        jobs.LINEAR, jobs.CODES[fmt], tokens, rows, cols, weight.data_ptr(), width, x.data_ptr(),
        out.data_ptr() + 4 * start, 4 * total, chunk, 0, 4 * own, 0, 0, 0, group, 0,
    ]  # fmt: skip
    return words, own


def listed_words(
    x: torch.Tensor, addresses: np.ndarray, count: int, rows: int, width: int, fmt: str, out: torch.Tensor, threads: int
) -> tuple[list[int], int]:
    """The job of `Kernels.linear_listed`: `count` matrices of `rows` rows of `width` bytes, which stand where the first
    of `addresses` (int64) say when it runs."""
    cols = x.shape[1]
    elements, size = FORMATS[fmt]
    assert width * elements == cols * size and len(x) in (1, count), (x.shape, rows, width, fmt)
    assert x.is_contiguous() and out.is_contiguous() and out.shape == (count, rows)
    assert len(addresses) >= count and addresses.dtype == np.int64 and addresses.flags.c_contiguous
    group = max(2, jobs.GROUP_BYTES // (4 * cols) & -2)
    share = count * rows * width // (jobs.CHUNKS_A_THREAD * threads)
    chunk = max(2, min(max(share, jobs.CHUNK_BYTES), jobs.LARGEST_CHUNK_BYTES) // width & -4)
    words = [
        jobs.LINEAR_LISTED, jobs.CODES[fmt], 1, count * rows, cols, addresses.ctypes.data, width, x.data_ptr(),
        out.data_ptr(), 4 * cols if len(x) > 1 else 0, chunk, 0, 4 * group * cols, 0, 0, 0, group, rows,
    ]  # fmt: skip
    return words, group * cols


def norm_words(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, out: torch.Tensor, layer: bool, bias: torch.Tensor | None
) -> tuple[list[int], int]:
    """The job of `Kernels.norm`, or of `layer_norm`, which alone has a bias."""
    d = x.shape[-1]
    rows = x.numel() // d
    assert x.is_contiguous() and out.is_contiguous() and out.shape == x.shape
    assert all(each is None or (each.shape == (d,) and each.is_contiguous()) for each in (weight, bias))
    chunk = max(1, jobs.CHUNK_BYTES // (8 * d))
    words = [
        jobs.NORM, int(layer), 0, rows, d, address(weight), 0, x.data_ptr(), out.data_ptr(), 0, chunk, 0, 64,
        _bits(eps), address(bias), 0, 0, 0,
    ]  # fmt: skip
    return words, 16


def attend_words(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None,
    out: torch.Tensor,
    threads: int,
    held: np.ndarray | None = None,
) -> tuple[list[int], int]:
    """The job of `Kernels.attend`. With `held`, int64 [1], over so many positions and one, of `keys` as a whole."""
    heads, hd = q.shape
    kv_heads, length, _ = keys.shape
    assert q.is_contiguous() and out.is_contiguous() and out.shape == q.shape and heads % kv_heads == 0
    fmt = kept_format(keys)
    assert keys.stride() == values.stride() == (keys.stride(0), kept_width(fmt, hd), 1) and keys.dtype == values.dtype
    chunk, line = -(-heads // threads), 4 * (-(-length // 16) * 16 + 16)
    words = [
        jobs.ATTEND, line, heads // kv_heads, heads, hd, keys.data_ptr(), jobs.CODES[fmt], q.data_ptr(), out.data_ptr(),
        values.data_ptr(), chunk, 0, chunk * line, _bits(scale), length if held is None else 1, window or 0,
        0 if held is None else held.ctypes.data, keys.element_size() * keys.stride(0),
    ]  # fmt: skip
    return words, chunk * line // 4


def surest_words(
    scores: int, n: int, bias: int, slot: np.ndarray, most: int, ids: np.ndarray, found: np.ndarray, work: np.ndarray
) -> list[int]:
    """The job of `Program.surest`; scores and bias are addresses."""
    assert len(work) >= 2 * n and len(ids) >= n <= len(slot)
    return [
        jobs.SUREST, 0, 0, 1, n, bias, 0, scores, ids.ctypes.data, found.ctypes.data, 1, 0, 0, 0, work.ctypes.data, 0,
        slot.ctypes.data, most,
    ]  # fmt: skip


class Program:
    """Jobs in their order, for `threads` threads; run by `NumbaKernels.run`. What they point at must stay where it is,
    and is kept alive here."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.scratch = 0  # floats a thread
        self._jobs: list[Sequence[int]] = []
        self._open: list[int] = []  # jobs whose scratch is yet to be placed
        self._kept: list[object] = []
        self._words = np.empty(0, np.int64)
        self._at = 0

    @property
    def count(self) -> int:
        return len(self._jobs)

    def followed_by(self, other: Program) -> Program:
        """A program of its own with the jobs of both, as they are now."""
        both = Program(self.threads)
        both.scratch = max(self.scratch, other.scratch)
        both._jobs = self._jobs + other._jobs
        both._open = self._open + [self.count + place for place in other._open]
        both._kept = self._kept + other._kept
        return both

    def _add(self, words: list[int], own: int, *kept: object) -> None:
        if own:
            self._open.append(len(self._jobs))
            self.scratch = max(self.scratch, own)
        self._jobs.append(words)
        self._kept += kept

    def linear(self, x: torch.Tensor, weight: torch.Tensor, fmt: str, out: torch.Tensor, start: int) -> None:
        self._add(*linear_words(x, weight, fmt, out, start, self.threads), x, weight, out)

    def linear_listed(
        self, x: torch.Tensor, addresses: np.ndarray, rows: int, width: int, fmt: str, out: torch.Tensor
    ) -> None:
        """len(out) matrices of `rows` rows of `width` bytes that stand where `addresses` say when it runs."""
        words, own = listed_words(x, addresses, len(out), rows, width, fmt, out, self.threads)
        self._add(words, own, x, addresses, out)

    def norm(self, x: torch.Tensor, weight: torch.Tensor | None, eps: float, out: torch.Tensor) -> None:
        self._add(*norm_words(x, weight, eps, out, False, None), x, weight, out)

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, out: torch.Tensor
    ) -> None:
        self._add(*norm_words(x, weight, eps, out, True, bias), x, weight, bias, out)

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None,
        out: torch.Tensor,
        held: np.ndarray,
    ) -> None:
        """Over held[0] + 1 positions of keys and values, as they are when it runs."""
        self._add(*attend_words(q, keys, values, scale, window, out, self.threads, held), q, keys, values, out, held)

    def rotate(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        turn: tuple[torch.Tensor, torch.Tensor] | None,
        interleaved: bool,
        held: np.ndarray,
    ) -> None:
        """q [heads, hd] and k [kv_heads, hd] are turned where they stand, then k and v kept at position held[0] of keys
        and values, in their format; `turn`: cosines and sines, float32 [turned / 2]; None: none is turned."""
        heads, hd = q.shape
        cos, sin = turn or (None, None)
        count, turned = heads + 2 * len(k), 0 if cos is None else 2 * cos.numel()
        assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous() and keys.stride() == values.stride()
        words = [
            jobs.ROTATE, int(interleaved), heads, count, hd, k.data_ptr(), jobs.CODES[kept_format(keys)], q.data_ptr(),
            keys.data_ptr(), values.data_ptr(), -(-count // self.threads), address(cos), 0, turned, v.data_ptr(),
            address(sin), held.ctypes.data, keys.element_size() * keys.stride(0),
        ]  # fmt: skip
        self._add(words, 0, q, k, v, keys, values, cos, sin, held)

    def add(self, x: torch.Tensor, more: torch.Tensor) -> None:
        """x += more, of one shape."""
        assert x.is_contiguous() and more.is_contiguous() and x.numel() == more.numel()
        ones, count = torch.ones(1), x.numel()
        words = [
            jobs.ADD_UP, 0, 0, count, 0, 0, 0, 0, x.data_ptr(), more.data_ptr(), count, ones.data_ptr(), 0, 0, 0, 0, 1,
            0,
        ]  # fmt: skip
        self._add(words, 0, x, more, ones)

    def above_zero(self, scores: torch.Tensor, bias: torch.Tensor, ids: np.ndarray, found: np.ndarray) -> None:
        """Scores += bias; where they are above zero, ascending, to ids, int64 [n + 1]; how many, to found[0]."""
        n = scores.numel()
        assert scores.is_contiguous() and bias.numel() == n and len(ids) > n and ids.dtype == found.dtype == np.int64
        words = [
            jobs.ABOVE_ZERO, 0, 0, 1, n, bias.data_ptr(), 0, scores.data_ptr(), ids.ctypes.data, found.ctypes.data, 1,
            0, 0, 0, 0, 0, 0, 0,
        ]  # fmt: skip
        self._add(words, 0, scores, bias, ids, found)

    def surest(
        self, scores: torch.Tensor, bias: torch.Tensor, slot: np.ndarray, most: int, ids: np.ndarray, found: np.ndarray,
        work: np.ndarray,
    ) -> None:  # fmt: skip
        """Where scores + bias, which stay as they are, are above zero, to ids and found as in `above_zero`: of those
        whose slot, int64 [n], is below zero, at most the `most` highest; work: int64 [2 n]."""
        n = scores.numel()
        words = surest_words(scores.data_ptr(), n, bias.data_ptr(), slot, most, ids, found, work)
        self._add(words, 0, scores, bias, slot, ids, found, work)

    def guess(self, sheet: np.ndarray) -> None:
        """Lay out reads of the neurons that a job before has found, by the sheet of their layer (`sparse.guess`): they
        are handed over beside the next product, or at the end."""
        self._add([jobs.GUESS, 0, 0, 0, 0, sheet.ctypes.data, *[0] * 12], 0, sheet)

    def sparse(
        self, x: torch.Tensor, sheet: np.ndarray, width: int, fmt: str, gated: bool, act: str,
        bias: tuple[torch.Tensor | None, torch.Tensor | None], out: torch.Tensor,
    ) -> None:  # fmt: skip
        """out = what one token's neurons contribute, brought by the sheet of their layer (`sparse.sparse_ffn`): records
        of `width` bytes in a format that products take as it stands; biases of all neurons."""
        d = x.shape[1]
        elements, size = FORMATS[fmt]
        assert x.is_contiguous() and out.is_contiguous() and out.shape == x.shape == (1, d) and d % elements == 0
        assert jobs.is_direct(fmt) and (2 + gated) * (d // elements * size) <= width, (fmt, d, width)
        assert all(b is None or (b.dtype == torch.float32 and b.is_contiguous()) for b in bias)
        own = d + jobs.PADDING // 4 + 2 + 16
        words = [
            jobs.SPARSE, jobs.CODES[fmt], 1, 0, d, sheet.ctypes.data, width, x.data_ptr(), out.data_ptr(), 0, 1, 0,
            4 * own, jobs.ACTS[act] + jobs.GATED * gated, address(bias[0]), address(bias[1]), 1, d // elements * size,
        ]  # fmt: skip
        self._add(words, own + jobs.FFN_CHUNKS * d, x, sheet, out, *bias)

    def placed(self, scratch: int) -> tuple[int, int]:
        """The address of the jobs with their scratch at `scratch`, and their number."""
        if len(self._words) != len(self._jobs):
            self._words = np.array(self._jobs, np.int64)
            self._at = -1
        if scratch != self._at:
            self._words[self._open, SCRATCH] = scratch
            self._at = scratch
        return self._words.ctypes.data, len(self._words)
