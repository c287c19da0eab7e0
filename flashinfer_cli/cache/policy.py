"""Which records may stay. Policies handle ids, never tensors, so a recorded trace can be run through them without a
model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Protocol


class Policy(Protocol):
    """A set of at most `capacity` ids; `touch` asks for one, `admit` puts one in."""

    capacity: int
    hits: int
    misses: int

    def touch(self, key: Hashable) -> bool:
        """Whether the id is held; counts a hit or a miss."""
        ...

    def admit(self, key: Hashable) -> Hashable | None:
        """Hold the id; returns the one that must go, which is the id itself where nothing can be held."""
        ...


class Lru:
    """Least recently used goes first (2312.17238 keeps k experts a layer so)."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.hits = 0
        self.misses = 0
        self._held: OrderedDict[Hashable, None] = OrderedDict()

    def touch(self, key: Hashable) -> bool:
        if key in self._held:
            self._held.move_to_end(key)
            self.hits += 1
            return True
        self.misses += 1
        return False

    def admit(self, key: Hashable) -> Hashable | None:
        assert key not in self._held
        if self.capacity == 0:
            return key
        victim = self._held.popitem(last=False)[0] if len(self._held) >= self.capacity else None
        self._held[key] = None
        return victim
