"""The FFN of LLM in a Flash (2312.11514): a token computes what is predicted to fire, brought as needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ..cache.flights import Asked
from ..cache.neurons import NeuronCache
from ..cache.pinned import Block, Pinned
from ..kernels.jobs import is_direct
from ..kernels.program import Program
from .demand import Demand, LowRankPredictor, Named
from .ffn import RecordFfn
from .linear import Runtime

WARM_TOKENS = 32  # of a prompt, the last: what they would have asked for is in the slots when it ends


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
    few: int  # tokens of a pass beside which a prompt's memory is for neurons

    def __call__(self, x: torch.Tensor, rt: Runtime) -> torch.Tensor:
        """x [T, d] -> [T, d]."""
        dense = self.dense
        if isinstance(self.cache, NeuronCache) and self.cache.have(rt.mode.decoding and len(x) <= self.few):
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

    @property
    def down_bias(self) -> torch.Tensor | None:
        """float32 [d]."""
        return self.dense.down_bias

    def flight(self, asked: Asked) -> SparseFlight | None:
        """What lets programs fetch the neurons named in `asked` by themselves, where they can."""
        cache = self.cache
        if not isinstance(cache, NeuronCache) or cache.flights is None or not is_direct(self.dense.format):
            return None
        sheet = cache.flights.sheet(cache.layers[self.layer], asked)
        return SparseFlight(self, asked, cache, cache.flights.guess_ids, sheet)

    def make_room(self, rt: Runtime) -> None:
        """Tokens are decoded from now on: what a prompt had of the memory is for neurons."""
        if isinstance(self.cache, NeuronCache) and self.cache.have(True):
            rt.feed.rest()

    def of_named(self, x: torch.Tensor, named: Named, rt: Runtime) -> torch.Tensor:
        """While decoding, x [1, d] through the neurons that `demand` names for it -> [1, d]."""
        self.make_room(rt)
        out = torch.zeros_like(x)
        self._add(x, named, out, rt)
        return out if self.dense.down_bias is None else out.add_(self.dense.down_bias)

    def _add(self, one: torch.Tensor, named: Named, into: torch.Tensor, rt: Runtime) -> None:
        """into += what the neurons named contribute to one token."""
        if rt.mode.here:
            arriving = self.cache.here(self.layer, named.ids)
        else:
            rt.recorder.neurons(self.layer, len(named.ids), self.count)
            arriving = iter(self.cache.fetch(self.layer, *named))
        self._compute(one, arriving, into, rt)

    def _compute(self, one: torch.Tensor, arriving: Iterable[Block], into: torch.Tensor, rt: Runtime) -> None:
        """into += what neurons contribute to one token, block by block as they come."""
        dense = self.dense
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


@dataclass(frozen=True)
class SparseFlight:
    """A sparse FFN's part of a program, for one token (`layers.one_token`)."""

    ffn: SparseFfn
    asked: Asked
    cache: NeuronCache
    guess_ids: np.ndarray
    sheet: np.ndarray

    def begin(self, program: Program) -> None:
        program.guess(self.sheet)

    def compute(self, program: Program, x: torch.Tensor, out: torch.Tensor) -> None:
        dense = self.ffn.dense
        width = self.cache.layers[self.ffn.layer].file.width
        bias = dense.gate_bias, dense.up_bias
        program.sparse(x, self.sheet, width, dense.format, dense.gated, dense.act, bias, out)

    def prepare(self, rt: Runtime) -> bool:
        self.ffn.make_room(rt)
        return self.cache.prepare(self.ffn.layer, self.asked)

    def finish(self, x: torch.Tensor, out: torch.Tensor, rt: Runtime) -> bool:
        left = self.cache.finish(self.ffn.layer, self.asked)
        if left is not None:
            self.ffn._compute(x, left, out, rt)
        return left is None
