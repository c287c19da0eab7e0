"""A layer's neurons on their way to a token, call by call: the plain twin of what programs do (`kernels.sparse`), and
the way for all that no program takes: several tokens, cards, buffered reads, reads that failed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..config import NEURON_STAGES
from ..kernels.jobs import STATE_ABSENT, STATE_ARRIVING, STATE_GUESSED, STATE_NEW
from ..kernels.listed import Listed
from ..store.flash import Ticket
from .pinned import Block
from .settling import Settled
from .slots import Slots

if TYPE_CHECKING:
    from .neurons import NeuronCache


@dataclass
class Guess:
    """Records on their way, or here, that layer `index` is thought to need next: `ids` in rows 0.. of `rows`."""

    index: int
    ids: np.ndarray
    rows: np.ndarray
    ticket: Ticket


class Fetch:
    """Neurons on their way: iterate once for blocks (ids ascending, where they stand).

    What is missing is read to where it will be computed on: into a slot if the policy keeps it, else to a place in
    passing. The first NEURON_STAGES blocks are read together; of more, one for each that has been computed.
    """

    def __init__(self, cache: NeuronCache, layer: Slots, settled: Settled, guess: Guess | None) -> None:
        self.cache, self.layer, self.settled, self.guess = cache, layer, settled, guess
        self.blocks = -(-len(settled.ids) // cache.block)
        self._computed = 0  # blocks
        first = min(NEURON_STAGES, self.blocks)
        reading = len(settled.read_ids) > 0
        ticket = cache.read(layer.file, settled.read_ids, settled.read_at, self._memory(0, first)) if reading else None
        self._tickets: list[Ticket | None] = [ticket] * first

    def _part(self, index: int) -> slice:
        return slice(index * self.cache.block, (index + 1) * self.cache.block)

    def _start(self, index: int) -> Ticket | None:
        """Begin to read what of a later block is missing and not on its way, if anything is."""
        part = self._part(index)
        missing = (self.settled.states[part] & (STATE_ABSENT | STATE_GUESSED)) == STATE_ABSENT
        if not missing.any():
            return None
        ids, addresses = self.settled.ids[part][missing], self.settled.addresses[part][missing]
        return self.cache.read(self.layer.file, ids, addresses, self._memory(index, index + 1))

    def _memory(self, first: int, last: int) -> tuple[np.ndarray, ...]:
        """What addresses of blocks [first, last) may stand in, as rows."""
        width, block = self.layer.file.width, self.cache.block
        passing = self.cache.settler.passing
        rows = (passing[index % NEURON_STAGES][: block * width].reshape(-1, width) for index in range(first, last))
        return (*self.layer.memory, *rows, *(() if self.guess is None else (self.guess.rows,)))

    def _wait(self, ticket: Ticket) -> None:
        if ticket.ready:
            ticket.wait()
            return
        with self.cache.recorder.waiting():
            ticket.wait()

    def abandon(self) -> None:
        """If blocks are left: wait for reads that are under way, and let no slot be thought to hold what never came."""
        if self._computed == self.blocks:
            return
        for ticket in self._tickets[self._computed :]:
            if ticket is not None:
                ticket.end()
        left = slice(self._computed * self.cache.block, None)
        self.layer.release(self.settled.ids[left][(self.settled.states[left] & STATE_NEW) > 0])

    def __iter__(self) -> Iterator[Block]:
        layer, cache, settled = self.layer, self.cache, self.settled
        for index in range(self.blocks):
            part, ticket = self._part(index), self._tickets[index]
            if self.guess is not None and settled.right:
                self._wait(self.guess.ticket)
            if ticket is not None:
                self._wait(ticket)
            addresses, memory = settled.addresses[part], self._memory(index, index + 1)
            yield settled.ids[part], cache.hand_out(Listed(addresses, layer.file.width, memory))
            if settled.right:
                kept = np.flatnonzero(settled.states[part] == STATE_ARRIVING)
                if len(kept):
                    cache.settler.copy(layer, settled.ids[part][kept], addresses[kept], memory)
            self._computed += 1
            if len(self._tickets) < self.blocks:
                self._tickets.append(self._start(len(self._tickets)))
