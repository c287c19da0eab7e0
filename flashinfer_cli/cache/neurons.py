"""The neuron cache of LLM in a Flash (2312.11514, 3.3): one preallocated matrix a layer, a row a neuron record.

A row holds gate row, up row and down column of a neuron, so that one read brings all of it. What a token adds is read
into rows that are free or that others leave. The order of neurons in the matrix does not matter, because those of a
token are computed on by a list of where they stand, in the order of their ids; none is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..config import NEURON_STAGES
from ..device import Device, allocate, give_back, release_free_memory
from ..kernels.listed import Listed
from ..recorder import Recorder
from ..store.flash import FlashStore, Ticket
from .pinned import Block, Tracing
from .slots import NeuronFile, Slots
from .window import NeuronPolicy


@dataclass
class _Guess:
    """Records on their way, or here, that layer `index` is thought to need next: `ids` in rows 0.. of `rows`."""

    index: int
    ids: np.ndarray
    rows: np.ndarray
    ticket: Ticket


class NeuronCache:
    """Neurons of all layers that have records. `fetch` brings those that a token needs, and keeps what the policy says.

    `block` neurons at most are handed out at once, so that a token that needs more than all slots hold still runs. With
    `guesses` there is room to read ahead for one layer what it is thought to need. The policy never hears of guesses,
    so that hits, and what stays, do not depend on them.
    """

    def __init__(
        self,
        store: FlashStore,
        device: Device,
        recorder: Recorder,
        files: Mapping[int, NeuronFile],
        policies: Mapping[int, NeuronPolicy],
        block: int,
        guesses: bool = False,
        late: Mapping[int, int] | None = None,
    ) -> None:
        self.store, self.device, self.recorder, self.block = store, device, recorder, block
        late = late or dict.fromkeys(files, 0)
        early = {layer: policies[layer].capacity - late[layer] for layer in files}
        self._early, self._late = (
            allocate(sum(slots[layer] * file.width for layer, file in files.items())) for slots in (early, late)
        )
        rows, more = (_shares(memory, files, slots) for memory, slots in ((self._early, early), (self._late, late)))
        self.layers = {layer: Slots(file, policies[layer], rows[layer], more[layer]) for layer, file in files.items()}
        self._whole = True  # are the late slots ours
        self.trace: Tracing | None = None
        width = max(file.width for file in files.values())
        # where what is read and not to stay is computed on: a place for each block on its way
        self._passing = [allocate(block * width) for _ in range(NEURON_STAGES)]
        self._staging = [allocate(NEURON_STAGES * block * width) for _ in range(2 * guesses)]  # in use, being filled
        self._reads: list[Ticket | None] = [None] * len(self._staging)  # the last into each
        self._guess: _Guess | None = None

    @property
    def nbytes(self) -> int:
        """All buffers: slots, and what is on its way."""
        return sum(buffer.nbytes for buffer in (*self._passing, *self._staging, self._early, self._late))

    @property
    def guesses(self) -> bool:
        """Is there room to read ahead for a layer."""
        return bool(self._staging)

    @property
    def room(self) -> dict[int, int]:
        """Slots by layer."""
        return {index: sum(len(part) for part in layer.memory) for index, layer in self.layers.items()}

    @property
    def prompt_room(self) -> dict[int, int]:
        """Slots by layer while a prompt is under way."""
        return {index: len(layer.memory[0]) for index, layer in self.layers.items()}

    def have(self, late: bool) -> bool:
        """Whether the late slots are ours from now on, or a prompt's; returns whether that is a change."""
        if late == self._whole or not len(self._late):
            return False
        self._whole = late
        for layer in self.layers.values():
            if late:
                layer.have_back()
            else:
                layer.give_up()
        if late:
            release_free_memory()  # what the prompt was computed in
        else:
            give_back(self._late)
        return True

    def read(
        self, file: NeuronFile, ids: np.ndarray, addresses: np.ndarray, memory: tuple[np.ndarray, ...], urgent: bool
    ) -> Ticket:
        """Begin to read records `ids`, ascending, to `addresses`, which stand in rows of `memory`."""
        where = file.path, file.base, file.width
        return self.store.read_records(*where, ids, addresses, memory, "neuron", urgent=urgent)

    def fetch(self, index: int, ids: np.ndarray) -> Fetch:
        """Start bringing neurons `ids` (ascending) of a layer in; the result hands them out in that order."""
        layer = self.layers[index]
        if self.trace is not None:
            self.trace.demand("decode", index, ids[None])
        missing, gone = layer.policy.demand(ids)
        layer.release(gone)
        self.recorder.cache(len(ids) - len(missing), len(missing))
        return Fetch(self, layer, ids, self._settle(index, ids))

    # ---- ahead of need
    def guess(self, index: int, ids: np.ndarray) -> None:
        """Layer `index` will be asked for about these next (ascending): read those that are not here, behind all else.

        Of a guess larger than the room for it, the rest is left to the demand.
        """
        if not self._staging:
            return
        self._settle(-1, ids[:0])
        layer = self.layers[index]
        room, width = NEURON_STAGES * self.block, layer.file.width
        absent = ids[layer.slot[ids] < 0][:room]
        if len(absent):
            self._staging.reverse()
            self._reads.reverse()
            if self._reads[0] is not None:  # one that came out wrong may still be under way to there
                self._reads[0].wait()
            rows = self._staging[0][: room * width].reshape(room, width)
            ticket = self.read(layer.file, absent, rows.ctypes.data + width * np.arange(len(absent)), (rows,), False)
            self._reads[0] = ticket
            self._guess = _Guess(index, absent, rows, ticket)

    def settle(self) -> None:
        """Wait for what is read ahead, so that all of it is counted."""
        self._settle(-1, np.empty(0, np.int64))
        for ticket in self._reads:
            if ticket is not None:
                ticket.wait()

    def _settle(self, index: int, ids: np.ndarray) -> _Guess | None:
        """Take the guess if it is of this layer, and count what of it was right and what was read for nothing."""
        guess, self._guess = self._guess, None
        if guess is None:
            return None
        if guess.index != index:
            guess.ticket.wait()
            ids = ids[:0]
        elif not guess.ticket.ready:
            self.store.promote(guess.ticket)
        right = int(np.isin(guess.ids, ids, assume_unique=True).sum())
        self.recorder.neuron_guess(len(guess.ids), right, self.layers[guess.index].file.width)
        return guess if guess.index == index else None

    # ---- a prompt
    def warm(self, index: int, tokens: Sequence[np.ndarray]) -> None:
        """Tokens of a prompt needed these (ascending, a token each): make room for what will be worth having."""
        layer = self.layers[index]
        for ids in tokens:
            if self.trace is not None:
                self.trace.demand("prefill", index, ids[None])
            layer.policy.demand(ids, counted=False)
        layer.release(np.flatnonzero(~layer.policy.held))

    def fill(self, index: int, start: int, records: torch.Tensor) -> None:
        """Records [start, start + n) of a layer pass by, uint8 [n, width]: keep those that the policy wants here."""
        layer = self.layers[index]
        here = slice(start, start + len(records))
        wanted = np.flatnonzero(layer.policy.held[here] & (layer.slot[here] < 0))
        taken = layer.take(start + wanted)
        layer.put(taken, records.numpy()[taken - start])

    def here(self, index: int, ids: np.ndarray) -> Iterator[Block]:
        """Those of neurons `ids` that are in memory, as `fetch` hands them out. Reads nothing, and nothing is noted."""
        layer = self.layers[index]
        ids = ids[layer.slot[ids] >= 0]
        for first in range(0, len(ids), self.block):
            block = ids[first : first + self.block]
            yield block, self.hand_out(Listed(layer.address(layer.slot[block]), layer.file.width, layer.memory))

    def hand_out(self, records: Listed) -> Listed | torch.Tensor:
        """Where kernels find them: on the host where they stand, on a card as copies."""
        return records if self.device.is_host else self.device.put(records.gather())


