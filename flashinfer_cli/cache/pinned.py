"""Neurons of a model that fits: all stay, and none is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

from ..device import Device
from ..kernels.listed import Listed
from ..recorder import Recorder
from .window import worth_of

Block = tuple[np.ndarray, "Listed | torch.Tensor"]  # ids, and their records


class Tracing(Protocol):
    """Who wants to know what is demanded, such as a TraceWriter."""

    def expect(self, layer: int, worth: np.ndarray) -> None:
        """Ahead of a demand: what each neuron of the layer is thought to be worth from it on, int [count]."""
        ...

    def demand(self, phase: str, layer: int, chosen: np.ndarray) -> None:
        """A token's demand of a layer: chosen int [1, k], ascending."""
        ...


def record(trace: Tracing | None, phase: str, layer: int, ids: np.ndarray, scores: np.ndarray | None) -> None:
    """A token's demand, ids ascending, and what the scores of all neurons, float32 [count], say of the others."""
    if trace is not None:
        if scores is not None:
            trace.expect(layer, worth_of(scores))
        trace.demand(phase, layer, ids[None])


class Pinned:
    """Records that all stay, as the slices they came in: the same neurons in the same blocks, and nothing read."""

    def __init__(self, device: Device, recorder: Recorder, block: int) -> None:
        self.device, self.recorder, self.block = device, recorder, block
        self.homes: dict[int, tuple[list[torch.Tensor], int]] = {}  # layer -> (records by slice, records a slice)
        self.trace: Tracing | None = None
        self._places: dict[int, tuple[np.ndarray, int, tuple[np.ndarray, ...]]] = {}

    def _where(self, index: int) -> tuple[np.ndarray, int, tuple[np.ndarray, ...]]:
        """The address of each neuron of a layer, their width, and what they stand in."""
        if index not in self._places:
            memory = tuple(home.numpy() for home in self.homes[index][0])
            width = memory[0].shape[1]
            addresses = [rows.ctypes.data + width * np.arange(len(rows), dtype=np.int64) for rows in memory]
            self._places[index] = np.concatenate(addresses), width, memory
        return self._places[index]

    def fetch(self, index: int, ids: np.ndarray, scores: np.ndarray | None = None) -> Iterator[Block]:
        record(self.trace, "decode", index, ids, scores)
        self.recorder.cache(len(ids), 0)
        return self.here(index, ids)

    def here(self, index: int, ids: np.ndarray) -> Iterator[Block]:
        """As `fetch`, but nothing is noted."""
        if self.device.is_host:
            addresses, width, memory = self._where(index)
            for first in range(0, len(ids), self.block):
                block = ids[first : first + self.block]
                yield block, Listed(addresses[block], width, memory)
            return
        homes, step = self.homes[index]
        for first in range(0, len(ids), self.block):
            block = ids[first : first + self.block]
            where = torch.from_numpy(block).to(homes[0].device)
            with self.recorder.computing():
                if len(homes) == 1:
                    rows = homes[0][where]
                else:
                    rows = torch.cat([home[where[where // step == i] % step] for i, home in enumerate(homes)])
            yield block, rows
