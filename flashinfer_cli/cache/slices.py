"""Slices: the records of plain streaming. A slice is a run of rows that is brought in, used and let go as one.

Some slices are pinned in memory for good; the rest come through a ring in the order of the forward pass, which is
known, so the guess of what is needed next is certain. Where the cut lies depends on the budget; the slices themselves
do not, so the order of every sum, and with it every bit of the result, is the same whatever the budget.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from ..checkpoint.base import Extent
from ..device import Device, allocate, give_back
from ..recorder import Recorder
from ..store.flash import FlashStore, Ticket
from ..store.spans import ALIGN, Span, span_of


class Slice:
    """One run of rows: where it stands on flash, and its bytes once it is pinned."""

    __slots__ = ("extent", "home", "span")

    def __init__(self, extent: Extent) -> None:
        self.extent = extent
        self.span: Span = span_of([extent])
        self.home: torch.Tensor | None = None  # uint8 [nbytes] on the computing device

    @property
    def nbytes(self) -> int:
        return self.extent.nbytes


class Ring:
    """A circular buffer that scheduled slices pass through, first in, first out, read ahead as far as there is room."""

    def __init__(self, store: FlashStore, nbytes: int, *, urgent: bool = False) -> None:
        self.store = store
        self.urgent = urgent  # its reads go before those of what is only read ahead
        self.nbytes = nbytes // ALIGN * ALIGN
        self.buffer = allocate(self.nbytes)
        self._planned: deque[Slice] = deque()
        self._live: deque[tuple[Slice, int, Ticket]] = deque()  # reading or in use, oldest first
        self._head = 0
        self._in_use = False

    @property
    def scheduled(self) -> int:
        """Slices scheduled and not yet taken."""
        return len(self._planned) + len(self._live) - self._in_use

    def schedule(self, slices: Sequence[Slice]) -> None:
        """Add slices to what will be taken, in this order, and start reading."""
        self._planned.extend(slices)
        self._pump()

    def take(self, wanted: Slice) -> tuple[np.ndarray, Ticket]:
        """The bytes of the oldest scheduled slice, which must be `wanted`, and the ticket to wait on before using
        them."""
        assert not self._in_use, "the slice before is still in use"
        slice_, place, ticket = self._live[0]
        assert slice_ is wanted, "slices are taken in the order they were scheduled"
        self._in_use = True
        start = place + slice_.span.starts[0]
        return self.buffer[start : start + slice_.nbytes], ticket

    def release(self) -> None:
        """Give the room of the slice in use to those that follow."""
        assert self._in_use
        self._live.popleft()
        self._in_use = False
        self._pump()

    def cancel(self) -> None:
        """Drop what is scheduled; bytes already read for it are counted as wasted."""
        self._planned.clear()
        for slice_, _, ticket in self._live:
            ticket._done.wait()
            self.store.recorder.wasted_bytes += slice_.span.nbytes
        self._live.clear()
        self._in_use = False
        self._head = 0

    def _room(self, size: int) -> int | None:
        """Where `size` bytes fit behind the newest slice, or None."""
        if not self._live:
            return 0 if size <= self.nbytes else None
        tail = self._live[0][1]
        if self._head > tail:
            if self._head + size <= self.nbytes:
                return self._head
            return 0 if size <= tail else None
        return self._head if self._head + size <= tail else None

    def _pump(self) -> None:
        while self._planned:
            slice_ = self._planned[0]
            place = self._room(slice_.span.nbytes)
            if place is None:
                assert self._live, "a slice larger than the ring"
                return
            self._planned.popleft()
            ticket = self.store.read(slice_.span, self.buffer, place, "slice", urgent=self.urgent)
            self._live.append((slice_, place, ticket))
            self._head = place + slice_.span.nbytes


class Feed:
    """Hands out the bytes of slices, pinned or streamed, as uint8 tensors on the computing device.

    A pass is announced before it runs (`begin`), with the passes known to follow it, so that reading goes on across
    the end of a token. `order(with_head)` is fixed when the model is built.
    """

    def __init__(self, store: FlashStore, device: Device, recorder: Recorder) -> None:
        self.store = store
        self.device = device
        self.recorder = recorder
        self.ring: Ring | None = None
        self.demand_ring: Ring | None = None
        self.stays: list[Slice] = []  # what is pinned
        self.changes = 0  # times that what is pinned changed
        self.progress: Callable[[int, int], None] | None = None  # bytes pinned, of how many
        self._passes: deque[tuple[Slice, ...]] = deque()
        self._demanded: set[Slice] = set()

    def pin(self, slices: Sequence[Slice]) -> None:
        """Bring slices in for good."""
        if not slices:
            return
        self.changes += 1
        total, done = sum(s.span.nbytes for s in slices), 0
        # On the host slices are read to where they stay; on a card they pass through a staging ring.
        home = allocate(total) if self.device.is_host else None
        staging = None if home is not None else Ring(self.store, 8 * max(s.span.nbytes for s in slices))
        tickets = []
        if home is not None:
            place = 0
            for slice_ in slices:
                tickets.append(self.store.read(slice_.span, home, place, "pinned"))
                start = place + slice_.span.starts[0]
                slice_.home = torch.from_numpy(home[start : start + slice_.nbytes])
                place += slice_.span.nbytes
        elif staging is not None:
            staging.schedule(slices)
        for index, slice_ in enumerate(slices):
            if staging is None:
                tickets[index].wait()
            else:
                data, ticket = staging.take(slice_)
                ticket.wait()
                slice_.home = self.device.put(torch.from_numpy(data))
                staging.release()
            self.stays.append(slice_)
            done += slice_.span.nbytes
            if self.progress is not None:
                self.progress(done, total)

    def unpin(self, slices: Sequence[Slice]) -> None:
        """Let go of slices that were pinned; their memory is given back when all that came with them are."""
        self.changes += 1
        for slice_ in slices:
            slice_.home = None
        gone = set(slices)
        self.stays = [s for s in self.stays if s not in gone]

    @property
    def pinned_bytes(self) -> int:
        return sum(s.span.nbytes for s in self.stays)

    @contextmanager
    def hold(self, slices: Sequence[Slice]) -> Iterator[None]:
        """Have slices here for the length of the block, in memory beside the plan's: to use them many times over."""
        streamed = [s for s in slices if s.home is None]
        self.pin(streamed)
        try:
            yield
        finally:
            self.unpin(streamed)

    def open_ring(self, nbytes: int, demand: int = 0) -> None:
        """Make the ring that scheduled slices pass through, and the one for slices on demand; 0 where none do."""
        self.ring = Ring(self.store, nbytes) if nbytes else None
        self.demand_ring = Ring(self.store, demand, urgent=True) if demand else None

    def demand(self, slices: Sequence[Slice]) -> None:
        """Ask now for slices that no pass announced: a block that this token does not skip. They are used in order."""
        streamed = [s for s in slices if s.home is None]
        if streamed:
            assert self.demand_ring is not None
            self._demanded.update(streamed)
            self.demand_ring.schedule(streamed)

    def rest(self) -> None:
        """Give back the memory of the ring for demanded slices while it holds none; it comes back when it is used."""
        if self.demand_ring is not None and not self.demand_ring.scheduled:
            give_back(self.demand_ring.buffer)

    def begin(self, streamed: tuple[Slice, ...], following: Sequence[tuple[Slice, ...]] = ()) -> None:
        """Announce the pass that starts now and those that will follow: the slices of each that are not pinned, in
        order."""
        if self.ring is None:
            return
        expected = [streamed, *following]
        planned = list(self._passes)
        if planned != expected[: len(planned)]:
            self.end()
            planned = []
        for one in expected[len(planned) :]:
            self.ring.schedule(one)
            self._passes.append(one)
        self._passes.popleft()

    def end(self) -> None:
        """No pass follows: stop reading ahead."""
        for ring in (self.ring, self.demand_ring):
            if ring is not None:
                ring.cancel()
        self._passes.clear()
        self._demanded.clear()

    @contextmanager
    def use(self, slice_: Slice) -> Iterator[torch.Tensor]:
        """The bytes of a slice, uint8 [nbytes], valid inside the block."""
        if slice_.home is not None:
            self.recorder.cache(1, 0)
            yield slice_.home
            return
        ring = self.demand_ring if slice_ in self._demanded else self.ring
        assert ring is not None
        self._demanded.discard(slice_)
        data, ticket = ring.take(slice_)
        self.recorder.cache(0, 1)
        if not ticket.ready:
            with self.recorder.waiting():
                ticket.wait()
        elif ticket.error is not None:
            ticket.wait()
        try:
            yield self.device.put(torch.from_numpy(data))
        finally:
            ring.release()