def _shares(memory: np.ndarray, files: Mapping[int, NeuronFile], slots: Mapping[int, int]) -> dict[int, np.ndarray]:
    """Rows of records for each layer, uint8 [slots, width], one layer's behind the other's."""
    found, place = {}, 0
    for layer, file in files.items():
        found[layer] = memory[place : place + slots[layer] * file.width].reshape(slots[layer], file.width)
        place += slots[layer] * file.width
    return found


class Fetch:
    """Neurons on their way: iterate once for blocks (ids ascending, where they stand).

    What is missing is read to where it will be computed on: into a slot if the policy keeps it, else to a place in
    passing. Reads of NEURON_STAGES blocks are under way while the first of them is computed.
    """

    def __init__(self, cache: NeuronCache, layer: Slots, ids: np.ndarray, guess: _Guess | None) -> None:
        self.cache, self.layer, self.guess = cache, layer, guess
        width = layer.file.width
        self.passing = [buffer[: cache.block * width].reshape(cache.block, width) for buffer in cache._passing]
        self.blocks = [ids[i : i + cache.block] for i in range(0, len(ids), cache.block)]
        absent = ids[layer.slot[ids] < 0]
        self.new = np.zeros(layer.file.count, bool)  # in a slot of its own that it is yet to reach
        self.new[layer.take(absent[layer.policy.held[absent]])] = True
        self._begun = [self._start(i) for i in range(min(NEURON_STAGES, len(self.blocks)))]

    def _start(self, index: int) -> tuple[np.ndarray, np.ndarray, Ticket | None]:
        """Read what of a block is missing and not on its way: where each stands, which ones a guess brings, the rest's
        ticket."""
        layer, block, rows = self.layer, self.blocks[index], self.passing[index % NEURON_STAGES]
        slots = layer.slot[block]
        addresses = layer.address(slots)
        passing = slots < 0
        addresses[passing] = rows.ctypes.data + layer.file.width * np.arange(int(passing.sum()))
        missing = passing | self.new[block]
        guessed = np.zeros(len(block), bool)
        if self.guess is not None:
            guessed = missing & np.isin(block, self.guess.ids, assume_unique=True)
            where = np.searchsorted(self.guess.ids, block[guessed])
            addresses[guessed] = self.guess.rows.ctypes.data + layer.file.width * where
            missing &= ~guessed
        if not missing.any():
            return addresses, guessed, None
        ticket = self.cache.read(layer.file, block[missing], addresses[missing], (*layer.memory, rows), True)
        return addresses, guessed, ticket

    def _wait(self, ticket: Ticket) -> None:
        try:
            if not ticket.ready:
                with self.cache.recorder.waiting():
                    ticket.wait()
            elif ticket.error is not None:
                ticket.wait()
        except Exception:  # nothing came: no slot may be thought to hold it
            self.layer.release(np.flatnonzero(self.new))
            raise

    def __iter__(self) -> Iterator[Block]:
        layer, cache = self.layer, self.cache
        for index, block in enumerate(self.blocks):
            addresses, guessed, ticket = self._begun[index]
            memory: tuple[np.ndarray, ...] = (*layer.memory, self.passing[index % NEURON_STAGES])
            if self.guess is not None and guessed.any():
                self._wait(self.guess.ticket)
                memory += (self.guess.rows,)
            if ticket is not None:
                self._wait(ticket)
            yield block, cache.hand_out(Listed(addresses, layer.file.width, memory))
            kept = guessed & self.new[block]
            if self.guess is not None and kept.any():
                where = np.searchsorted(self.guess.ids, block[kept])
                layer.put(block[kept], self.guess.rows[where])
            if len(self._begun) < len(self.blocks):
                self._begun.append(self._start(len(self._begun)))
