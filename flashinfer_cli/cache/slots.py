"""Where neurons of one layer stand in memory: slots of one record each, and who is in which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .window import NeuronPolicy


@dataclass(frozen=True)
class NeuronFile:
    """A layer's records on flash: `count` of `width` bytes each, from byte `base` of `path` on."""

    path: Path
    base: int
    count: int
    width: int


class Slots:
    """A layer's slots: rows of `rows` (uint8 [n, width]) that are always there, and behind them those of `late`, which
    lie in memory that a prompt takes for itself (`give_up`) and decoding has again (`have_back`)."""

    def __init__(self, file: NeuronFile, policy: NeuronPolicy, rows: np.ndarray, late: np.ndarray) -> None:
        assert len(rows) + len(late) == policy.capacity
        self.file = file
        self.policy = policy
        self.memory = (rows, late)
        self.slot = np.full(file.count, -1, np.int64)  # by id; -1: not here
        self.stack = np.arange(policy.capacity, dtype=np.int64)[::-1].copy()  # free slots; the last goes first
        self.left = np.array([policy.capacity])  # the height of the stack
        places = (part.ctypes.data + file.width * np.arange(len(part), dtype=np.int64) for part in self.memory)
        self.places = np.concatenate(list(places))

    @property
    def free(self) -> np.ndarray:
        return self.stack[: self.left[0]]

    def address(self, slots: np.ndarray) -> np.ndarray:
        """Of a slot -1 an address without meaning."""
        return self.places[slots] if len(self.places) else np.zeros(len(slots), np.int64)

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Free slots for as many of `ids` as there are: (those that got one, in their order)."""
        free = self.free
        ids = ids[: len(free)]
        self.slot[ids] = free[len(free) - len(ids) :][::-1]
        self.left[0] -= len(ids)
        return ids

    def release(self, ids: np.ndarray) -> None:
        """The slots of those of `ids` that have one are free."""
        ids = ids[self.slot[ids] >= 0]
        self._free(self.slot[ids])
        self.slot[ids] = -1

    def _free(self, slots: np.ndarray) -> None:
        left = int(self.left[0])
        self.stack[left : left + len(slots)] = slots
        self.left[0] += len(slots)

    def put(self, ids: np.ndarray, records: np.ndarray) -> None:
        """Copy records, uint8 [n, width], to the slots of `ids`."""
        slots, first = self.slot[ids], len(self.memory[0])
        early = slots < first
        self.memory[0][slots[early]] = records[early]
        self.memory[1][slots[~early] - first] = records[~early]

    def give_up(self) -> None:
        """Move what is worth most into the slots that are always there; the late ones hold nothing then."""
        first = len(self.memory[0])
        self.release(self.policy.resize(first))
        kept = self.free[self.free < first]
        self.left[0] = 0
        self._free(kept)
        moved = np.flatnonzero(self.slot >= first)
        records = self.memory[1][self.slot[moved] - first]
        self.slot[moved] = -1
        self.put(self.take(moved), records)

    def have_back(self) -> None:
        first, late = (len(part) for part in self.memory)
        self.policy.resize(first + late)
        kept = self.free.copy()
        self.left[0] = 0
        self._free(np.concatenate([np.arange(first + late - 1, first - 1, -1), kept]))


def shares(memory: np.ndarray, files: Mapping[int, NeuronFile], slots: Mapping[int, int]) -> dict[int, np.ndarray]:
    """Rows of records for each layer, uint8 [slots, width], one layer's behind the other's."""
    found, place = {}, 0
    for layer, file in files.items():
        found[layer] = memory[place : place + slots[layer] * file.width].reshape(slots[layer], file.width)
        place += slots[layer] * file.width
    return found
