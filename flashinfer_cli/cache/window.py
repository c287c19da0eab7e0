"""Which neurons of a layer stay: policies over the ids of one layer, whole sets at a time, as tokens come.

A token demands a few hundred of several thousand neurons, so these policies work on arrays rather than on single ids.
They never see a weight, and a recorded trace runs through them without a model.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

NEVER = np.iinfo(np.int64).min // 2


class NeuronPolicy(Protocol):
    """At most `capacity` of `count` ids. `hits` and `misses` count demanded ids."""

    capacity: int
    hits: int
    misses: int
    held: np.ndarray  # bool [count]

    def demand(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ids (ascending) that the next token needs -> (those that are not held, those to let go for them).

        Afterwards what was missing counts as held, as far as there is room.
        """
        ...


class _Ranked:
    """What the policies share: those of lowest rank go first, none that this very token demands."""

    def __init__(self, count: int, capacity: int) -> None:
        self.capacity = min(capacity, count)
        self.hits = self.misses = 0
        self.held = np.zeros(count, bool)
        self.time = 0
        self.last = np.full(count, NEVER, np.int64)  # when each was demanded last

    def ranks(self) -> np.ndarray:
        """Of all ids, higher for what should stay longer."""
        raise NotImplementedError

    def expired(self) -> np.ndarray:
        """Ids that go whether or not there is need for room; none by default."""
        return np.empty(0, np.int64)

    def note(self, ids: np.ndarray) -> None:
        self.last[ids] = self.time

    def demand(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.time += 1
        present = self.held[ids]
        missing = ids[~present]
        self.hits += int(present.sum())
        self.misses += len(missing)
        self.note(ids)
        gone = self.expired()
        self.held[gone] = False
        free = self.capacity - int(self.held.sum())
        if len(missing) > free:
            candidates = np.flatnonzero(self.held)
            candidates = candidates[self.last[candidates] < self.time]
            count = min(len(missing) - free, len(candidates))
            if count:
                order = np.argsort(self.ranks()[candidates], kind="stable")
                victims = candidates[order[:count]]
                self.held[victims] = False
                gone = np.concatenate([gone, victims])
                free += count
        self.held[missing[:free]] = True
        return missing, gone


class Window(_Ranked):
    """The union of what the last `k` tokens demanded (2312.11514, 3.1); where that is too much, a shorter window."""

    def __init__(self, count: int, capacity: int, k: int) -> None:
        super().__init__(count, capacity)
        self.k = k

    def ranks(self) -> np.ndarray:
        return self.last

    def expired(self) -> np.ndarray:
        return np.flatnonzero(self.held & (self.last <= self.time - self.k))


class Recent(_Ranked):
    """Least recently demanded goes first, and only when its room is needed."""

    def ranks(self) -> np.ndarray:
        return self.last


class Frequent(_Ranked):
    """Least often demanded goes first, each count fading by `decay` a token, so that old habits are forgotten."""

    def __init__(self, count: int, capacity: int, decay: float = 0.98) -> None:
        super().__init__(count, capacity)
        self.decay = decay
        self.score = np.zeros(count, np.float64)
        self._weight = 1.0  # grows instead of all scores shrinking

    def note(self, ids: np.ndarray) -> None:
        super().note(ids)
        self._weight /= self.decay
        self.score[ids] += self._weight
        if self._weight > 1e100:
            self.score /= self._weight
            self._weight = 1.0

    def ranks(self) -> np.ndarray:
        return self.score


POLICIES = ("recent", "window", "frequent")


def make_policy(name: str, count: int, capacity: int, window: int) -> NeuronPolicy:
    """A policy by name; `window` is the tokens a Window spans."""
    if name == "window":
        return Window(count, capacity, window)
    return Recent(count, capacity) if name == "recent" else Frequent(count, capacity)
