"""The experts of one demand as they come: those in memory first, the rest as their reads end, so that computing hides
reading."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from ..store.tickets import Ticket

if TYPE_CHECKING:
    from .experts import ExpertCache


class Pieces(list[torch.Tensor]):
    """What was read of an expert, uint8; and `views` of its matrices, by role, for whoever computes to keep here."""

    def __init__(self, pieces: Iterable[torch.Tensor]) -> None:
        super().__init__(pieces)
        self.views: dict[str, torch.Tensor] = {}


class Arrivals:
    """The experts of one demand on their way. Reads have begun as far as there are slots."""

    def __init__(self, cache: ExpertCache, layer: int, present: list[int], missing: list[int]) -> None:
        self.cache, self.layer = cache, layer
        # Those that go are handed out first: their slots take the reads of others.
        self.present = deque(sorted(present, key=lambda expert: cache.policy.holds(layer, expert)))
        # Right guesses come first too: else they might make way for what was not guessed.
        self.missing = deque(sorted(missing, key=lambda expert: (layer, expert) not in cache._guesses))
        self.pending: deque[tuple[int, int, Ticket]] = deque()
        self._issue()

    @property
    def busy(self) -> bool:
        """Is there something to compute and something to read."""
        return bool(self.present) and bool(self.pending or self.missing)

    def _issue(self) -> None:
        while self.missing:
            nothing_comes = not self.pending and not self.present
            begun = self.cache._begin(self.layer, self.missing[0], may_wait=nothing_comes)
            if begun is None:
                assert not nothing_comes, "no slot for a demanded expert"
                return
            self.pending.append((self.missing.popleft(), *begun))

    def batches(self) -> Iterator[list[tuple[int, Pieces]]]:
        """`slots`, and what is in them."""
        cache, layer = self.cache, self.layer
        return ([(expert, cache._pieces(layer, expert, slot)) for expert, slot in found] for found in self.slots())

    def slots(self) -> Iterator[list[tuple[int, int]]]:
        """All that are in memory already and their slots, then again and again all that have come meanwhile, as they
        are to be computed together; none is empty. Valid until the next, and to be run to the end, as single ones are.
        """
        cache, layer = self.cache, self.layer
        try:
            if self.present:
                yield [(expert, cache._slot[layer, expert]) for expert in self.present]
                while self.present:
                    self._give_back(self.present.popleft())
                self._issue()
                cache._read_ahead()
            while self.pending:
                come = [one for one in self.pending if one[2].ready]
                if not come:
                    with cache.recorder.waiting():
                        self.pending[0][2].wait()
                    come = [one for one in self.pending if one[2].ready]
                for _, _, ticket in come:
                    if ticket.error is not None:
                        ticket.wait()
                yield [(expert, slot) for expert, slot, _ in come]
                for one in come:
                    self.pending.remove(one)
                    cache._slot[layer, one[0]] = one[1]
                for one in come:
                    self._give_back(one[0])
                self._issue()
                cache._read_ahead()
        finally:
            self.abandon()

    def __iter__(self) -> Iterator[tuple[int, Pieces]]:
        cache, layer = self.cache, self.layer
        try:
            while self.present:
                expert = self.present[0]
                slot = cache._slot[layer, expert]
                yield expert, cache._pieces(layer, expert, slot)
                self.present.popleft()
                self._leave(expert)
            while self.pending:
                at = next((i for i, (_, _, ticket) in enumerate(self.pending) if ticket.ready), 0)
                expert, slot, ticket = self.pending[at]
                if not ticket.ready:
                    with cache.recorder.waiting():
                        ticket.wait()
                elif ticket.error is not None:
                    ticket.wait()
                yield expert, cache._pieces(layer, expert, slot)
                del self.pending[at]
                cache._slot[layer, expert] = slot
                self._leave(expert)
        finally:
            self.abandon()

    def _leave(self, expert: int) -> None:
        """An expert is computed: its slot takes the next read, unless it stays."""
        self._give_back(expert)
        self._issue()

    def _give_back(self, expert: int) -> None:
        if not self.cache.stays(self.layer, expert):
            self.cache._free.append(self.cache._slot.pop((self.layer, expert)))

    def abandon(self) -> None:
        """Only after an error, or when left early: what has arrived stays if it was to stay, the rest is forgotten."""
        cache, layer = self.cache, self.layer
        for expert, slot, ticket in self.pending:
            cache.store.cancel(ticket)
            ticket._done.wait()
            self._forget(expert)
            cache._free.append(slot)
        for expert in self.missing:
            self._forget(expert)
            if (layer, expert) in cache._guesses:
                cache._drop((layer, expert))
        for expert in self.present:
            if not cache.policy.holds(layer, expert):
                cache._free.append(cache._slot.pop((layer, expert)))
        for left in (self.pending, self.missing, self.present):
            left.clear()

    def _forget(self, expert: int) -> None:
        if self.cache.stays(self.layer, expert):
            self.cache.policy.discard(self.layer, expert)
