"""Neurons whose parts stand apart, each matrix in a file of its own: what bundling (2312.11514) is compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flashinfer_cli.bundles.format import RecordPart
from flashinfer_cli.cache.neurons import NeuronCache
from flashinfer_cli.cache.slots import NeuronFile
from flashinfer_cli.config import NEURON_BLOCK, NEURON_STAGES
from flashinfer_cli.device import allocate
from flashinfer_cli.models.open import open_model
from flashinfer_cli.store.flash import Ticket


def take_apart(bundle: Path, folder: Path) -> dict[tuple[Path, int], list[NeuronFile]]:
    """Write every layer's matrices into files of their own, the down projection by columns; by place of the records."""
    checkpoint = open_model(bundle).checkpoint
    records: dict[int, Any] = getattr(checkpoint, "records", {})
    found = {}
    for layer, layout in records.items():
        info = checkpoint.tensors[layout.tensor]
        rows = np.memmap(info.path, np.uint8, "r", info.offset, (layout.count, layout.width_bytes))
        parts: list[NeuronFile] = []
        part: RecordPart
        for part in layout.parts:
            file = folder / f"{layer}.{part.role}"
            if not file.exists():
                rows[:, part.offset : part.offset + part.nbytes].tofile(file)
            parts.append(NeuronFile(file, 0, layout.count, part.nbytes))
        found[info.path, info.offset] = parts
    return found


class _All:
    """Tickets as one; ends with copying parts to where whole records are expected."""

    def __init__(self, tickets: list[Ticket], join: Callable[[], None]) -> None:
        self.tickets, self.join = tickets, join
        self.ready, self.error = False, None  # of a wait before

    def wait(self) -> None:
        if not self.ready:
            for ticket in self.tickets:
                ticket.wait()
            self.join()
            self.ready = True


class ByCalls(NeuronCache):
    """The neuron cache without programs that fetch by themselves: a call for every step of a demand."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.flights = None


def in_parts(parts: dict[tuple[Path, int], list[NeuronFile]]) -> type[NeuronCache]:
    """The neuron cache, reading each part of a neuron from a file of its own."""

    staging: dict[str, np.ndarray] = {}

    class PartedCache(ByCalls):
        under_way: tuple[_All, ...] = ()

        def read(self, file: NeuronFile, ids: np.ndarray, addresses: np.ndarray, memory: tuple[np.ndarray, ...]) -> Any:
            for ticket in self.under_way:  # all have the same places to come to
                ticket.wait()
            tickets, buffers = [], []
            for part in parts[file.path, file.base]:
                if part.path.suffix not in staging:
                    most = NEURON_STAGES * NEURON_BLOCK
                    staging[part.path.suffix] = allocate(most * part.width).reshape(most, part.width)
                buffer = staging[part.path.suffix]
                at = buffer.ctypes.data + part.width * np.arange(len(ids))
                tickets.append(self.store.read_records(part.path, part.base, part.width, ids, at, (buffer,), "neuron"))
                buffers.append(buffer)

            def join() -> None:
                for into in memory:
                    at = addresses - into.ctypes.data
                    mine = np.flatnonzero((at >= 0) & (at < into.nbytes))
                    place = 0
                    for buffer in buffers:
                        into[at[mine] // file.width, place : place + buffer.shape[1]] = buffer[mine]
                        place += buffer.shape[1]

            ticket = _All(tickets, join)
            self.under_way = (ticket,)
            return ticket

    return PartedCache
