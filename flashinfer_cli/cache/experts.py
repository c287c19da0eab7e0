"""The expert cache (2312.17238): experts in preallocated slots under one byte budget, any expert in any slot.

Which experts stay is the policy's to say, at the moment they are demanded; so the slots of those that go take the
reads at once. Experts are handed out by an iterator, resident ones first and the rest as their reads end, so that
computing covers I/O. Eviction drops: weights are read-only and nothing is ever copied, a slot only changes hands.

Guesses of what a layer will need (speculative loading) are read into transit slots, behind every demanded read. One
that is demanded becomes the read that would have been made; the others are taken back, and nothing of them stays. The
policy never hears of guesses, so hits, and what stays, do not depend on timing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..checkpoint.base import Extent
from ..device import Device, allocate
from ..recorder import Recorder
from ..store.flash import FlashStore, Ticket
from ..store.spans import Span, span_of
from .arrivals import Arrivals, Pieces
from .expert_policies import Adaptive, Foresight
from .guesses import Guessing
from .policy import Key, Policy
from .trace import TraceWriter

MOST_WORTH = 64  # uses
WORTH_STEPS = 1 << 16  # of one expected use: among many experts a router gives each little


@dataclass
class _Guess:
    slot: int
    ticket: Ticket
    rank: int
    nbytes: int


class ExpertCache:
    """Slots for the experts of all layers.

    `extents[layer][expert]` are the pieces of an expert (one in a bundle, more in other files); behind all of a layer's
    experts may stand small copies of them, in the same order, which pass through and never stay. `policy` keeps
    as many experts as it has room for, 0 at the least; `transit` more slots, at least one, take what is on its way in,
    and all but one of them may hold guesses.
    """

    def __init__(
        self,
        store: FlashStore,
        device: Device,
        recorder: Recorder,
        extents: dict[int, list[tuple[Extent, ...]]],
        *,
        policy: Policy,
        transit: int,
        prefetch: str | int = "off",
        lookahead: int = 1,
    ) -> None:
        assert transit >= 1
        self.store, self.device, self.recorder = store, device, recorder
        self.spans: dict[int, list[Span]] = {layer: [span_of(e) for e in experts] for layer, experts in extents.items()}
        self.extents = extents
        self.slot_bytes = max(span.nbytes for spans in self.spans.values() for span in spans)
        self.policy = policy
        self.first_layer = min(extents)
        spare = 0 if policy.capacity >= policy.total else transit - 1
        self.guessing = Guessing(prefetch, spare)
        self.lookahead = lookahead
        self.trace: TraceWriter | None = None
        self.slots = policy.capacity + transit
        self.buffer = allocate(self.slots * self.slot_bytes)
        self.address: int = self.buffer.ctypes.data
        self._free = deque(range(self.slots))
        self._slot: dict[Key, int] = {}
        self._known: dict[Key, tuple[int, Pieces]] = {}  # of experts that stay: their slots, and tensors on them
        self._guesses: dict[Key, _Guess] = {}
        self._wanted: deque[tuple[int, int, int]] = deque()  # guesses to read once there is room: layer, expert, rank
        self._draining: list[tuple[int, Ticket]] = []  # slots of guesses taken back, until their reads end
        self._arrivals: Arrivals | None = None
        self._named: dict[int, dict[int, list[int]]] = {}  # layer -> layers ahead -> experts guessed, best first

    # ---- demands
    @property
    def foresees(self) -> bool:
        """Whether anybody cares what experts are thought to be worth."""
        policy = self.policy
        return self.trace is not None or (
            isinstance(policy, Foresight | Adaptive) and 0 < policy.capacity < policy.total
        )

    def expect(self, layer: int, worth: torch.Tensor) -> None:
        """Ahead of a demand: what each expert of the layer is thought to be worth from it on, [E]."""
        steps = np.rint(np.clip(worth.cpu().numpy(), -MOST_WORTH, MOST_WORTH) * WORTH_STEPS)
        whole = steps.astype(np.int64)  # whole numbers, as a trace keeps them
        if self.trace is not None:
            self.trace.expect(layer, whole)
        self.policy.expect(layer, whole)

    def fetch(self, layer: int, chosen: np.ndarray, small: Sequence[int] = ()) -> Arrivals:
        """Start bringing in what the tokens of a pass chose, int [T, k], best first, -1 for none; and the `small`
        copies of these experts, which come as number E + expert.

        The result yields (expert, its pieces as uint8 tensors on the device), resident ones first. The pieces are
        valid until the next item is asked for. It must be run to its end or closed before the next fetch.
        """
        recorder = self.recorder
        if self._arrivals is not None:
            self._arrivals.abandon()
        if layer == self.first_layer and recorder.phase == "decode":
            self.guessing.begin(recorder.steps[-1].seconds if recorder.steps else None)
        if self.trace is not None:
            self.trace.demand(recorder.phase, layer, chosen)
        outcome = self.policy.demand(layer, chosen, recorder.phase)
        recorder.cache(len(outcome.present), len(outcome.missing))
        needed = {*outcome.present, *outcome.missing}
        recorder.experts(layer, outcome.present, outcome.missing, self._named.pop(layer, {}))
        for key in outcome.gone:
            if key[0] != layer or key[1] not in needed:
                self._free.append(self._slot.pop(key))
                self._known.pop(key, None)
        for key in [key for key in self._guesses if key[0] == layer and key[1] not in needed]:
            self._drop(key)
        if self._wanted:
            self._wanted = deque(one for one in self._wanted if one[0] != layer)
        if small:
            recorder.degraded(layer, len(small))
        copies = [self.policy.records[layer] + expert for expert in small]
        self._arrivals = Arrivals(self, layer, outcome.present, [*outcome.missing, *copies])
        return self._arrivals

    def _begin(self, layer: int, expert: int, *, may_wait: bool) -> tuple[int, Ticket] | None:
        """Start reading a demanded expert, or take over the guess that did; None where there is no slot yet."""
        guess = self._guesses.pop((layer, expert), None)
        if guess is not None:
            begun = guess.ticket.ready or self.store.promote(guess.ticket)
            self.guessing.settle(guess.rank, True, begun)
            self.recorder.guess(layer, right=True, nbytes=0)
            return guess.slot, guess.ticket
        slot = self._take(may_wait)
        if slot is None:
            return None
        span = self.spans[layer][expert]
        return slot, self.store.read(span, self.buffer, slot * self.slot_bytes, "expert", urgent=True)

    def _take(self, may_wait: bool) -> int | None:
        """A free slot; guesses make way, the newest first, and are waited for only where nothing else is coming."""
        if not self._free:
            self._drain()
        while not self._free and self._guesses:
            self._drop(next(reversed(self._guesses)))
        if not self._free and may_wait and self._draining:
            with self.recorder.waiting():
                self._draining[0][1]._done.wait()
            self._drain()
        return self._free.popleft() if self._free else None

    def stays(self, layer: int, expert: int) -> bool:
        return expert < self.policy.records[layer] and self.policy.holds(layer, expert)

    def here(self, layer: int) -> dict[int, Pieces]:
        """The experts of a layer that are in memory, and their pieces. Reads nothing, and the policy hears nothing."""
        found = [expert for expert in range(self.policy.records[layer]) if (layer, expert) in self._slot]
        return {expert: self._pieces(layer, expert, self._slot[layer, expert]) for expert in found}

    # ---- guesses
    @property
    def distances(self) -> tuple[int, ...]:
        """How many layers ahead to guess."""
        if self.trace is not None:
            return (1, 2, 4)
        return tuple(range(1, self.lookahead + 1)) if self.guessing.active else ()

    def guess(self, layer: int, ahead: int, experts: Sequence[int]) -> None:
        """`experts`, best first, are what a layer to come is thought to need: read the first of them ahead of need."""
        self._named.setdefault(layer, {})[ahead] = list(experts)
        if self.trace is not None:
            self.trace.guess(layer, ahead, list(experts))
        if ahead > self.lookahead:
            return
        self._wanted += [(layer, expert, rank) for rank, expert in enumerate(experts[: self.guessing.number()])]
        self._read_ahead()

    def _read_ahead(self) -> None:
        """Begin what guesses have named and had no room for so far, in their order; behind all that is demanded."""
        if self._draining:
            self._drain()
        if self._arrivals is not None and self._arrivals.missing:
            return
        while self._wanted:
            layer, expert, rank = self._wanted[0]
            key = (layer, expert)
            if key not in self._slot and key not in self._guesses:
                if len(self._guesses) + len(self._draining) >= self.guessing.most or not self._free:
                    return
                slot, span = self._free.popleft(), self.spans[layer][expert]
                ticket = self.store.read(span, self.buffer, slot * self.slot_bytes, "guess")
                self._guesses[key] = _Guess(slot, ticket, rank, span.nbytes)
            self._wanted.popleft()

    def _drop(self, key: Key) -> None:
        guess = self._guesses.pop(key)
        begun = self.store.cancel(guess.ticket)
        self.guessing.settle(guess.rank, False, begun)
        self.recorder.guess(key[0], right=False, nbytes=sum(guess.ticket.sizes))
        if guess.ticket.ready:
            self._free.append(guess.slot)
        else:
            self._draining.append((guess.slot, guess.ticket))

    def _drain(self) -> None:
        """Take back the slots of guesses whose reads have ended by now."""
        if self._draining:
            self._free.extend(slot for slot, ticket in self._draining if ticket.ready)
            self._draining = [(slot, ticket) for slot, ticket in self._draining if not ticket.ready]

    # ---- what is here
    def _pieces(self, layer: int, expert: int, slot: int) -> Pieces:
        known = self._known.get((layer, expert))
        if known is not None and known[0] == slot:
            return known[1]
        base = slot * self.slot_bytes
        starts, extents = self.spans[layer][expert].starts, self.extents[layer][expert]
        pieces = (self.buffer[base + s : base + s + e.nbytes] for s, e in zip(starts, extents, strict=True))
        made = Pieces(self.device.put(torch.from_numpy(piece)) for piece in pieces)
        if self.device.is_host and self.stays(layer, expert):
            self._known[layer, expert] = slot, made
        return made

    def fill(self) -> None:
        """Bring in every expert: where all fit, so that the first tokens are not slower than the rest."""
        for layer, count in self.policy.records.items():
            for _ in self.fetch(layer, np.arange(count)[None]):
                pass
