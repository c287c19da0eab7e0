"""Neurons of a model that fits: all stay, and none is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

from ..device import Device
from ..kernels.listed import Listed
from ..recorder import Recorder

Block = tuple[np.ndarray, "Listed | torch.Tensor"]  # ids, and their records


class Tracing(Protocol):
    """Who wants to know what is demanded, such as a TraceWriter."""

    def demand(self, phase: str, layer: int, chosen: np.ndarray) -> None:
        """A token's demand of a layer: chosen int [1, k], ascending."""
        ...


class Pinned:
    """Records that all stay, as the slices they came in: the same neurons in the same blocks, and nothing read."""

    def __init__(self, device: Device, recorder: Recorder, block: int) -> None:
        self.device, self.recorder, self.block = device, recorder, block
        self.homes: dict[int, tuple[list[torch.Tensor], int]] = {}  # layer -> (records by slice, records a slice)
        self.trace: Tracing | None = None

    def fetch(self, index: int, ids: np.ndarray) -> Iterator[Block]:
        if self.trace is not None:
            self.trace.demand("decode", index, ids[None])
        self.recorder.cache(len(ids), 0)
        return self.here(index, ids)

    def here(self, index: int, ids: np.ndarray) -> Iterator[Block]:
        """As `fetch`, but nothing is noted."""
        homes, step = self.homes[index]
        for first in range(0, len(ids), self.block):
            block = ids[first : first + self.block]
            if self.device.is_host:
                bases = np.array([home.data_ptr() for home in homes])
                width = homes[0].shape[1]
                memory = tuple(home.numpy() for home in homes)
                yield block, Listed(bases[block // step] + block % step * width, width, memory)
                continue
            where = torch.from_numpy(block).to(homes[0].device)
            with self.recorder.computing():
                if len(homes) == 1:
                    rows = homes[0][where]
                else:
                    rows = torch.cat([home[where[where // step == i] % step] for i, home in enumerate(homes)])
            yield block, rows
