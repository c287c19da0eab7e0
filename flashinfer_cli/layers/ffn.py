"""Dense feed-forward layers, gated (act(gate) * up) or not (act(up)), streamed by rows or by neuron records."""

from __future__ import annotations

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

    def __call__(self, x: torch.Tensor, rt: Runtime) -> torch.Tensor:
        """x [T, d] -> [T, d]."""
        if self.gate is None:
            h = self.up(x, rt)
            with rt.recorder.computing():
                h = ACTIVATIONS[self.act](h)
        else:
            g, h = self.gate(x, rt), self.up(x, rt)
            with rt.recorder.computing():
                h = ACTIVATIONS[self.act](g).mul_(h)
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

    def __call__(self, x: torch.Tensor, rt: Runtime) -> torch.Tensor:
        """x [T, d] -> [T, d]."""
        out = torch.zeros_like(x)
        for part in self.parts:
            rows = slice(part.start, part.start + part.rows)
            gate_bias = None if self.gate_bias is None else self.gate_bias[rows]
            bias = gate_bias, None if self.up_bias is None else self.up_bias[rows]
            with rt.feed.use(part.slice) as data, rt.recorder.computing():
                rt.kernels.ffn_records(x, data.view(part.rows, -1), self.format, self.gated, self.act, bias, out)
        return out if self.down_bias is None else out.add_(self.down_bias)
