"""Dense feed-forward layers, gated (act(gate) * up) or not (act(up)), streamed by rows or by neuron records."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..cache.neurons import NeuronCache, Pinned
from ..kernels.activations import ACTIVATIONS
from .demand import Demand
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

    def __call__(self, x: torch.Tensor, rt: Runtime) -> torch.Tensor:
        """x [T, d] -> [T, d]."""
        out = torch.zeros_like(x)
        for part in self.parts:
            if rt.mode.here and part.slice.home is None:
                continue
            rows = slice(part.start, part.start + part.rows)
            gate_bias = None if self.gate_bias is None else self.gate_bias[rows]
            bias = gate_bias, None if self.up_bias is None else self.up_bias[rows]
            with rt.feed.use(part.slice) as data, rt.recorder.computing():
                rt.kernels.ffn_records(x, data.view(part.rows, -1), self.format, self.gated, self.act, bias, out)
        return out if self.down_bias is None else out.add_(self.down_bias)


@dataclass(frozen=True)
class SparseFfn:
    """Neuron records of which a token computes only those that `demand` names (2312.11514).

    A prompt goes through all neurons (`dense`), since the union over its tokens would be most of them anyway; what
    follows is computed token by token, each on its own neurons in the order of their ids, so that neither the cache nor
    its policy nor the number of tokens in a pass changes a bit of the result.
    """

    layer: int
    dense: RecordFfn
    demand: Demand
    cache: NeuronCache | Pinned
    count: int  # neurons of the layer

    def __call__(self, x: torch.Tensor, rt: Runtime) -> torch.Tensor:
        """x [T, d] -> [T, d]."""
        dense = self.dense
        if not rt.mode.decoding:
            rt.feed.demand([part.slice for part in dense.parts])
            return dense(x, rt)
        out = torch.zeros_like(x)
        for row in range(len(x)):
            one, into = x[row : row + 1], out[row : row + 1]
            with rt.recorder.computing():
                ids = self.demand(one)
            if rt.mode.here:
                arriving = self.cache.here(self.layer, ids)
            else:
                rt.recorder.neurons(self.layer, len(ids), self.count)
                arriving = iter(self.cache.fetch(self.layer, ids))
            for block, records in arriving:
                with rt.recorder.computing():
                    where = torch.from_numpy(block).to(x.device)
                    gate_bias = None if dense.gate_bias is None else dense.gate_bias[where]
                    bias = gate_bias, None if dense.up_bias is None else dense.up_bias[where]
                    rt.kernels.ffn_records(one, records, dense.format, dense.gated, dense.act, bias, into)
        return out if dense.down_bias is None else out.add_(dense.down_bias)
