"""The expert cache (2312.17238): experts in preallocated slots, the most recently used of each layer staying.

Experts are handed out by an iterator, resident ones first and the rest as their reads end, so that computing covers
I/O. Eviction drops: weights are read-only and nothing is ever copied, a slot only changes hands.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch

from ..checkpoint.base import Extent
from ..device import Device, allocate
from ..report import Recorder
from ..store.flash import FlashStore, Span, Ticket, span_of
from .policy import Lru


class ExpertCache:
    """Slots for the experts of all layers under one byte budget.

    `extents[layer][expert]` are the pieces of an expert (one in a bundle, two or three in other files). Each layer
    keeps `per_layer` experts; `transit` more slots, at least one, take what is on its way in. All slots have one
    size, so any expert fits any slot.
    """

    def __init__(
        self,
        store: FlashStore,
        device: Device,
        recorder: Recorder,
        extents: dict[int, list[tuple[Extent, ...]]],
        *,
        per_layer: int,
        transit: int,
    ) -> None:
        assert transit >= 1
        self.store, self.device, self.recorder = store, device, recorder
        self.spans: dict[int, list[Span]] = {layer: [span_of(e) for e in experts] for layer, experts in extents.items()}
        self.extents = extents
        self.slot_bytes = max(span.nbytes for spans in self.spans.values() for span in spans)
        self.policies = {layer: Lru(min(per_layer, len(experts))) for layer, experts in extents.items()}
        count = sum(policy.capacity for policy in self.policies.values()) + transit
        self.buffer = allocate(count * self.slot_bytes)
        self._free = deque(range(count))
        self._slot: dict[tuple[int, int], int] = {}

    def fetch(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """Yield (expert, its pieces as uint8 tensors on the device) for each id, resident ones first.

        The pieces are valid until the next item is asked for. Every iterator must be run to its end or closed.
        """
        policy = self.policies[layer]
        present = [e for e in experts if policy.touch(e)]
        missing = deque(e for e in experts if (layer, e) not in self._slot)
        self.recorder.cache(len(present), len(missing))
        pending: deque[tuple[int, int, Ticket]] = deque()

        def issue() -> None:
            while missing and self._free:
                expert, slot = missing.popleft(), self._free.popleft()
                span = self.spans[layer][expert]
                place = slot * self.slot_bytes
                pending.append((expert, slot, self.store.read(span, self.buffer, place, "expert", urgent=True)))

        try:
            issue()
            for expert in present:
                yield expert, self._pieces(layer, expert, self._slot[layer, expert])
            while pending:
                expert, slot, ticket = pending[0]
                if not ticket.ready:
                    with self.recorder.waiting():
                        ticket.wait()
                elif ticket.error is not None:
                    ticket.wait()
                yield expert, self._pieces(layer, expert, slot)
                pending.popleft()
                self._admit(layer, expert, slot)
                issue()
        finally:
            for _, slot, ticket in pending:  # only after an error, or an iterator left early
                ticket._done.wait()
                self._free.append(slot)

    def _admit(self, layer: int, expert: int, slot: int) -> None:
        victim = self.policies[layer].admit(expert)
        if victim == expert:
            self._free.append(slot)
            return
        self._slot[layer, expert] = slot
        if victim is not None:
            assert isinstance(victim, int)
            self._free.append(self._slot.pop((layer, victim)))

    def _pieces(self, layer: int, expert: int, slot: int) -> list[torch.Tensor]:
        base = slot * self.slot_bytes
        starts, extents = self.spans[layer][expert].starts, self.extents[layer][expert]
        pieces = (self.buffer[base + s : base + s + e.nbytes] for s, e in zip(starts, extents, strict=True))
        return [self.device.put(torch.from_numpy(piece)) for piece in pieces]

    def fill(self) -> None:
        """Bring in every expert that may stay: where all fit, so that the first tokens are not slower than the rest."""
        for layer, policy in self.policies.items():
            for _ in self.fetch(layer, range(policy.capacity)):
                pass
            policy.hits = policy.misses = 0
