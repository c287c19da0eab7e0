"""Dense feed-forward layers, gated (act(gate) * up) or not (act(up)), streamed by rows or by neuron records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..kernels.activations import ACTIVATIONS
from .linear import Linear, RowSlice, Runtime


@dataclass(frozen=True)
class DenseFfn:
    """Three (or two) matrices as they stand in a checkpoint: the twin of RecordFfn."""

    gate: Linear | None
    up: Linear
    down: Linear
    act: str

    @property
    def is_here(self) -> bool:
        """Is all of it in memory."""
        return all(part.is_here for part in (self.gate, self.up, self.down) if part is not None)

    def __call__(self, x: torch.Tensor, rt: Runtime) -> torch.Tensor:
        """x [T, d] -> [T, d]."""
        if rt.mode.here and not self.is_here:
            return torch.zeros_like(x)
        if self.gate is None:
            h = self.up(x, rt)
            with rt.recorder.computing():
                h = rt.apart(ACTIVATIONS[self.act], h)
        else:
            g, h = self.gate(x, rt), self.up(x, rt)
            with rt.recorder.computing():
                h = rt.apart(ACTIVATIONS[self.act], g).mul_(h)
        return self.down(h, rt)


@dataclass(frozen=True)
class RecordFfn:
    """Neuron records of a bundle (2312.11514, row-column bundling): gate row, up row and down column of a neuron
    together."""

    parts: tuple[RowSlice, ...]  # runs of records
    format: str
    gated: bool
    act: str
    gate_bias: torch.Tensor | None  # float32 [d_ff]
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None  # float32 [d]

    def __call__(
        self, x: torch.Tensor, rt: Runtime, passing: Callable[[int, torch.Tensor], None] | None = None
    ) -> torch.Tensor:
        """x [T, d] -> [T, d]. `passing` is shown every run of records: its first neuron, and uint8 [n, width]."""
        out = torch.zeros_like(x)
        for part in self.parts:
            if rt.mode.here and part.slice.home is None:
                continue
            rows = slice(part.start, part.start + part.rows)
            gate_bias = None if self.gate_bias is None else self.gate_bias[rows]
            bias = gate_bias, None if self.up_bias is None else self.up_bias[rows]
            with rt.feed.use(part.slice) as data, rt.recorder.computing():
                records = data.view(part.rows, -1)
                rt.kernels.ffn_records(x, records, self.format, self.gated, self.act, bias, out)
                if passing is not None:
                    passing(part.start, records)
        return out if self.down_bias is None else out.add_(self.down_bias)
