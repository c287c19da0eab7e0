"""y = x W^T + b with W in its stored format, a slice of rows at a time, each slice pinned or on its way from flash."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..cache.slices import Feed, Slice
from ..kernels import Kernels
from ..recorder import Recorder

TILE_ELEMENTS = 1 << 18  # of a matrix made float32 at a time


@dataclass
class Mode:
    """Is the pass under way one of decoding: token by token where it matters to the last bit, and where an FFN has a
    predictor on the neurons that it names. A prompt is computed at once, and on all of them.

    `here`: the pass is a draft that may read nothing: what is not in memory is left out (`decoding.drafts.SelfDraft`).
    `beside`: the last so many tokens of the pass are others for its second place, its third, ...; each sees what is
    before its place, and no token sees it (`decoding.judging`).
    """

    decoding: bool = False
    here: bool = False
    beside: int = 0

    def places(self, start: int, tokens: int, device: torch.device | str) -> torch.Tensor:
        """The positions, int64 [tokens], of a pass that begins at `start`."""
        line = torch.arange(start, start + tokens - self.beside, device=device)
        return torch.cat((line, line[1 : 1 + self.beside])) if self.beside else line


@dataclass(frozen=True)
class Runtime:
    """What every layer computes with."""

    kernels: Kernels
    feed: Feed
    recorder: Recorder
    mode: Mode = field(default_factory=Mode)
    threads: int | None = None  # torch's, where there is much to do; None leaves them as they are
    resident: bool = False  # all weights stay: no reading wants a core

    def share_cores(self, little: bool, alone: bool = False) -> None:
        """Leave torch one thread where there is `little` for it: a second one wakes up late, and then spins on the core
        that the kernels' own thread is on. Decoding a 1.5B model in bfloat16 on two cores takes a quarter less time so.

        `alone`: nobody else reads or computes meanwhile, so that the kernels' threads may wait for each other awake.
        """
        if self.threads is not None:
            torch.set_num_threads(1 if little and self.kernels.own_threads else self.threads)
        self.kernels.keep_cores(little and (self.resident or alone))

    def apart(self, work: Callable[..., torch.Tensor], *rows: torch.Tensor) -> torch.Tensor:
        """`work` of tensors [T, ...] -> [T, ...]; while decoding of each row by itself.

        Kernels give a token the same bits whatever stands beside it. Torch's matrix products do not, nor do those of
        its elementwise operators that take the end of a tensor another way than its vectors (silu, gelu, sigmoid).
        """
        tokens = len(rows[0])
        if not self.mode.decoding or tokens == 1:
            return work(*rows)
        return torch.cat([work(*(each[t : t + 1].clone() for each in rows)) for t in range(tokens)])


@dataclass(frozen=True)
class RowSlice:
    """Rows [start, start + rows) of a matrix."""

    slice: Slice
    start: int
    rows: int


class Linear:
    """A matrix [rows, cols] as row slices, in order, all of one format; `bias` float32 [rows] or None."""

    def __init__(self, parts: list[RowSlice], fmt: str, rows: int, cols: int, bias: torch.Tensor | None = None) -> None:
        self.parts = parts
        self.format = fmt
        self.rows = rows
        self.cols = cols
        self.bias = bias

    @property
    def slices(self) -> list[Slice]:
        return [part.slice for part in self.parts]

    @property
    def is_here(self) -> bool:
        """Is all of it in memory."""
        return all(part.slice.home is not None for part in self.parts)

    def __call__(self, x: torch.Tensor, rt: Runtime, out: torch.Tensor | None = None) -> torch.Tensor:
        """x float32 [T, cols] -> float32 [T, rows], in `out` where that is given."""
        out = x.new_empty(x.shape[0], self.rows) if out is None else out
        for part in self.parts:
            with rt.feed.use(part.slice) as data, rt.recorder.computing():
                rt.kernels.linear(x, data.view(part.rows, -1), self.format, out, part.start)
        return out if self.bias is None else out.add_(self.bias)

    def whole(self, rt: Runtime, out: torch.Tensor) -> torch.Tensor:
        """The matrix as float32 [rows, cols] in `out`: for one that is multiplied from both sides. The space is lent
        since fresh pages cost ten times what the numbers do."""
        step = max(1, TILE_ELEMENTS // self.cols)
        for part in self.parts:
            with rt.feed.use(part.slice) as data, rt.recorder.computing():
                stored = data.view(part.rows, -1)
                for first in range(0, part.rows, step):
                    rows = rt.kernels.dequantize(stored[first : first + step], self.format, self.cols)
                    out[part.start + first : part.start + first + len(rows)] = rows
        return out

    def by_head(self, x: torch.Tensor, rt: Runtime) -> torch.Tensor:
        """x float32 [T, heads, cols] by rows of the matrix in as many groups -> [T, heads, rows / heads]."""
        tokens, heads, _ = x.shape
        rows = self.rows // heads
        out, apart = x.new_empty(heads, tokens, rows), x.transpose(0, 1).contiguous()
        for part in self.parts:
            with rt.feed.use(part.slice) as data, rt.recorder.computing():
                stored, end = data.view(part.rows, -1), part.start + part.rows
                for head in range(part.start // rows, -(-end // rows)):
                    first, last = max(part.start, head * rows), min(end, (head + 1) * rows)
                    weight = stored[first - part.start : last - part.start]
                    rt.kernels.linear(apart[head], weight, self.format, out[head], first - head * rows)
        return out.transpose(0, 1)

    def gather(self, ids: torch.Tensor, rt: Runtime) -> torch.Tensor:
        """Rows `ids` [T] as float32 [T, cols]; every slice must be pinned (an embedding that stays)."""
        out = torch.empty(len(ids), self.cols, device=ids.device)
        for part in self.parts:
            where = ((ids >= part.start) & (ids < part.start + part.rows)).nonzero().flatten()
            if len(where):
                assert part.slice.home is not None
                rows = part.slice.home.view(part.rows, -1)[ids[where] - part.start]
                out[where] = rt.kernels.dequantize(rows, self.format, self.cols)
        return out
