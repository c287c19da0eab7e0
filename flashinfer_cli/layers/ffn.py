"""Dense feed-forward layers, gated (act(gate) * up) or not (act(up)), streamed by rows or by neuron records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ..cache.neurons import NeuronCache
from ..cache.pinned import Pinned
from ..config import FEW_TOKENS
from ..kernels.activations import ACTIVATIONS
from .demand import Demand, LowRankPredictor, Named
from .linear import Linear, RowSlice, Runtime

WARM_TOKENS = 32  # of a prompt, the last: what they would have asked for is in the slots when it ends


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


@dataclass(frozen=True)
class SparseFfn:
    """Neuron records of which a token computes only those that `demand` names (2312.11514).

    A prompt goes through all neurons (`dense`), since the union over its tokens would be most of them anyway; what
    follows is computed token by token, each on its own neurons in the order of their ids, so that neither the cache nor
    its policy nor the number of tokens in a pass changes a bit of the result. What the last tokens of a prompt would
    have asked for is kept as it passes by.
    """

    layer: int
    dense: RecordFfn
    demand: Demand
    cache: NeuronCache | Pinned
    count: int  # neurons of the layer

    def __call__(self, x: torch.Tensor, rt: Runtime) -> torch.Tensor:
        """x [T, d] -> [T, d]."""
        dense = self.dense
        if isinstance(self.cache, NeuronCache) and self.cache.have(rt.mode.decoding and len(x) <= FEW_TOKENS):
            rt.feed.rest()
        if not rt.mode.decoding:
            rt.feed.demand([part.slice for part in dense.parts])
            return dense(x, rt, self._warm(x, rt))
        out = torch.zeros_like(x)
        for row in range(len(x)):
            one = x[row : row + 1]
            with rt.recorder.computing():
                named = self.demand(one)
            self._add(one, named, out[row : row + 1], rt)
        return out if dense.down_bias is None else out.add_(dense.down_bias)

    @property
    def guesses(self) -> bool:
        """Are neurons read before attention has said the last word on what is needed."""
        return isinstance(self.cache, NeuronCache) and self.cache.guesses > 0

    def worth_guessing(self) -> bool:
        """Does that pay now."""
        return isinstance(self.cache, NeuronCache) and self.cache.worth(self.layer)

    def expect(self, x: torch.Tensor, rt: Runtime) -> None:
        """While decoding: begin to read what x [1, d] names, the FFN's input as it is without attention's part."""
        if isinstance(self.demand, LowRankPredictor) and self.worth_guessing():
            with rt.recorder.computing():
                scores = self.demand.scores(x)[0]
            assert isinstance(self.cache, NeuronCache)
            self.cache.guess(self.layer, scores.numpy())

    @property
    def absent(self) -> tuple[np.ndarray, int]:
        """int64 [count], below zero for neurons that are not in memory; and how many may be read ahead."""
        assert isinstance(self.cache, NeuronCache)
        return self.cache.layers[self.layer].slot, self.cache.guesses

    def expect_named(self, ids: np.ndarray) -> None:
        """Begin to read neurons that are not here, ascending."""
        assert isinstance(self.cache, NeuronCache)
        self.cache.guess_ids(self.layer, ids)

    def of_named(self, x: torch.Tensor, named: Named, rt: Runtime) -> torch.Tensor:
        """While decoding, x [1, d] through the neurons that `demand` names for it -> [1, d]."""
        if isinstance(self.cache, NeuronCache) and self.cache.have(True):
            rt.feed.rest()
        out = torch.zeros_like(x)
        self._add(x, named, out, rt)
        return out if self.dense.down_bias is None else out.add_(self.dense.down_bias)

    def _add(self, one: torch.Tensor, named: Named, into: torch.Tensor, rt: Runtime) -> None:
        """into += what the neurons named contribute to one token."""
        dense = self.dense
        if rt.mode.here:
            arriving = self.cache.here(self.layer, named.ids)
        else:
            rt.recorder.neurons(self.layer, len(named.ids), self.count)
            arriving = iter(self.cache.fetch(self.layer, *named))
        for block, records in arriving:
            with rt.recorder.computing():
                bias: tuple[torch.Tensor | None, torch.Tensor | None] | None = None
                if dense.gate_bias is not None or dense.up_bias is not None:
                    where = torch.from_numpy(block).to(one.device)
                    gate_bias = None if dense.gate_bias is None else dense.gate_bias[where]
                    bias = gate_bias, None if dense.up_bias is None else dense.up_bias[where]
                rt.kernels.ffn_records(one, records, dense.format, dense.gated, dense.act, bias, into)

    def _warm(self, x: torch.Tensor, rt: Runtime) -> Callable[[int, torch.Tensor], None] | None:
        """Tell the cache what the prompt's last tokens need; what takes the records that pass by."""
        if not isinstance(self.cache, NeuronCache) or not self.cache.device.is_host:
            return None
        with rt.recorder.computing():
            self.cache.warm(self.layer, [self.demand(one) for one in x[-WARM_TOKENS:].split(1)])
        return partial(self.cache.fill, self.layer)
