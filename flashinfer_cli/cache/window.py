"""Which neurons of a layer stay: policies over the ids of one layer, whole sets at a time, as tokens come.

A token demands a few hundred of several thousand neurons, so these policies work on arrays rather than on single ids.
They never see a weight, and a recorded trace runs through them without a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from ..config import NEURON_WINDOW
from ..kernels.jobs import MOST_WORTH, SCORE_STEPS, WORTH_BITS

NEVER = np.iinfo(np.int64).min // 2
USES_WORTH = 8  # to be named by every token is worth as much as a score of so much
USES_HALF_LIFE = 32  # tokens, after which a use counts half


def worth_of(scores: np.ndarray) -> np.ndarray:
    """What neurons with these scores of a predictor, float32 [count], are worth to tokens to come: whole numbers, as
    traces keep them. One that was nearly named is likely to be named next."""
    return np.clip(np.floor(scores * np.float32(SCORE_STEPS)), -MOST_WORTH, MOST_WORTH).astype(np.int64)


class NeuronPolicy(Protocol):
    """At most `capacity` of `count` ids. `hits` and `misses` count demanded ids."""

    capacity: int
    hits: int
    misses: int
    held: np.ndarray  # bool [count]
    last: np.ndarray  # int64 [count]: the time when each was demanded last
    time: int  # tokens so far

    def expect(self, worth: np.ndarray) -> None:
        """Ahead of a demand: what each id is thought to be worth from it on, int64 [count]; who cares listens."""
        ...

    def advance(self) -> float:
        """The next token's time comes; returns what its demand adds to the `tally` of each id."""
        ...

    @property
    def tally(self) -> np.ndarray | None:
        """float64 [count], for a policy that counts uses. Always the same memory."""
        ...

    def turn(self, ids: np.ndarray) -> None:
        """`advance`, and the token demands `ids`."""
        ...

    def ranks(self) -> np.ndarray:
        """int64, or floats not below zero, of all ids: higher for what should stay longer. Always the same memory. Of
        `Foresight` what decides among ids of equal worth."""
        ...

    def oldest(self) -> int:
        """What was demanded last at this time or before goes whether or not there is need for room."""
        ...

    def count(self, asked: int, missed: int) -> None:
        """So many ids were demanded, of which so many were not held."""
        ...

    def demand(self, ids: np.ndarray, counted: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """The ids (ascending) that the next token needs -> (those that are not held, those to let go for them).

        Afterwards what was missing counts as held, as far as there is room. Tokens of a prompt, which go through all
        neurons, are not `counted`: they only say what is worth having when it ends.
        """
        ...

    def resize(self, capacity: int) -> np.ndarray:
        """Hold at most so many from now on; returns the ids to let go."""
        ...


class _Ranked:
    """What the policies share: those of lowest rank go first, none that this very token demands; of what it demands,
    where not all can stay, the first."""

    def __init__(self, count: int, capacity: int) -> None:
        self.capacity = min(capacity, count)
        self.hits = self.misses = 0
        self.held = np.zeros(count, bool)
        self.time = 0
        self.last = np.full(count, NEVER, np.int64)  # when each was demanded last

    def ranks(self) -> np.ndarray:
        raise NotImplementedError

    def ranks_of(self, ids: np.ndarray) -> np.ndarray:
        return self.ranks()[ids]

    def first(self, missing: np.ndarray) -> np.ndarray:
        """What came in (ascending), in the order in which it is to have room."""
        return missing

    def oldest(self) -> int:
        return NEVER

    def expect(self, worth: np.ndarray) -> None:
        """Only `Foresight` asks."""

    def advance(self) -> float:
        self.time += 1
        return 0.0

    @property
    def tally(self) -> np.ndarray | None:
        return None

    def turn(self, ids: np.ndarray) -> None:
        adds = self.advance()
        self.last[ids] = self.time
        if self.tally is not None:
            self.tally[ids] += adds

    def count(self, asked: int, missed: int) -> None:
        self.hits += asked - missed
        self.misses += missed

    def demand(self, ids: np.ndarray, counted: bool = True) -> tuple[np.ndarray, np.ndarray]:
        self.turn(ids)
        missing = ids[~self.held[ids]]
        if counted:
            self.count(len(ids), len(missing))
        gone = np.flatnonzero(self.held & (self.last <= self.oldest()))
        self.held[gone] = False
        free = self.capacity - int(self.held.sum())
        if len(missing) > free:
            candidates = np.flatnonzero(self.held)
            candidates = candidates[self.last[candidates] < self.time]
            count = min(len(missing) - free, len(candidates))
            if count:
                order = np.argsort(self.ranks_of(candidates), kind="stable")
                victims = candidates[order[:count]]
                self.held[victims] = False
                gone = np.concatenate([gone, victims])
                free += count
        self.held[self.first(missing)[:free]] = True
        return missing, gone

    def resize(self, capacity: int) -> np.ndarray:
        self.capacity = min(capacity, len(self.held))
        held = np.flatnonzero(self.held)
        gone = held[np.argsort(self.ranks_of(held), kind="stable")[: max(0, len(held) - self.capacity)]]
        self.held[gone] = False
        return gone


class Window(_Ranked):
    """The union of what the last `k` tokens demanded (2312.11514, 3.1); where that is too much, a shorter window."""

    def __init__(self, count: int, capacity: int, k: int) -> None:
        super().__init__(count, capacity)
        self.k = k

    def ranks(self) -> np.ndarray:
        return self.last

    def oldest(self) -> int:
        return self.time - self.k


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

    def advance(self) -> float:
        super().advance()
        self._weight /= self.decay
        if self._weight > 1e100:
            self.score /= self._weight
            self._weight = 1.0
        return self._weight

    @property
    def tally(self) -> np.ndarray:
        return self.score

    def ranks(self) -> np.ndarray:
        return self.score


class Foresight(Frequent):
    """What the token was furthest from asking for goes first, by the scores of the layer's predictor and by how often
    each was named of late; and of what it asked for, where not all can stay, what would go last. Among equals the
    longest unused goes first."""

    def __init__(self, count: int, capacity: int) -> None:
        super().__init__(count, capacity, decay=0.5 ** (1 / USES_HALF_LIFE))
        self._worth = np.zeros(count, np.int64)

    @property
    def scale(self) -> float:
        """What turns `score` into steps of worth."""
        return SCORE_STEPS * USES_WORTH * (1 - self.decay) / self._weight

    def expect(self, worth: np.ndarray) -> None:
        self._worth[:] = worth

    def demand(self, ids: np.ndarray, counted: bool = True) -> tuple[np.ndarray, np.ndarray]:
        found = super().demand(ids, counted)
        self._worth[:] = 0  # it was of this token
        return found

    def resize(self, capacity: int) -> np.ndarray:
        said, self._worth = self._worth, np.zeros_like(self._worth)  # by uses alone, whenever scores come
        gone = super().resize(capacity)
        self._worth = said
        return gone

    def ranks(self) -> np.ndarray:
        return self.last

    def _worths(self, ids: np.ndarray) -> np.ndarray:
        return self._worth[ids] + np.floor(self.score[ids] * self.scale).astype(np.int64)

    def ranks_of(self, ids: np.ndarray) -> np.ndarray:
        return (self._worths(ids) << WORTH_BITS) + self.last[ids]

    def first(self, missing: np.ndarray) -> np.ndarray:
        return missing[np.argsort(-self._worths(missing), kind="stable")]


def make_policy(name: str, count: int, capacity: int, window: int | None = None) -> NeuronPolicy:
    """A policy by name; `window` is the tokens a Window spans, where that is not the usual."""
    if name == "window":
        return Window(count, capacity, window or NEURON_WINDOW)
    return {"recent": Recent, "foresight": Foresight, "frequent": Frequent}[name](count, capacity)


def deal(room: int, counts: Mapping[int, int], widths: Mapping[int, int], wants: Mapping[int, float]) -> dict[int, int]:
    """Slots by layer within `room` bytes, in proportion to what each wants, none more than it has neurons.

    `counts` neurons of `widths` bytes; `wants` the share of them that a window of tokens was seen to need. Where there
    is less room than that, all shrink alike.
    """
    need = {layer: max(wants.get(layer, 1.0), 1e-3) * counts[layer] for layer in counts}

    def slots(factor: float) -> dict[int, int]:
        return {layer: min(counts[layer], int(factor * need[layer])) for layer in counts}

    low, high = 0.0, 1.0 + max((counts[layer] / need[layer] for layer in counts), default=0.0)
    for _ in range(60):
        middle = (low + high) / 2
        fits = sum(widths[layer] * n for layer, n in slots(middle).items()) <= room
        low, high = (middle, high) if fits else (low, middle)
    found = slots(low)
    left = room - sum(widths[layer] * n for layer, n in found.items())
    for layer in sorted(counts, key=lambda layer: -need[layer]):
        more = min(1, counts[layer] - found[layer], left // widths[layer])
        found[layer] += more
        left -= more * widths[layer]
    return found
