"""Policies over ids: worked examples, the room they may take, and Belady's optimum as the bound of all."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer_cli.cache.expert_policies import expert_policy
from flashinfer_cli.cache.policy import Belady, LeastStale, Lfu, Lru, Pinned, Policy, last_uses
from flashinfer_cli.config import EXPERT_POLICIES
from flashinfer_cli.errors import UsageError


def ask(policy: Policy, layer: int, *ids: int, phase: str = "decode") -> tuple[list[int], list[tuple[int, int]]]:
    """One token's demand, the best last -> (what was missing, what went)."""
    outcome = policy.demand(layer, np.array([ids[::-1]]), phase)
    return outcome.missing, outcome.gone


def test_last_uses_by_hand() -> None:
    ids, ages = last_uses(np.array([[3, 1], [2, 3], [0, -1]]))
    assert ids.tolist() == [1, 3, 2, 0] and ages.tolist() == [2, 1, 1, 0]
    ids, ages = last_uses(np.array([[5, 2, -1]]))
    assert ids.tolist() == [2, 5] and ages.tolist() == [0, 0]


def test_lru_by_hand() -> None:
    policy = Lru({0: 5}, 2)
    went = [ask(policy, 0, i) for i in (0, 1, 0, 2, 0, 1)]
    assert went == [([0], []), ([1], []), ([], []), ([2], [(0, 1)]), ([], []), ([1], [(0, 2)])]
    assert (policy.hits(), policy.misses()) == (2, 4)


def test_the_best_expert_of_a_token_is_its_latest_use() -> None:
    policy = Lru({0: 5}, 1)
    policy.demand(0, np.array([[4, 2]]))
    assert policy.holds(0, 4) and not policy.holds(0, 2)


def test_a_layer_of_its_own_or_room_for_all() -> None:
    alone, shared = Lru({0: 4, 1: 4}, 4, per_layer=True), Lru({0: 4, 1: 4}, 4)
    for i in range(4):
        ask(alone, 0, i), ask(shared, 0, i)
    assert alone.held(0).tolist() == [False, False, True, True] and shared.held(0).all()
    ask(alone, 1, 0), ask(shared, 1, 0)
    assert alone.held(0).sum() == 2 and shared.held(0).tolist() == [False, True, True, True]


def test_a_demand_beyond_the_room_keeps_what_it_can() -> None:
    for name in EXPERT_POLICIES:
        policy = expert_policy(name, {0: 8}, 3)
        missing, gone = ask(policy, 0, *range(8))
        assert missing == list(range(8)) and gone == [] and policy.held(0).sum() == 3, name
        nothing = expert_policy(name, {0: 8}, 0)
        assert ask(nothing, 0, 1, 2) == ([1, 2], []) and not nothing.held(0).any(), name


def test_least_stale_by_hand() -> None:
    policy = LeastStale({0: 3, 1: 3, 2: 3}, 3)
    for layer in range(3):
        ask(policy, layer, 0)
    # Round two. Nobody has been passed over but 0 of this layer, which also comes round last.
    assert ask(policy, 0, 1) == ([1], [(0, 0)])
    assert ask(policy, 1, 0) == ([], [])
    # 0 of layer 2 is passed over now; LRU would take 1 of layer 0 had the demand come before this one.
    assert ask(policy, 2, 1) == ([1], [(2, 0)])
    # Round three, layer 0 asks for more: its own 1 is passed over.
    assert ask(policy, 0, 2) == ([2], [(0, 1)])


def test_least_stale_outlives_a_cycle_that_lru_loses() -> None:
    """Four layers take turns, room for three: LRU over all evicts what is needed next and never hits."""
    stale, lru = LeastStale(dict.fromkeys(range(4), 2), 3), Lru(dict.fromkeys(range(4), 2), 3)
    for _ in range(10):
        for layer in range(4):
            ask(stale, layer, 0), ask(lru, layer, 0)
    assert lru.hits() == 0 and stale.hits() >= 18


def test_lfu_by_hand() -> None:
    policy = Lfu({0: 4}, 2, half_life=4)
    for i in (0, 0, 0, 1):
        ask(policy, 0, i)
    assert ask(policy, 0, 2) == ([2], [(0, 1)])  # used once, and longer ago
    for _ in range(16):
        ask(policy, 0, 2)
    assert ask(policy, 0, 3) == ([3], [(0, 0)])  # three uses, sixteen tokens old: four half-lives


def test_pinned_layers_keep_all_they_read() -> None:
    policy = Pinned({0: 4, 1: 4, 2: 4}, 8)
    for layer in (0, 1, 2):
        for i in range(4):
            ask(policy, layer, i)
    assert policy.held(0).all() and policy.held(1).sum() == policy.held(2).sum() == 2


def test_foresight_keeps_what_is_worth_most() -> None:
    policy = expert_policy("foresight", {0: 4, 1: 4}, 4)
    assert policy.name == "foresight"
    for i in (0, 1):
        ask(policy, 0, i)
    policy.expect(0, np.array([9, -3, 5, 7]))
    assert ask(policy, 0, 2) == ([2], [(0, 1)])  # 1 is worth least, though used last
    policy.expect(0, np.array([1, 1, 1, 0]))
    assert ask(policy, 0, 3) == ([3], [])  # what has just come is worth least itself
    assert policy.held(0).tolist() == [True, False, True, False]
    assert ask(policy, 0, 1) == ([1], [(0, 0)])  # among equals the longest unused


