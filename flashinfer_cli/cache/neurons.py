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

LEAST_MISSED = 48  # of a layer's neurons: to wait for fewer takes less time than to guess them


@dataclass
class _Guess:
    """Records on their way, or here, that layer `index` is thought to need next: `ids` in rows 0.. of `rows`."""

    index: int
    ids: np.ndarray
    rows: np.ndarray
    ticket: Ticket


class NeuronCache:
    """Neurons of all layers that have records. `fetch` brings those that a token needs, and keeps what the policy says.

    `block` neurons at most are handed out at once, so that a token that needs more than all slots hold still runs. As
    many as `guesses` of what a layer is thought to need are read ahead. The policy hears of none of them, so that hits,
    and what stays, do not depend on them.
    """

    def __init__(
        self,
        store: FlashStore,
        device: Device,
        recorder: Recorder,
        files: Mapping[int, NeuronFile],
        policies: Mapping[int, NeuronPolicy],
        block: int,
        guesses: int = 0,
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
        self.guesses = guesses
        self._staging = allocate(guesses * width) if guesses else np.empty(0, np.uint8)
        self._read: Ticket | None = None  # the last into it
        self._guess: _Guess | None = None
        self._missed = dict.fromkeys(files, 0)  # what the last token missed of each layer
        self._fetch: Fetch | None = None  # the last

    @property
    def nbytes(self) -> int:
        """All buffers: slots, and what is on its way."""
        return sum(buffer.nbytes for buffer in (*self._passing, self._staging, self._early, self._late))

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
        self._abandon()
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

    def read(self, file: NeuronFile, ids: np.ndarray, addresses: np.ndarray, memory: tuple[np.ndarray, ...]) -> Ticket:
        """Begin to read records `ids`, ascending, to `addresses`, which stand in rows of `memory`."""
        return self.store.read_records(file.path, file.base, file.width, ids, addresses, memory, "neuron")

    def fetch(self, index: int, ids: np.ndarray) -> Fetch:
        """Start bringing neurons `ids` (ascending) of a layer in; the result hands them out in that order.

        One that is not iterated to its end, because of an error or because the user wants no more, is cleared away
        before anything else.
        """
        self._abandon()
        layer = self.layers[index]
        if self.trace is not None:
            self.trace.demand("decode", index, ids[None])
        missing, gone = layer.policy.demand(ids)
        layer.release(gone)
        self._missed[index] = len(missing)
        self.recorder.cache(len(ids) - len(missing), len(missing))
        self._fetch = Fetch(self, layer, ids, self._settle(index, ids))
        return self._fetch.begin()

    def _abandon(self) -> None:
        if self._fetch is not None:
            self._fetch.abandon()
            self._fetch = None

    # ---- ahead of need
    def worth(self, index: int) -> bool:
        """Does a guess of layer `index` pay: by what the last token missed there."""
        return self.guesses > 0 and self._missed[index] >= LEAST_MISSED

    def guess(self, index: int, scores: np.ndarray) -> None:
        """Layer `index` will be asked for about the neurons of scores [count] above zero next: read those that are not
        here, and of more than there is room for the ones with the highest scores, which are the surest."""
        if not self.guesses:
            return
        self._settle(-1, np.empty(0, np.int64))
        layer, width = self.layers[index], self.layers[index].file.width
        absent = np.flatnonzero((scores > 0) & (layer.slot < 0))
        if len(absent) > self.guesses:
            absent = absent[np.argpartition(scores[absent], len(absent) - self.guesses)[-self.guesses :]]
            absent.sort()
        if len(absent):
            if self._read is not None:  # one that came out wrong may still be under way to there
                self._read.wait()
            rows = self._staging[: self.guesses * width].reshape(self.guesses, width)
            addresses = rows.ctypes.data + width * np.arange(len(absent))
            self._read = self.read(layer.file, absent, addresses, (rows,))
            self._guess = _Guess(index, absent, rows, self._read)

    def settle(self) -> None:
        """Wait for what is read ahead, so that all of it is counted."""
        self._settle(-1, np.empty(0, np.int64))
        if self._read is not None:
            self._read.wait()

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
        try:
            layer.put(taken, records.numpy()[taken - start])
        except BaseException:
            layer.release(taken)
            raise

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
    passing. The first NEURON_STAGES blocks are read together; of more, one for each that has been computed.
    """

    def __init__(self, cache: NeuronCache, layer: Slots, ids: np.ndarray, guess: _Guess | None) -> None:
        self.cache, self.layer, self.guess, self.ids = cache, layer, guess, ids
        self.passing = [buffer[: cache.block * layer.file.width] for buffer in cache._passing]
        self.blocks = -(-len(ids) // cache.block)
        self.guessed = np.zeros(len(ids), bool)  # brought by the guess
        self.addresses = np.zeros(len(ids), np.int64)
        slots = layer.slot[ids]
        absent = slots < 0
        if self.guess is not None and absent.any():
            self.guessed = absent & np.isin(ids, self.guess.ids, assume_unique=True)
        taken = layer.take(ids[absent & layer.policy.held[ids]])
        self.new = np.zeros(layer.file.count, bool)  # in a slot of its own that it is yet to reach
        self.new[taken] = True
        self.absent = absent
        self._computed = 0  # blocks
        self._tickets: list[Ticket | None] = []

    def _start(self, first: int, last: int) -> Ticket | None:
        """Begin to read what of blocks [first, last) is missing and not on its way, if anything is."""
        layer, width, size = self.layer, self.layer.file.width, self.cache.block
        part = slice(first * size, last * size)
        ids, absent, guessed = self.ids[part], self.absent[part], self.guessed[part]
        slots = layer.slot[ids]
        addresses = layer.address(slots)
        for index in range(first, last):
            here = slice((index - first) * size, (index - first + 1) * size)
            passing = slots[here] < 0
            start = self.passing[index % NEURON_STAGES].ctypes.data
            addresses[here][passing] = start + width * np.arange(int(passing.sum()))
        if self.guess is not None and guessed.any():
            where = np.searchsorted(self.guess.ids, ids[guessed])
            addresses[guessed] = self.guess.rows.ctypes.data + width * where
        self.addresses[part] = addresses
        missing = absent & ~guessed
        if not missing.any():
            return None
        return self.cache.read(layer.file, ids[missing], addresses[missing], self._memory(first, last))

    def _memory(self, first: int, last: int) -> tuple[np.ndarray, ...]:
        """What addresses of blocks [first, last) may stand in, as rows."""
        width = self.layer.file.width
        rows = (self.passing[index % NEURON_STAGES].reshape(-1, width) for index in range(first, last))
        return (*self.layer.memory, *rows, *(() if self.guess is None else (self.guess.rows,)))

    def _wait(self, ticket: Ticket) -> None:
        if ticket.ready:
            ticket.wait()
            return
        with self.cache.recorder.waiting():
            ticket.wait()

    def begin(self) -> Fetch:
        first = min(NEURON_STAGES, self.blocks)
        self._tickets = [self._start(0, first)] * first
        return self

    def abandon(self) -> None:
        """If blocks are left: wait for reads that are under way, and let no slot be thought to hold what never came."""
        for ticket in self._tickets[self._computed :]:
            if ticket is not None:
                ticket.end()
        left = self.ids[self._computed * self.cache.block :]
        self.layer.release(left[self.new[left]])

    def __iter__(self) -> Iterator[Block]:
        layer, cache, size = self.layer, self.cache, self.cache.block
        for index in range(self.blocks):
            part = slice(index * size, (index + 1) * size)
            ids, guessed, ticket = self.ids[part], self.guessed[part], self._tickets[index]
            if self.guess is not None and guessed.any():
                self._wait(self.guess.ticket)
            if ticket is not None:
                self._wait(ticket)
            where = Listed(self.addresses[part], layer.file.width, self._memory(index, index + 1))
            yield ids, cache.hand_out(where)
            kept = guessed & self.new[ids]
            if self.guess is not None and kept.any():
                layer.put(ids[kept], self.guess.rows[np.searchsorted(self.guess.ids, ids[kept])])
            self._computed += 1
            if len(self._tickets) < self.blocks:
                self._tickets.append(self._start(len(self._tickets), len(self._tickets) + 1))
