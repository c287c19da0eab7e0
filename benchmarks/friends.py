"""Neurons beside copies of others: friends, the fewest records that bring what is missing, and what a layout reads.

LLM in a Flash (2312.11514, 3.2) tried to store every neuron together with a copy of its closest friend, the neuron
most often active with it, and gave it up. Here the try is repeated on traces, by ids alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from flashinfer_cli.cache.trace import Demand
from flashinfer_cli.cache.window import NeuronPolicy, Recent, Window
from flashinfer_cli.store.scatter import GAP_BYTES


def friends(tokens: Sequence[np.ndarray], count: int, *, relative: bool = False) -> np.ndarray:
    """Ids that tokens demanded together -> int64 [count], the neuron most often demanded with each; itself where it
    never was with any. `relative` to how often either was: both over one or the other (Jaccard)."""
    demanded = np.zeros((len(tokens), count), np.float32)
    for row, ids in zip(demanded, tokens, strict=True):
        row[ids] = 1
    together = demanded.T @ demanded
    often = np.diag(together).copy()
    np.fill_diagonal(together, 0)
    alone = ~together.any(1)
    if relative:
        together /= np.maximum(often[:, None] + often - together, 1)
    return np.where(alone, np.arange(count), together.argmax(1))


def cover(missing: np.ndarray, friend: np.ndarray) -> np.ndarray:
    """The fewest records, each of a neuron and a copy of its friend, that bring all `missing` (ascending).

    Each neuron has one friend, so pairs are found from the outside in: who is nobody's friend chooses first.
    """
    wanted = np.zeros(len(friend), bool)
    wanted[missing] = True
    left = {i: f for i, f in zip(missing.tolist(), friend[missing].tolist(), strict=True) if wanted[f] and f != i}
    waiting = Counter(left.values())
    ready = [i for i in left if not waiting[i]]
    brought: set[int] = set()
    settled: set[int] = set()
    while left:
        i = ready.pop() if ready else next(iter(left))  # else only rings are left
        f = left.pop(i)
        if i not in settled and f not in settled:
            settled |= {i, f}
            brought.add(f)
        waiting[f] -= 1
        if not waiting[f] and f in left:
            ready.append(f)
    return missing[[i not in brought for i in missing.tolist()]] if brought else missing


def spans(places: np.ndarray, width: int) -> tuple[int, int]:
    """(reads, bytes) of records of `width` bytes at these places, small gaps read through as a run does it."""
    if not len(places):
        return 0, 0
    places = np.sort(places)
    steps = np.diff(places)
    apart = steps > GAP_BYTES // width + 1
    return 1 + int(apart.sum()), width * (1 + int(steps[~apart].sum()) + int(apart.sum()))


@dataclass(frozen=True)
class Layout:
    """How records stand: in the order of `place`, by layer, if given; each with a copy of `friend`, if given, which a
    slot may `keep` as though it had been asked for, or which serves the token that read it and no other."""

    name: str
    place: dict[int, np.ndarray] | None = None
    friend: dict[int, np.ndarray] | None = None
    keep: bool = False


@dataclass
class Counts:
    """Of decoded tokens: neurons asked for, missing, those of either that a friend's record brought; records read,
    copies that were in memory already; reads and bytes by width of a neuron."""

    asked: int = 0
    missing: int = 0
    through: int = 0
    records: int = 0
    again: int = 0
    reads: Counter[int] = field(default_factory=Counter)
    bytes: Counter[int] = field(default_factory=Counter)

    def seconds(self, width: int, request: float, rate: float) -> float:
        """What a drive takes that wants `request` seconds a read and gives `rate` bytes a second."""
        return self.reads[width] * request + self.bytes[width] / rate


def judge(
    demands: Iterable[Demand], layout: Layout, policies: dict[int, NeuronPolicy], widths: Sequence[int], warm: int = 0
) -> Counts:
    """Put what tokens demand through a policy a layer; the first `warm` demands fill the slots and are not counted."""
    found = Counts()
    came = {layer: np.zeros(len(policy.held), bool) for layer, policy in policies.items()}  # as friends, unasked yet
    for number, each in enumerate(demands):
        policy, layer = policies[each.layer], each.layer
        if each.worth is not None:
            policy.expect(each.worth)
        for row in each.chosen:
            ids = row[row >= 0]
            records = missing = ids[~policy.held[ids]]
            through, again, asked = int(came[layer][ids].sum()), 0, ids
            came[layer][ids] = False
            if layout.friend is not None:
                friend = layout.friend[layer]
                records = cover(missing, friend)
                through += len(missing) - len(records)
                copies = friend[records]
                new = np.setdiff1d(copies[~policy.held[copies]], records)
                again = len(copies) - len(new)
                if layout.keep:
                    asked = np.union1d(ids, new)
            policy.demand(asked)
            if layout.keep:
                came[layer][np.setdiff1d(asked, ids)] = True
                came[layer] &= policy.held
            if number < warm:
                continue
            found.asked += len(ids)
            found.missing += len(missing)
            found.through += through
            found.records += len(records)
            found.again += again
            places = records if layout.place is None else layout.place[layer][records]
            for width in widths:
                reads, size = spans(places, width * (1 if layout.friend is None else 2))
                found.reads[width] += reads
                found.bytes[width] += size
    return found


def pinned(kind: Callable[[], Window | Recent], hot: np.ndarray) -> Window | Recent:
    """A policy in which the ids `hot` are held from the start and never go; the rest of the slots is as it was."""
    policy = kind()
    turn = policy.turn

    def keep(ids: np.ndarray) -> None:
        turn(ids)
        policy.last[hot] = policy.time  # as though every token asked for them

    policy.held[hot] = True
    policy.turn = keep  # type: ignore[method-assign]
    return policy