def follow(name: str, uses: list[int], worths: list[list[int]] | None = None) -> Policy:
    """A policy of a layer of 12 ids, 3 of which stay, after these uses."""
    policy = expert_policy(name, {0: 12}, 3)
    for token, used in enumerate(uses):
        if worths is not None:
            policy.expect(0, np.array(worths[token]))
        ask(policy, 0, used)
    return policy


@pytest.mark.parametrize("lasting", [True, False])
def test_adaptive_hits_as_often_as_the_better_of_two(lasting: bool) -> None:
    """Where uses last for a while and the router says so, and where a few ids are used often and it says nothing."""
    rng = np.random.default_rng(5)
    if lasting:
        uses = [int(i) for i in rng.integers(0, 12, 100) for _ in range(8)]
        worths = [[9 * (i == uses[min(t + 1, 799)]) for i in range(12)] for t in range(800)]
    else:
        odds = np.array([8, 8, 8] + [1] * 9) / 33
        uses = rng.choice(12, 800, p=odds).tolist()
        worths = rng.integers(0, 9, (800, 12)).tolist()
    found = {name: follow(name, uses, worths).hits() for name in ("lfu", "foresight", "adaptive")}
    better, worse = ("foresight", "lfu") if lasting else ("lfu", "foresight")
    assert found[better] > 1.05 * found[worse] and found["adaptive"] > 0.98 * found[better]
    assert follow("adaptive", uses, worths).follows == better
    assert follow("lfu", uses).follows == "lfu"


def test_adaptive_takes_the_other_lead() -> None:
    """Uses change their nature halfway."""
    rng = np.random.default_rng(6)
    lasting = [int(i) for i in rng.integers(0, 12, 50) for _ in range(8)]
    said = [[9 * (i == used) for i in range(12)] for used in [*lasting[1:], 0]]
    often = rng.choice(12, 400, p=np.array([8, 8, 8] + [1] * 9) / 33).tolist()
    noise = rng.integers(0, 9, (400, 12)).tolist()
    assert [follow("adaptive", u, w).follows for u, w in ((lasting, said), (lasting + often, said + noise))] == [
        "foresight", "lfu",
    ]  # fmt: skip


def test_prefill_counts_apart() -> None:
    policy = Lru({0: 4}, 4)
    policy.demand(0, np.array([[0, 1], [1, 2]]), "prefill")
    ask(policy, 0, 1)
    assert (policy.misses("prefill"), policy.hits("prefill"), policy.hits(), policy.misses()) == (3, 0, 1, 0)


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(UsageError, match="mru"):
        expert_policy("mru", {0: 1}, 1)


LAYERS = {0: 4, 2: 4, 3: 4}
DEMANDS = st.lists(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=2, unique=True), min_size=3, max_size=3), max_size=12
)


def trace(rounds: list[list[list[int]]]) -> list[tuple[int, np.ndarray]]:
    return [(layer, np.array([ids])) for each in rounds for layer, ids in zip(LAYERS, each, strict=True)]


@settings(deadline=None, max_examples=60)
@given(DEMANDS, st.integers(0, 12))
def test_room_and_bound(rounds: list[list[list[int]]], capacity: int) -> None:
    demands = trace(rounds)
    best = Belady(LAYERS, capacity, demands)
    apart = Belady(LAYERS, capacity, demands, per_layer=True)
    policies = [expert_policy(name, LAYERS, capacity) for name in EXPERT_POLICIES]
    for policy in (best, apart, *policies):
        for layer, chosen in demands:
            before = {(each, i) for each in LAYERS for i in range(4) if policy.holds(each, i)}
            outcome = policy.demand(layer, chosen)
            after = {(each, i) for each in LAYERS for i in range(4) if policy.holds(each, i)}
            assert set(outcome.present) == {i for each, i in before if each == layer} & set(chosen[0].tolist())
            assert set(outcome.gone) == before - after
            assert after - before <= {(layer, i) for i in outcome.missing}
            assert len(after) == policy._size <= capacity
    assert best.hits() >= max(policy.hits() for policy in (apart, *policies))
    assert apart.hits() >= policies[EXPERT_POLICIES.index("lru-layer")].hits()


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=7), st.integers(1, 3))
def test_belady_is_the_optimum(ids: list[int], capacity: int) -> None:
    """Against every way of choosing what to keep."""
    demands = [(0, np.array([[i]])) for i in ids]
    policy = Belady({0: 4}, capacity, demands)
    for layer, chosen in demands:
        policy.demand(layer, chosen)

    states = {(): 0}
    for i in ids:
        after: dict[tuple[int, ...], int] = {}
        for held, hits in states.items():
            pool = {*held, i}
            for size in range(min(capacity, len(pool)) + 1):
                for kept in itertools.combinations(sorted(pool), size):
                    after[kept] = max(after.get(kept, 0), hits + (i in held))
        states = after
    assert policy.hits() == max(states.values())
