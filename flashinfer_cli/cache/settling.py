"""A demand of one layer's neurons settled: who goes, who takes a slot, where each is computed on, what is to be read.

In numpy, and with one call of compiled code, which leaves slots and policy in the same state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..config import NEURON_STAGES
from ..device import allocate
from ..kernels import jobs
from ..kernels.jobs import STATE_ABSENT, STATE_ARRIVING, STATE_GUESSED, STATE_NEW
from ..kernels.listed import Listed
from ..kernels.native import NumbaKernels
from .slots import Slots
from .window import Foresight, worth_of


@dataclass(frozen=True)
class Settled:
    """Neurons of a demand, `ids` int64 [n] ascending, in blocks of which the first NEURON_STAGES are read at once."""

    ids: np.ndarray
    addresses: np.ndarray  # int64 [n]: where each is computed on
    states: np.ndarray  # uint8 [n], of STATE_ABSENT, STATE_NEW, STATE_GUESSED
    read_ids: np.ndarray  # of the first blocks, what is to be read,
    read_at: np.ndarray  # and where to; both until the next demand is settled
    missed: int  # what the policy did not hold
    right: int  # guessed ids that are needed


class Settler(Protocol):
    """Works on one layer at a time, for one thread."""

    passing: list[np.ndarray]  # uint8 [block, width] each: where blocks that are not to stay are computed on, in turns

    def settle(
        self, layer: Slots, ids: np.ndarray, guessed: np.ndarray, rows: int, scores: np.ndarray | None = None
    ) -> Settled:
        """ids int64, ascending; `guessed` such ids that stand, or will, one behind the other from address `rows` on;
        `scores` float32 of all neurons, for a policy that foresees."""
        ...

    def surest(self, layer: Slots, scores: np.ndarray, most: int) -> np.ndarray:
        """Of neurons without a slot those with scores, float32 [count], above zero; at most the `most` highest."""
        ...

    def copy(self, layer: Slots, ids: np.ndarray, addresses: np.ndarray, memory: tuple[np.ndarray, ...]) -> None:
        """Copy records at `addresses`, which stand in `memory`, to the slots of `ids`."""
        ...


class PlainSettler:
    def __init__(self, block: int, width: int) -> None:
        self.block = block
        self.passing = [allocate(block * width) for _ in range(NEURON_STAGES)]

    def settle(
        self, layer: Slots, ids: np.ndarray, guessed: np.ndarray, rows: int, scores: np.ndarray | None = None
    ) -> Settled:
        if scores is not None:
            layer.policy.expect(worth_of(scores))
        missing, gone = layer.policy.demand(ids)
        layer.release(gone)
        absent = layer.slot[ids] < 0
        mine = absent & np.isin(ids, guessed, assume_unique=True)
        taken = layer.take(ids[absent & layer.policy.held[ids]])
        states = np.where(absent, STATE_ABSENT, 0).astype(np.uint8)
        states[np.isin(ids, taken, assume_unique=True)] += STATE_NEW
        states[mine] += STATE_GUESSED
        slots, width = layer.slot[ids], layer.file.width
        addresses = layer.address(slots)
        for index in range(-(-len(ids) // self.block)):
            here = slice(index * self.block, (index + 1) * self.block)
            passing = slots[here] < 0
            start = self.passing[index % NEURON_STAGES].ctypes.data
            addresses[here][passing] = start + width * np.arange(int(passing.sum()))
        addresses[mine] = rows + width * np.searchsorted(guessed, ids[mine])
        reads = absent & ~mine
        reads[NEURON_STAGES * self.block :] = False
        return Settled(ids, addresses, states, ids[reads], addresses[reads], len(missing), int(mine.sum()))

    def surest(self, layer: Slots, scores: np.ndarray, most: int) -> np.ndarray:
        absent = np.flatnonzero((scores > 0) & (layer.slot < 0))
        if len(absent) > most:
            absent = np.sort(absent[np.argsort(-scores[absent], kind="stable")[:most]])
        return absent

    def copy(self, layer: Slots, ids: np.ndarray, addresses: np.ndarray, memory: tuple[np.ndarray, ...]) -> None:
        layer.put(ids, Listed(addresses, layer.file.width, memory).gather().numpy())


class CompiledSettler:
    def __init__(self, kernels: NumbaKernels, block: int, width: int, count: int) -> None:
        """`count` neurons at most in a layer."""
        self.kernels, self.block = kernels, block
        self.passing = [allocate(block * width) for _ in range(NEURON_STAGES)]
        self._where = np.array([buffer.ctypes.data for buffer in self.passing], np.int64)
        self._work, self._marks = np.zeros(3 * count, np.int64), np.zeros(count, np.int64)
        self._addresses, self._states = np.zeros(count, np.int64), np.zeros(count, np.uint8)
        self._read_ids, self._read_at = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self._ids, self._found = np.zeros(count, np.int64), np.zeros(1, np.int64)
        self._none = np.zeros(count, np.float32)  # no bias
        self._sheets: dict[Slots, np.ndarray] = {}

    def sheet(self, layer: Slots) -> np.ndarray:
        """The words of a layer's demands (`kernels.jobs`), always the same ones."""
        if layer not in self._sheets:
            self._sheets[layer] = self._new_sheet(layer)
        return self._sheets[layer]

    def _new_sheet(self, layer: Slots) -> np.ndarray:
        sheet, policy = np.zeros(jobs.SHEET_WORDS, np.int64), layer.policy
        ranks = policy.ranks()
        assert ranks.itemsize == 8 and policy.held.itemsize == 1  # floats above zero are in the order of their bits
        arrays = {
            jobs.S_HELD: policy.held, jobs.S_LAST: policy.last, jobs.S_RANKS: ranks,
            jobs.S_SLOT: layer.slot, jobs.S_FREE: layer.stack, jobs.S_LEFT: layer.left, jobs.S_PLACES: layer.places,
            jobs.S_WORK: self._work, jobs.S_MARKS: self._marks, jobs.S_PASSING: self._where,
            jobs.S_ADDRESSES: self._addresses, jobs.S_STATES: self._states,
            jobs.S_READ_IDS: self._read_ids, jobs.S_READ_AT: self._read_at,
        }  # fmt: skip
        if isinstance(policy, Foresight):
            arrays[jobs.S_USES] = policy.score
        numbers = {
            jobs.S_COUNT: layer.file.count, jobs.S_WIDTH: layer.file.width, jobs.S_BLOCK: self.block,
            jobs.S_STAGES: NEURON_STAGES, jobs.S_BLOCKS_READ: NEURON_STAGES,
        }  # fmt: skip
        for place, number in (numbers | {place: array.ctypes.data for place, array in arrays.items()}).items():
            sheet[place // 8] = number
        return sheet

    def settle(
        self, layer: Slots, ids: np.ndarray, guessed: np.ndarray, rows: int, scores: np.ndarray | None = None
    ) -> Settled:
        sheet = self.sheet(layer)
        policy, count = layer.policy, len(ids)
        policy.turn(ids)
        asked = ids.ctypes.data, count, guessed.ctypes.data, len(guessed), rows
        sheet[jobs.S_CAPACITY // 8 : jobs.S_GUESSED_ROWS // 8 + 1] = (
            policy.capacity,
            policy.time,
            policy.oldest(),
            *asked,
        )
        if isinstance(policy, Foresight):
            sheet[jobs.S_SCALE // 8 : jobs.S_SCALE // 8 + 1].view(np.float64)[0] = policy.scale
            sheet[jobs.S_SCORES // 8] = 0 if scores is None else scores.ctypes.data
        self.kernels.settle(sheet.ctypes.data)
        missed, reads, right = sheet[jobs.S_MISSES // 8 : jobs.S_RIGHT // 8 + 1].tolist()
        policy.count(count, missed)
        addresses, states = self._addresses[:count], self._states[:count]
        return Settled(ids, addresses, states, self._read_ids[:reads], self._read_at[:reads], missed, right)

    def settled(self, layer: Slots, ids: np.ndarray, first: int) -> Settled:
        """What a demand of `ids` came to from its place `first` on, a whole block, as copies; nothing counts as
        guessed, and all that is absent is to be read. No other demand, of any layer, was settled since."""
        left = slice(first, len(ids))
        ids, addresses, states = (each[left].copy() for each in (ids, self._addresses, self._states))
        arriving = states == STATE_ARRIVING
        addresses[arriving] = layer.address(layer.slot[ids[arriving]])
        states &= ~np.uint8(STATE_GUESSED)
        reads = (states & STATE_ABSENT) > 0
        reads[NEURON_STAGES * self.block :] = False
        return Settled(ids, addresses, states, ids[reads], addresses[reads], 0, 0)

    def surest(self, layer: Slots, scores: np.ndarray, most: int) -> np.ndarray:
        self.kernels.surest(scores, self._none.ctypes.data, layer.slot, most, self._ids, self._found, self._work)
        return self._ids[: self._found[0]].copy()

    def copy(self, layer: Slots, ids: np.ndarray, addresses: np.ndarray, memory: tuple[np.ndarray, ...]) -> None:
        self.kernels.copy(addresses, layer.address(layer.slot[ids]), layer.file.width)
