"""Policies for experts by their names, and those that go by what a router says: foresight, and what follows the better
of it and frequency.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..config import EXPERT_POLICIES
from ..errors import UsageError
from .policy import LeastStale, Lfu, Lru, Outcome, Pinned, Policy

LATELY = 64  # tokens after which a hit counts half, where policies are compared


class Foresight(Lru):
    """What is least likely to be asked for soon goes first; the longest unused among equals.

    How likely is said ahead of every demand (`expect`): by a map that calibration learned from a token's hidden state
    to the uses that follow, else by the router, in the probabilities that it gave the last token. By layer: worths of
    different layers are not of the same moment.
    """

    def __init__(self, records: Mapping[int, int], capacity: int) -> None:
        super().__init__(records, capacity, per_layer=True)
        self._worth = np.zeros(self.total, np.int64)

    def expect(self, layer: int, worth: np.ndarray) -> None:
        self._worth[self._base[layer] : self._base[layer] + self.records[layer]] = worth

    def _rank(self, keys: np.ndarray, place: int) -> np.ndarray:
        return (self._worth[keys] << 40) + self._last[keys]


class Adaptive(Policy):
    """Follows foresight or frequency, whichever would have hit more often of late.

    Some models ask again for what they have just asked for, others hardly: no fixed rule serves both (`docs/papers.md`
    has figures). So both run beside this one, over the same demands and with the same room; what is in memory goes in
    the order of the one that leads.
    """

    def __init__(self, records: Mapping[int, int], capacity: int) -> None:
        super().__init__(records, capacity, per_layer=True)
        self._beside = (Foresight(records, capacity), Lfu(records, capacity, per_layer=True))
        for policy, name in zip(self._beside, ("foresight", "lfu"), strict=True):
            policy.name = name
        self._fade = 0.5 ** (1 / (LATELY * len(self.layers)))
        self._lately = [0.0] * len(self._beside)  # hits of each, the latest counting most

    @property
    def _leader(self) -> Policy:
        return self._beside[int(np.argmax(self._lately))]

    @property
    def follows(self) -> str:
        return self._leader.name

    def expect(self, layer: int, worth: np.ndarray) -> None:
        for policy in self._beside:
            policy.expect(layer, worth)

    def demand(self, layer: int, chosen: np.ndarray, phase: str = "decode") -> Outcome:
        if 0 < self.capacity < self.total:  # else nobody ever goes, or nobody stays
            for place, policy in enumerate(self._beside):
                found = len(policy.demand(layer, chosen, phase).present)
                if phase == "decode":
                    self._lately[place] = self._lately[place] * self._fade + found
        return super().demand(layer, chosen, phase)

    def _note(self, place: int, keys: np.ndarray, ages: np.ndarray, uses: np.ndarray) -> None:
        """The two beside this one do."""

    def _rank(self, keys: np.ndarray, place: int) -> np.ndarray:
        return self._leader._rank(keys, place)


def expert_policy(name: str, records: Mapping[int, int], capacity: int) -> Policy:
    """One of EXPERT_POLICIES by its name, or "none", which keeps nothing; UsageError for any other."""
    kinds: dict[str, type[Lru | Lfu | LeastStale | Pinned | Foresight | Adaptive]] = {
        "adaptive": Adaptive, "foresight": Foresight, "lfu": Lfu, "stale": LeastStale, "lru": Lru, "pinned": Pinned,
    }  # fmt: skip
    if name in ("none", "lru-layer"):
        policy: Policy = Lru(records, 0 if name == "none" else capacity, per_layer=name == "lru-layer")
    elif name in kinds:
        policy = kinds[name](records, capacity)
    else:
        raise UsageError(f"'{name}' is not a policy for experts.", f"Policies are {', '.join(EXPERT_POLICIES)}.")
    policy.name = name
    return policy
