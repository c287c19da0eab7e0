"""Which neurons may stay: the policies by themselves, slots dealt to layers, and runs replayed from their traces."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sparse_bundle import PROMPT, STEPS, reads, slots_of

import flashinfer_cli as fc
from flashinfer_cli.apps.recording import recording
from flashinfer_cli.apps.replay import as_it_ran, replay
from flashinfer_cli.bundles.sparsity import SPARSITY_FILE, LayerSparsity
from flashinfer_cli.cache.trace import read_trace
from flashinfer_cli.cache.window import Window, deal, make_policy, worth_of
from flashinfer_cli.config import NEURON_POLICIES, NEURON_WINDOW, RunConfig
from flashinfer_cli.errors import UsageError


def test_window_by_hand():
    policy = Window(10, 10, k=2)
    assert [a.tolist() for a in policy.demand(np.array([1, 2]))] == [[1, 2], []]
    assert [a.tolist() for a in policy.demand(np.array([2, 3]))] == [[3], []]
    missing, gone = policy.demand(np.array([4]))  # the window is now {2, 3} and {4}: 1 goes
    assert (missing.tolist(), gone.tolist()) == ([4], [1])
    assert np.flatnonzero(policy.held).tolist() == [2, 3, 4]
    assert (policy.hits, policy.misses) == (1, 4)


def test_a_short_memory_shrinks_the_window():
    policy = Window(10, 3, k=5)
    policy.demand(np.array([0, 1]))
    policy.demand(np.array([2]))
    _, gone = policy.demand(np.array([3, 4]))  # room for one more: the oldest two of three go
    assert sorted(gone.tolist()) == [0, 1] and policy.held.sum() == 3


def test_what_is_nearest_to_being_named_stays():
    policy = make_policy("foresight", 6, 3, 1)
    policy.demand(np.array([0, 1, 2]))
    policy.expect(worth_of(np.array([-0.5, -3.0, -0.2, 4.0, -9.0, -0.1], np.float32)))
    missing, gone = policy.demand(np.array([3]))
    assert (missing.tolist(), gone.tolist()) == ([3], [1])  # furthest from being named of those that are here
    policy.demand(np.array([0, 3]))
    policy.expect(np.full(6, -1))
    _, gone = policy.demand(np.array([5]))
    assert gone.tolist() == [2]  # among equals the longest unused
    assert policy.resize(1).tolist() == [5, 0]  # named once, and longer ago


def test_what_is_named_often_is_worth_a_score():
    policy = make_policy("foresight", 3, 3, 1)
    for token in range(100):
        policy.demand(np.array([0, 1] if token % 4 else [0]))
    assert policy._worths(np.arange(3)).tolist() == [56, 42, 0]  # of 64 at the most
    policy.expect(np.array([-60, -10, -10]))
    assert np.argsort(policy.ranks_of(np.arange(3))).tolist() == [2, 0, 1]


def test_worths_are_whole_numbers_in_the_order_of_scores():
    scores = np.array([-1e9, -7.9, -0.01, 0.0, 0.124, 0.125, 1e9, np.inf], np.float32)
    assert worth_of(scores).tolist() == [-63, -63, -1, 0, 0, 1, 63, 63]


@pytest.mark.parametrize("name", NEURON_POLICIES)
@pytest.mark.parametrize("capacity", [0, 1, 7, 20, 64])
def test_policies_keep_their_promises(name, capacity):
    """Never more than there is room for; what is demanded is held where it fits; every id demanded is counted."""
    random = np.random.default_rng(capacity)
    policy = make_policy(name, 64, capacity, 3)
    held: set[int] = set()
    asked = 0
    for _ in range(200):
        ids = np.flatnonzero(random.random(64) < 0.15)
        policy.expect(random.integers(-9, 9, 64))
        missing, gone = policy.demand(ids)
        asked += len(ids)
        assert set(missing.tolist()) == set(ids.tolist()) - held
        held -= set(gone.tolist())
        assert not held & set(gone.tolist()) and not set(gone.tolist()) & set(ids.tolist())
        held = set(np.flatnonzero(policy.held).tolist())
        assert len(held) <= capacity
        assert len(held & set(ids.tolist())) == min(len(ids), max(capacity, 0)) or len(ids) <= capacity
    assert policy.hits + policy.misses == asked
    assert policy.hits > 0 or capacity < 7


def test_slots_go_where_they_are_wanted():
    counts, widths = dict.fromkeys(range(3), 100), {0: 512, 1: 512, 2: 1024}
    wants = {0: 0.6, 1: 0.1, 2: 0.1}
    assert deal(40 * 512, counts, widths, wants) == {0: 28, 1: 4, 2: 4}  # 6 to 1 to 1, of what there is
    assert deal(10**9, counts, widths, wants) == counts
    for room in (0, 511, 77_777, 200_000):
        found = deal(room, counts, widths, wants)
        assert 0 <= room - sum(widths[i] * n for i, n in found.items()) < 2048 or found == counts
        assert found[0] >= found[1] >= found[2]
    layer = LayerSparsity(0, 8, 1, 0.05, 0.1, 1.0, 0.5, {"1": 0.04, "2": 0.03, "4": 0.02})
    assert layer.working_set(1) == 0.1 and layer.working_set(5) == pytest.approx(0.1 + 0.04 + 0.03 + 0.03 + 0.02)


def test_a_window_is_of_the_policy_window():
    assert {policy: RunConfig(neuron_policy=policy).settled().window for policy in ("auto", *NEURON_POLICIES)} == {
        "auto": None, "foresight": None, "recent": None, "window": NEURON_WINDOW, "frequent": None,
    }  # fmt: skip
    assert RunConfig().settled().neuron_policy == "foresight"
    for given in (RunConfig(window=3), RunConfig(window=3, neuron_policy="window"), replace(RunConfig(), window=3)):
        settled = given.settled()
        assert (settled.neuron_policy, settled.window) == ("window", 3) and settled.settled() == settled
    for policy in ("foresight", "recent", "frequent"):
        with pytest.raises(UsageError, match=f"--neuron-policy is {policy}"):
            RunConfig(window=3, neuron_policy=policy)
    for wrong in ({"neuron_policy": "best"}, {"window": 0}):
        with pytest.raises(UsageError):
            RunConfig(**wrong)


def test_only_a_window_that_is_kept_deals_slots(sparse_bundle, tmp_path, monkeypatch):
    """By what so many tokens need under the policy window, by what five need under any other."""
    copy = Path(shutil.copytree(sparse_bundle, tmp_path / "b"))
    found = json.loads((copy / SPARSITY_FILE).read_text())
    for layer, new in enumerate((0.2, 0.02, 0.02)):
        found["layers"][layer] |= {"predicted": 0.1, "new": {"1": new}}
    (copy / SPARSITY_FILE).write_text(json.dumps(found))
    slots_of(monkeypatch, 3 * 40 * 512)
    rooms = {}
    for options in ({}, *({"neuron_policy": policy} for policy in NEURON_POLICIES), {"window": 1}, {"window": 3}):
        with fc.load(copy, context=32, stream="always", **options) as engine:
            policy = engine.neurons.layers[0].policy
            assert isinstance(policy, Window) == (options.get("neuron_policy") == "window" or "window" in options)
            assert not isinstance(policy, Window) or policy.k == options.get("window", NEURON_WINDOW)
            rooms[tuple(options.values())] = list(engine.neurons.room.values())
    one, three = rooms.pop((1,)), rooms.pop((3,))
    assert rooms.pop(()) == [86, 17, 17] and all(room == [86, 17, 17] for room in rooms.values())
    assert one == [40, 40, 40] and three[0] in range(41, 86)


@pytest.mark.parametrize("policy", NEURON_POLICIES)
@pytest.mark.parametrize("slots", [0, 40, 100, None])
def test_replay_counts_what_the_run_counted(sparse_bundle, tmp_path, monkeypatch, policy, slots):
    options = {}
    if slots is not None:
        slots_of(monkeypatch, 3 * slots * 512)
        options = {"stream": "always", "neuron_policy": policy, "window": 3 if policy == "window" else None}
    with fc.load(sparse_bundle, context=32, **options) as engine, recording(engine, tmp_path / "t.jsonl.gz"):
        session = engine.session()
        session.prefill(PROMPT)
        for token in STEPS:
            session.step(token)
        computed = sum(count for (phase, _), (count, _) in engine.recorder.neuron_counts.items() if phase == "decode")
        layers = engine.neurons.layers.values() if slots is not None else []
        misses = sum(layer.policy.misses for layer in layers)
        hits = sum(layer.policy.hits for layer in layers) if layers else computed
        if layers:
            engine.neurons.settle()
        asked = reads(engine.report()) - engine.report().wasted_bytes
        assert asked == misses * 512 and hits + misses == computed > 1000
    trace = read_trace(tmp_path / "t.jsonl.gz")
    again = as_it_ran(trace)
    assert (again.hits(), again.misses()) == (hits, misses) and trace.tokens("decode") == len(STEPS)
    assert (misses == 0) == (slots is None)
    if slots == 40:
        share = slots / 160
        found = replay(tmp_path / "t.jsonl.gz", shares=[share, 1.0])
        part, whole = found["points"]
        mine = part["policies"][policy]
        assert mine["hit_ratio"] == hits / computed
        best = max(each["hit_ratio"] for each in part["policies"].values())
        assert part["belady"]["hit_ratio"] >= best and part["belady_by_layer"]["hit_ratio"] >= best
        assert mine["bytes_per_token"] == misses * 512 / len(STEPS) and whole["bytes"] == 3 * 160 * 512


def test_a_dense_run_has_nothing_to_trace(sparse_bundle, tmp_path):
    """Of a calibrated bundle it is --exact that is in the way; of another the calibration is missing."""
    plain = Path(shutil.copytree(sparse_bundle, tmp_path / "b"))
    (plain / SPARSITY_FILE).unlink()
    for bundle, options, hint in (
        (sparse_bundle, {"exact": True}, r"^Leave --exact out\.$"),
        (plain, {"exact": True}, "calibrate the bundle first"),
        (plain, {}, "calibrate the bundle first"),
    ):
        with fc.load(bundle, context=32, **options) as engine:
            with pytest.raises(UsageError, match="nothing to trace") as refused, recording(engine, tmp_path / "t"):
                pass
            assert re.search(hint, refused.value.hint)


@pytest.mark.parametrize("kernels", ["compiled", "reference"])
def test_the_cache_hears_the_scores_of_all_neurons(sparse_bundle, tmp_path, monkeypatch, kernels):
    """Those that the predictor named are the ones above zero, whoever computed it, at decoding and of a prompt."""
    slots_of(monkeypatch, 3 * 40 * 512)
    with (
        fc.load(sparse_bundle, context=32, stream="always", kernels=kernels) as engine,
        recording(engine, tmp_path / "t"),
    ):
        session = engine.session()
        session.prefill(PROMPT)
        for token in STEPS:
            session.step(token)
        assert engine.run.neuron_policy == "foresight"
    demands = read_trace(tmp_path / "t").demands
    assert {each.phase for each in demands} == {"prefill", "decode"}
    for each in demands:
        named = np.zeros(160, bool)
        named[each.chosen[each.chosen >= 0]] = True
        assert each.worth is not None and len({*each.worth.tolist()}) > 10
        assert (each.worth[named] >= 0).all() and (each.worth[~named] <= 0).all()
