"""The expert cache: right bytes whatever is guessed, cancelled or late; slots within the plan; logits untouched."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from flashinfer_cli.cache.expert_policies import expert_policy
from flashinfer_cli.cache.experts import ExpertCache
from flashinfer_cli.checkpoint.base import Extent
from flashinfer_cli.config import EXPERT_POLICIES
from flashinfer_cli.device import Device
from flashinfer_cli.errors import StorageError
from flashinfer_cli.recorder import Recorder
from flashinfer_cli.store.flash import FlashStore, Span

CPU = Device("cpu")
EXPERTS, LAYERS = 8, (0, 3, 4)


def content_of(layer: int, expert: int) -> bytes:
    return bytes((layer * 50 + expert * 5 + i) % 251 for i in range(1600))


@pytest.fixture
def extents(tmp_path: Path) -> dict[int, list[tuple[Extent, ...]]]:
    """Experts of two pieces each, in one file."""
    path = tmp_path / "experts.bin"
    path.write_bytes(b"".join(content_of(layer, e) for layer in LAYERS for e in range(EXPERTS)))
    return {
        layer: [
            (Extent(path, start, 700), Extent(path, start + 700, 900))
            for e in range(EXPERTS)
            for start in (1600 * (LAYERS.index(layer) * EXPERTS + e),)
        ]
        for layer in LAYERS
    }


def make(store, extents, recorder=None, *, capacity: int, transit: int, policy: str = "lru-layer", **options):
    records = {layer: len(experts) for layer, experts in extents.items()}
    made = expert_policy(policy, records, capacity)
    return ExpertCache(store, CPU, recorder or Recorder(), extents, policy=made, transit=transit, **options)


def run(cache: ExpertCache, layer: int, ids: list[int]) -> list[int]:
    """Fetch and check every byte; the experts in the order they came."""
    seen = []
    for expert, pieces in cache.fetch(layer, np.array([ids])):
        assert b"".join(piece.numpy().tobytes() for piece in pieces) == content_of(layer, expert)
        seen.append(expert)
    assert sorted(seen) == sorted(ids)
    return seen


def accounted(cache: ExpertCache) -> None:
    """Every slot is in one place, and no more are kept than the policy may."""
    guessed = [guess.slot for guess in cache._guesses.values()]
    draining = [slot for slot, _ in cache._draining]
    everywhere = [*cache._free, *cache._slot.values(), *guessed, *draining]
    assert sorted(everywhere) == list(range(cache.slots)) and len(cache.buffer) == cache.slots * cache.slot_bytes
    assert len(cache._slot) == cache.policy._size <= cache.policy.capacity
    assert all(cache.policy.holds(*key) for key in cache._slot)
    assert len(guessed) + len(draining) <= max(0, cache.guessing.most)


@pytest.mark.parametrize("policy", EXPERT_POLICIES)
@pytest.mark.parametrize(("capacity", "transit"), [(0, 1), (0, 3), (2, 1), (5, 2), (16, 1), (24, 4)])
def test_experts_arrive_whole(extents, policy: str, capacity: int, transit: int) -> None:
    rng = random.Random(2)
    recorder = Recorder()
    with FlashStore(recorder, threads=3) as store:
        cache = make(store, extents, recorder, capacity=capacity, transit=transit, policy=policy)
        for _ in range(60):
            run(cache, rng.choice(LAYERS), rng.sample(range(EXPERTS), rng.randrange(1, EXPERTS)))
            accounted(cache)
    counts = recorder.phases["load"]
    assert (counts.hits, counts.misses) == (cache.policy.hits("load"), cache.policy.misses("load"))
    assert (counts.hits == 0) == (capacity == 0) and counts.misses >= 24


def test_resident_experts_come_first(extents) -> None:
    with FlashStore(Recorder()) as store:
        cache = make(store, extents, capacity=9, transit=1)
        run(cache, 0, [4, 5])
        assert sorted(run(cache, 0, [1, 4, 2, 5])[:2]) == [4, 5]


@pytest.mark.parametrize("items", [0, 1, 2])
def test_iterator_left_early_loses_no_slot(extents, items: int) -> None:
    with FlashStore(Recorder()) as store:
        cache = make(store, extents, capacity=6, transit=2, prefetch=1)
        for turn in range(6):
            cache.guess(0, 1, [turn])
            fetched = iter(cache.fetch(0, np.array([[0, 1, 2, 3]])))
            for _ in range(items):
                next(fetched)
            fetched.close()
        run(cache, 0, [0, 1, 2, 3])
        accounted(cache)


def test_a_failed_read_is_told_and_forgotten(extents) -> None:
    path = extents[0][0][0].path
    broken = {layer: list(experts) for layer, experts in extents.items()}
    broken[0][7] = (Extent(path.with_name("gone"), 0, 700), Extent(path.with_name("gone"), 700, 900))
    with FlashStore(Recorder()) as store:
        cache = make(store, broken, capacity=9, transit=3, prefetch=2)
        for _ in range(2):
            cache.guess(0, 1, [7])
            with pytest.raises(StorageError):
                run(cache, 0, [1, 7])
            run(cache, 0, [1, 2])
            accounted(cache)


def test_right_guesses_are_read_once_and_wrong_ones_leave_nothing(extents) -> None:
    recorder = Recorder()
    with FlashStore(recorder, threads=2) as store:
        cache = make(store, extents, recorder, capacity=9, transit=3, prefetch=2)
        cache.guess(3, 1, [6, 7])
        for guess in cache._guesses.values():
            guess.ticket.wait()
        run(cache, 3, [6, 1])
        assert cache.policy.holds(3, 6) and not cache.policy.holds(3, 7)
        accounted(cache)
    count = recorder.expert_counts["load", 3]
    assert (count.guessed, count.right) == (2, 1) and count.wasted_bytes == recorder.wasted_bytes > 0
    assert count.recall[1] == [1, 2] and (count.hits, count.misses) == (0, 2)
    assert recorder.reads["load", "expert"].useful == 1600  # 6 came as a guess and was not read again


def test_guesses_take_no_slot_that_a_demand_needs(extents) -> None:
    with FlashStore(Recorder()) as store:
        cache = make(store, extents, capacity=0, transit=4, prefetch="auto")
        for turn in range(20):
            cache.guess(3, 1, [0, 1, 2, 3, 4])
            assert len(cache._guesses) + len(cache._draining) <= 3 and cache._free
            run(cache, 0, [turn % 8, (turn + 1) % 8, (turn + 3) % 8])
            run(cache, 3, [turn % 7, 7])
            accounted(cache)


def test_right_guesses_do_not_make_way_for_what_was_not_guessed(extents) -> None:
    recorder = Recorder()
    with FlashStore(recorder) as store:
        cache = make(store, extents, recorder, capacity=0, transit=4, prefetch=3)
        for turn in range(8):
            guessed = [(turn + 2 * i) % 8 for i in range(3)]
            cache.guess(3, 1, guessed)
            run(cache, 3, [*guessed, (turn + 1) % 8, (turn + 3) % 8])
            accounted(cache)
    count = recorder.expert_counts["load", 3]
    assert (count.guessed, count.right) == (24, 24) and recorder.wasted_bytes == 0


def test_guesses_without_room_are_read_as_soon_as_there_is(extents) -> None:
    recorder = Recorder()
    with FlashStore(recorder) as store:
        cache = make(store, extents, recorder, capacity=0, transit=3, prefetch=2)
        arriving = cache.fetch(0, np.array([[0, 1, 2]])).slots()
        cache.guess(3, 1, [5, 6])
        assert not cache._guesses and len(cache._wanted) == 2
        for _ in arriving:
            pass
        assert {*cache._guesses} == {(3, 5), (3, 6)} and not cache._wanted
        cache.guess(4, 1, [0, 1])
        run(cache, 3, [5, 6])
        run(cache, 4, [2])
        assert not cache._wanted, "what a layer has not asked for is not read for it later"
        accounted(cache)
    assert recorder.expert_counts["load", 3].right == 2


def test_where_all_fit_nothing_is_guessed(extents) -> None:
    with FlashStore(Recorder()) as store:
        cache = make(store, extents, capacity=24, transit=4, prefetch=3)
        assert not cache.distances and cache.guessing.number() == 0


# ------------------------------------------------------------------ a store whose reads end when we say


class FakeTicket:
    def __init__(self, store: FakeStore, requests: list[Callable[[], None]]) -> None:
        self.store, self.queued, self.begun = store, requests, []
        self.sizes = tuple(4096 for _ in requests)
        self.error: Exception | None = None
        self._done = SimpleNamespace(wait=self.end)

    @property
    def ready(self) -> bool:
        return not self.queued and not self.begun

    def end(self) -> None:
        while not self.ready:
            self.step()

    def wait(self) -> None:
        self.end()
        if self.error is not None:
            raise self.error

    def step(self) -> None:
        """One thing that may happen: a request begins, or one ends."""
        if self.begun and (not self.queued or self.store.rng.random() < 0.5):
            self.begun.pop(0)()
        elif self.queued:
            self.begun.append(self.queued.pop(0))


class FakeStore:
    """Reads that end late and in any order: each request writes its bytes when `step` says so, wanted or not."""

    def __init__(self, seed: int) -> None:
        self.rng, self.tickets = random.Random(seed), []
        self.failing = 0.0

    def read(self, span: Span, buffer, place: int, kind: str, *, urgent: bool = False) -> FakeTicket:
        def request(path: Path, offset: int, length: int, at: int) -> Callable[[], None]:
            def write() -> None:
                with path.open("rb") as file:
                    file.seek(offset)
                    data = np.frombuffer(file.read(length), np.uint8)
                buffer[place + at : place + at + len(data)] = data

            return write

        ticket = FakeTicket(self, [request(*read[:4]) for read in span.reads] * 2)
        if self.rng.random() < self.failing:
            ticket.error = StorageError("as asked")
        self.tickets.append(ticket)
        return ticket

    def promote(self, ticket: FakeTicket) -> bool:
        return len(ticket.queued) < len(ticket.sizes)

    def cancel(self, ticket: FakeTicket) -> bool:
        ticket.sizes = ticket.sizes[: len(ticket.sizes) - len(ticket.queued)]
        ticket.queued.clear()
        return bool(ticket.sizes)

    def pass_time(self) -> None:
        for ticket in self.rng.sample(self.tickets, len(self.tickets)):
            for _ in range(self.rng.randrange(3)):
                ticket.step()
        self.tickets = [ticket for ticket in self.tickets if not ticket.ready]


@pytest.mark.parametrize("seed", range(8))
def test_stress(extents, seed: int) -> None:
    """Any mix of demands, guesses, early ends and failures: every expert handed out is whole, no slot is lost."""
    rng = random.Random(seed)
    store = FakeStore(seed)
    store.failing = 0.02 * (seed % 3)
    capacity, transit = rng.randrange(0, 20), rng.randrange(1, 7)
    policy = EXPERT_POLICIES[seed % len(EXPERT_POLICIES)]
    setting = rng.choice(["auto", 1, 3, 9])
    cache = make(store, extents, capacity=capacity, transit=transit, policy=policy, prefetch=setting, lookahead=2)
    bare = expert_policy(policy, dict.fromkeys(LAYERS, EXPERTS), capacity)
    clean = True
    for turn in range(400):
        layer = LAYERS[turn % 3]
        ids = rng.sample(range(EXPERTS), rng.randrange(1, EXPERTS + 1))
        for ahead in (1, 2):
            cache.guess(rng.choice(LAYERS), ahead, rng.sample(range(EXPERTS), 4))
        store.pass_time()
        fetched = cache.fetch(layer, np.array([ids]))
        arriving = iter(fetched) if turn % 2 else (one for batch in fetched.batches() for one in batch)
        if clean:
            bare.demand(layer, np.array([ids]), "load")
        cache.guess(LAYERS[(turn + 1) % 3], 1, rng.sample(range(EXPERTS), 3))
        stop = rng.randrange(1, 9) if rng.random() < 0.05 else 99
        try:
            for count, (expert, pieces) in enumerate(arriving, 1):
                assert b"".join(piece.numpy().tobytes() for piece in pieces) == content_of(layer, expert)
                store.pass_time()  # what else is under way must not touch these bytes
                assert b"".join(piece.numpy().tobytes() for piece in pieces) == content_of(layer, expert)
                if count == stop:
                    break
        except StorageError:
            clean = False
        if stop < 99:
            arriving.close()
            clean = False
        accounted(cache)
    assert not clean or bare.counts == cache.policy.counts


# ------------------------------------------------------------------ how many guesses, and whether at all
