"""The neuron cache of LLM in a Flash (2312.11514, 3.3): one preallocated matrix a layer, a row a neuron record.

A row holds gate row, up row and down column of a neuron, so that one read brings all of it. What a token adds is read
into rows that are free or that others leave; the order of neurons in the matrix does not matter, because those of a
token are gathered by id.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..device import Device, allocate
from ..report import Recorder
from ..store.flash import FlashStore, Ticket
from .window import NeuronPolicy


@dataclass(frozen=True)
class NeuronFile:
    """A layer's records on flash: `count` of `width` bytes each, from byte `base` of `path` on."""

    path: Path
    base: int
    count: int
    width: int


class _Layer:
    def __init__(self, file: NeuronFile, policy: NeuronPolicy) -> None:
        self.file = file
        self.policy = policy
        self.rows = allocate(policy.capacity * file.width).reshape(policy.capacity, file.width)
        self.slot = np.full(file.count, -1, np.int64)  # by id; -1: not here
        self.free = list(range(policy.capacity - 1, -1, -1))


class NeuronCache:
    """Neurons of all layers that have records. `fetch` brings those that a token needs, and keeps what the policy says.

    `block` neurons at most are handed out at once, so that a token that needs more than all slots hold still runs.
    """

    def __init__(
        self,
        store: FlashStore,
        device: Device,
        recorder: Recorder,
        files: Mapping[int, NeuronFile],
        policies: Mapping[int, NeuronPolicy],
        block: int,
    ) -> None:
        self.store, self.device, self.recorder, self.block = store, device, recorder, block
        self.layers = {layer: _Layer(file, policies[layer]) for layer, file in files.items()}
        width = max(file.width for file in files.values())
        self._active = allocate(block * width)

    @property
    def nbytes(self) -> int:
        return self._active.nbytes + sum(layer.rows.nbytes for layer in self.layers.values())

    def fetch(self, index: int, ids: np.ndarray) -> Fetch:
        """Start bringing neurons `ids` (ascending) of a layer in; the result hands them out in that order."""
        layer = self.layers[index]
        missing, gone = layer.policy.demand(ids)
        gone = gone[layer.slot[gone] >= 0]
        layer.free += layer.slot[gone].tolist()
        layer.slot[gone] = -1
        self.recorder.cache(len(ids) - len(missing), len(missing))
        return Fetch(self, layer, ids)

    def here(self, index: int, ids: np.ndarray) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Those of neurons `ids` that are in memory, as `fetch` hands them out. Reads nothing, and nothing is noted."""
        layer = self.layers[index]
        ids = ids[layer.slot[ids] >= 0]
        for first in range(0, len(ids), self.block):
            block = ids[first : first + self.block]
            yield block, self.device.put(torch.from_numpy(layer.rows[layer.slot[block]]))


class Pinned:
    """Records that all stay, as the slices they came in: the same neurons in the same blocks, and nothing read."""

    def __init__(self, device: Device, recorder: Recorder, block: int) -> None:
        self.device, self.recorder, self.block = device, recorder, block
        self.homes: dict[int, tuple[list[torch.Tensor], int]] = {}  # layer -> (records by slice, records a slice)

    def here(self, index: int, ids: np.ndarray) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        return self.fetch(index, ids)

    def fetch(self, index: int, ids: np.ndarray) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        homes, step = self.homes[index]
        self.recorder.cache(len(ids), 0)
        for first in range(0, len(ids), self.block):
            block = ids[first : first + self.block]
            where = torch.from_numpy(block).to(homes[0].device)
            with self.recorder.computing():
                if len(homes) == 1:
                    rows = homes[0][where]
                else:
                    rows = torch.cat([home[where[where // step == i] % step] for i, home in enumerate(homes)])
            yield block, rows


class Fetch:
    """Neurons on their way: iterate once for (ids, rows uint8 [n, width]) blocks, ascending.

    What is missing is read to where it will be computed on, beside copies of what is here, and is copied to a slot of
    its own behind the computation.
    """

    def __init__(self, cache: NeuronCache, layer: _Layer, ids: np.ndarray) -> None:
        self.cache, self.layer = cache, layer
        width = layer.file.width
        self.active = cache._active[: cache.block * width].reshape(cache.block, width)
        self.blocks = [ids[i : i + cache.block] for i in range(0, len(ids), cache.block)]
        self._ticket = self._start(self.blocks[0]) if self.blocks else None

    def _start(self, block: np.ndarray) -> Ticket | None:
        """Read what of the block is missing."""
        file, absent = self.layer.file, np.flatnonzero(self.layer.slot[block] < 0)
        if not len(absent):
            return None
        return self.cache.store.read_records(
            file.path, file.base, file.width, block[absent], absent, self.active, "neuron"
        )

    def __iter__(self) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        layer, cache = self.layer, self.cache
        for index, block in enumerate(self.blocks):
            ticket = self._start(block) if index else self._ticket
            slots = layer.slot[block]
            present, absent = np.flatnonzero(slots >= 0), np.flatnonzero(slots < 0)
            if len(present):
                with cache.recorder.computing():
                    self.active[present] = layer.rows[slots[present]]
            if ticket is not None:
                if not ticket.ready:
                    with cache.recorder.waiting():
                        ticket.wait()
                elif ticket.error is not None:
                    ticket.wait()
            yield block, cache.device.put(torch.from_numpy(self.active[: len(block)]))
            kept = absent[layer.policy.held[block[absent]]][: len(layer.free)]
            if len(kept):
                taken = [layer.free.pop() for _ in kept]
                layer.rows[taken] = self.active[kept]
                layer.slot[block[kept]] = taken
