"""Which records may stay, over all layers under one budget. Policies handle ids, never tensors, and count their own
hits and misses, so that a recorded trace runs through them without a model.

A demand is what one pass asks of one layer: the ids that each of its tokens chose. Every policy is a rank: after a
demand those of lowest rank go, which may be some of what was just demanded. Nothing here depends on when a read ends
or on what was read ahead, so that the same demands always give the same hits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

Key = tuple[int, int]  # layer, id
HALF_LIFE = 64  # tokens after which a use counts half, for `lfu`
PINNED_SHARE = 0.5  # of the room, for the first layers, with `pinned`
NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Outcome:
    """What a demand met: distinct ids in the order of their last use, and those that have to go (demanded or not)."""

    present: list[int]
    missing: list[int]
    gone: list[Key]


def last_uses(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """chosen int [T, k], best first, -1 for none -> (distinct ids by last use, the latest last; tokens since it)."""
    tokens, k = chosen.shape
    if tokens == 1:
        ids = chosen[0, ::-1]
        ids = ids[ids >= 0]
        return ids, np.zeros(len(ids), np.int64)
    backwards = chosen[::-1].ravel()  # the last token first, its best first
    ids, first = np.unique(backwards, return_index=True)
    ids, first = ids[ids >= 0], first[ids >= 0]
    order = np.argsort(-first, kind="stable")
    return ids[order], first[order] // k


class Policy:
    """At most `capacity` ids of `records[layer]` ones in each layer.

    With `per_layer` each layer has its own share of the room, in proportion to its records; else any id may take any
    place. Subclasses say what a use changes (`_note`) and who goes first (`_rank`).
    """

    name = ""  # as options spell it

    def __init__(self, records: Mapping[int, int], capacity: int, *, per_layer: bool = False) -> None:
        self.layers = sorted(records)
        self.records = {layer: records[layer] for layer in self.layers}
        ends = np.cumsum([0, *self.records.values()])
        self._base = {layer: int(start) for layer, start in zip(self.layers, ends[:-1], strict=True)}
        self._place = np.repeat(np.arange(len(self.layers)), list(self.records.values()))  # of an id's layer, in order
        self._at = {layer: place for place, layer in enumerate(self.layers)}
        self.total = int(ends[-1])
        self.capacity = min(capacity, self.total)
        self.quota = self._shares() if per_layer else None
        self.counts: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])  # phase, layer -> hits, misses
        self._held = np.zeros(self.total, bool)
        self._turn = np.zeros(len(self.layers), np.int64)  # tokens that each layer has seen
        self._size = 0

    @property
    def follows(self) -> str:
        """The name of the policy whose rank decides at present: its own, for most."""
        return self.name

    def _shares(self) -> dict[int, int]:
        """Each layer's part of the room; what does not divide goes to the first layers."""
        parts = {layer: self.capacity * count // self.total for layer, count in self.records.items()}
        left = self.capacity - sum(parts.values())
        for layer in self.layers:
            more = min(left, 1, self.records[layer] - parts[layer])
            parts[layer] += more
            left -= more
        return parts

    def demand(self, layer: int, chosen: np.ndarray, phase: str = "decode") -> Outcome:
        """The tokens of a pass ask a layer for ids: int [T, k], best first, -1 for none."""
        base, place = self._base[layer], self._at[layer]
        ids, ages = last_uses(chosen)
        self._turn[place] += len(chosen)
        keys = base + ids
        held = self._held[keys]
        self._note(place, keys, ages, base + chosen[chosen >= 0] if len(chosen) > 1 else keys)
        present, missing = ids[held].tolist(), ids[~held].tolist()
        count = self.counts[phase, layer]
        count[0] += len(present)
        count[1] += len(missing)
        gone: list[Key] = []
        if missing:
            self._held[keys] = True
            self._size += len(missing)
            fresh = set(missing)
            for victim in self._evict(layer).tolist():
                owner = self.layers[int(self._place[victim])]
                key = (owner, victim - self._base[owner])
                if owner != layer or key[1] not in fresh:
                    gone.append(key)
        return Outcome(present, missing, gone)

    def expect(self, layer: int, worth: np.ndarray) -> None:
        """What each id of a layer is thought to be worth from its next demand on, int [records]; who cares listens."""

    def _evict(self, layer: int) -> np.ndarray:
        if self.quota is None:
            over, candidates = self._size - self.capacity, None
        else:
            base = self._base[layer]
            candidates = base + np.flatnonzero(self._held[base : base + self.records[layer]])
            over = len(candidates) - self.quota[layer]
        if over <= 0:
            return np.empty(0, np.int64)
        if candidates is None:
            candidates = np.flatnonzero(self._held)
        if over < len(candidates):
            candidates = candidates[np.argpartition(self._rank(candidates, self._at[layer]), over - 1)[:over]]
        self._held[candidates] = False
        self._size -= over
        return candidates

    def holds(self, layer: int, record: int) -> bool:
        return bool(self._held[self._base[layer] + record])

    def held(self, layer: int) -> np.ndarray:
        """bool [records of the layer], to read only."""
        return self._held[self._base[layer] : self._base[layer] + self.records[layer]]

    def discard(self, layer: int, record: int) -> None:
        """Forget an id that did not come after all."""
        key = self._base[layer] + record
        self._size -= int(self._held[key])
        self._held[key] = False

    def hits(self, phase: str = "decode") -> int:
        return sum(hits for (name, _), (hits, _) in self.counts.items() if name == phase)

    def misses(self, phase: str = "decode") -> int:
        return sum(misses for (name, _), (_, misses) in self.counts.items() if name == phase)

    def _distance(self, keys: np.ndarray, place: int) -> np.ndarray:
        """Layers until the next turn of each id's layer: 1 for the one that follows, all of them for the current."""
        return (self._place[keys] - place - 1) % len(self.layers) + 1

    def _note(self, place: int, keys: np.ndarray, ages: np.ndarray, uses: np.ndarray) -> None:
        """`keys` are distinct, by last use, `ages` tokens ago; `uses` holds one entry for every use."""
        raise NotImplementedError

    def _rank(self, keys: np.ndarray, place: int) -> np.ndarray:
        """Lowest goes first."""
        raise NotImplementedError


class Lru(Policy):
    """Least recently used goes first; with `per_layer` the k experts a layer of 2312.17238."""

    def __init__(self, records: Mapping[int, int], capacity: int, *, per_layer: bool = False) -> None:
        super().__init__(records, capacity, per_layer=per_layer)
        self._last = np.full(self.total, -1, np.int64)
        self._clock = 0

    def _note(self, place: int, keys: np.ndarray, ages: np.ndarray, uses: np.ndarray) -> None:
        self._last[keys] = np.arange(self._clock, self._clock + len(keys))
        self._clock += len(keys)

    def _rank(self, keys: np.ndarray, place: int) -> np.ndarray:
        return self._last[keys]


class Pinned(Lru):
    """The first layers keep all they ever read, where guesses are worst (2502.12224); LRU by layer for the rest."""

    def __init__(self, records: Mapping[int, int], capacity: int) -> None:
        super().__init__(records, capacity, per_layer=True)

    def _shares(self) -> dict[int, int]:
        room, parts = int(self.capacity * PINNED_SHARE), {}
        for layer in self.layers:
            if self.records[layer] > room:
                break
            parts[layer] = self.records[layer]
            room -= self.records[layer]
        rest = {layer: count for layer, count in self.records.items() if layer not in parts}
        if rest:
            parts |= Lru(rest, self.capacity - sum(parts.values()), per_layer=True).quota or {}
        return parts


class Lfu(Policy):
    """Least frequently used goes first, a use counting half after HALF_LIFE tokens; among equals the one whose layer is
    furthest ahead."""

    def __init__(
        self, records: Mapping[int, int], capacity: int, *, half_life: float = HALF_LIFE, per_layer: bool = False
    ) -> None:
        super().__init__(records, capacity, per_layer=per_layer)
        self.half_life = half_life
        self._uses = np.zeros(self.total)
        self._last = np.zeros(self.total, np.int64)

    def _fade(self, keys: np.ndarray) -> np.ndarray:
        return np.exp2((self._last[keys] - self._turn[self._place[keys]]) / self.half_life) * self._uses[keys]

    def _note(self, place: int, keys: np.ndarray, ages: np.ndarray, uses: np.ndarray) -> None:
        if self.capacity >= self.total:  # nobody ever goes
            return
        faded = self._fade(keys)
        if len(uses) > len(keys):  # a chunk: every use counts, as of its last
            found, many = np.unique(uses, return_counts=True)
            faded += many[np.searchsorted(found, keys)]
        else:
            faded += 1
        self._uses[keys] = faded
        self._last[keys] = self._turn[place]

    def _rank(self, keys: np.ndarray, place: int) -> np.ndarray:
        return self._fade(keys) - 1e-9 * self._distance(keys, place)


class LeastStale(Policy):
    """The stalest goes first: the id whose layer has come round most often since it was last used, and among equals
    the one whose layer comes round last.

    2602.03921 names the idea; the rule here is worked out from first principles. Layers take turns in a fixed order,
    so the time to the next use of an id is at least its distance in layers, and likely that and as many rounds more as
    it has been passed over already. LRU over all layers errs here: those used longest ago within a round are the
    next in turn.
    """

    def __init__(self, records: Mapping[int, int], capacity: int) -> None:
        super().__init__(records, capacity)
        self._last = np.zeros(self.total, np.int64)

    def _note(self, place: int, keys: np.ndarray, ages: np.ndarray, uses: np.ndarray) -> None:
        self._last[keys] = self._turn[place] - ages

    def _rank(self, keys: np.ndarray, place: int) -> np.ndarray:
        missed = self._turn[self._place[keys]] - self._last[keys]
        return -(missed * (len(self.layers) + 1) + self._distance(keys, place))


class Belady(Policy):
    """The optimum, for replay: the id that is needed last of all goes first. Given the demands that are to come."""

    def __init__(
        self,
        records: Mapping[int, int],
        capacity: int,
        demands: Iterable[tuple[int, np.ndarray]],
        *,
        per_layer: bool = False,
    ) -> None:
        super().__init__(records, capacity, per_layer=per_layer)
        self._next = np.full(self.total, NEVER, np.int64)
        self._future: list[np.ndarray] = []
        coming = np.full(self.total, NEVER, np.int64)
        for time, (layer, chosen) in reversed(list(enumerate(demands))):
            keys = self._base[layer] + last_uses(chosen)[0]
            self._future.append(coming[keys])
            coming[keys] = time

    def _note(self, place: int, keys: np.ndarray, ages: np.ndarray, uses: np.ndarray) -> None:
        self._next[keys] = self._future.pop()

    def _rank(self, keys: np.ndarray, place: int) -> np.ndarray:
        return -self._next[keys]
