"""Demands of neurons settled by one call of compiled code: to the last slot what numpy makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashinfer_cli.cache.settling import CompiledSettler, PlainSettler
from flashinfer_cli.cache.slots import NeuronFile, Slots
from flashinfer_cli.cache.window import make_policy
from flashinfer_cli.config import NEURON_POLICIES
from flashinfer_cli.device import allocate
from flashinfer_cli.kernels.native import NumbaKernels
from flashinfer_cli.store.aio import IOCB, IOVEC
from flashinfer_cli.store.scatter import MOST_VIEWS, lay_out, layout_by

COUNT, WIDTH, BLOCK = 200, 512, 16


def slots(policy: str, early: int, late: int) -> Slots:
    memory = (allocate(max(1, n) * WIDTH)[: n * WIDTH].reshape(n, WIDTH) for n in (early, late))
    return Slots(NeuronFile(Path("none"), 0, COUNT, WIDTH), make_policy(policy, COUNT, early + late, 3), *memory)


def place(layer: Slots, address: int, passing: list[np.ndarray], rows: int) -> tuple[str, int]:
    """What an address stands in, and where; in a slot, which may be any, nowhere in particular."""
    for name, buffer in (*(("slot", part) for part in layer.memory), *enumerate(passing)):
        if 0 <= address - buffer.ctypes.data < buffer.nbytes:
            return str(name), -1 if name == "slot" else address - buffer.ctypes.data
    return "guess", address - rows


@pytest.mark.parametrize("policy", NEURON_POLICIES)
@pytest.mark.parametrize(("early", "late"), [(0, 0), (5, 0), (30, 17), (90, 0), (200, 0)])
def test_settled_as_by_numpy(numba: NumbaKernels, policy: str, early: int, late: int) -> None:
    random = np.random.default_rng(early)
    layers = [slots(policy, early, late) for _ in range(2)]
    settlers = PlainSettler(BLOCK, WIDTH), CompiledSettler(numba, BLOCK, WIDTH, COUNT)
    rows, passed, right = 1 << 40, 0, 0
    for turn in range(60):
        likely = np.where(np.arange(COUNT) < 60, 0.4, 0.08)  # some neurons come again, and ranks have ties
        ids = np.flatnonzero(random.random(COUNT) < likely)
        absent = np.flatnonzero((random.random(COUNT) < 0.1) & (layers[0].slot < 0))
        guessed = absent if turn % 3 else absent[:0]
        scores = random.choice([0, 0.125, 0.5, 1.7, 7.875, 20, np.inf], COUNT) + 0.3 * (turn % 2) * random.random(COUNT)
        scores = np.where(np.isin(np.arange(COUNT), ids), scores, -scores).astype(np.float32)
        scores = None if turn % 7 == 6 else scores
        asked = ids, guessed, rows, scores
        plain, compiled = (s.settle(layer, *asked) for s, layer in zip(settlers, layers, strict=True))
        assert (plain.missed, plain.right) == (compiled.missed, compiled.right)
        assert np.array_equal(plain.states, compiled.states) and np.array_equal(plain.read_ids, compiled.read_ids)
        for one, other in (("addresses", plain.addresses), ("read_at", plain.read_at)):
            mine = [place(layers[0], a, settlers[0].passing, rows) for a in other.tolist()]
            theirs = [place(layers[1], a, settlers[1].passing, rows) for a in getattr(compiled, one).tolist()]
            assert mine == theirs
            passed += sum(name.isdigit() for name, _ in mine)
        a, b = layers
        assert np.array_equal(a.policy.held, b.policy.held) and np.array_equal(a.policy.last, b.policy.last)
        assert np.array_equal(a.policy.ranks(), b.policy.ranks()) and np.array_equal(a.slot >= 0, b.slot >= 0)
        assert (a.policy.hits, a.policy.misses) == (b.policy.hits, b.policy.misses)
        for layer in layers:  # every slot is free or somebody's
            assert sorted([*layer.free, *layer.slot[layer.slot >= 0]]) == list(range(layer.policy.capacity))
        right += plain.right
    assert right > 0 or early == 200
    assert (passed > 0) == (early < 30)


def test_the_surest_are_those_of_the_highest_scores(numba: NumbaKernels) -> None:
    random, layer = np.random.default_rng(1), slots("recent", 50, 0)
    plain, compiled = PlainSettler(BLOCK, WIDTH), CompiledSettler(numba, BLOCK, WIDTH, COUNT)
    plain.settle(layer, np.arange(0, 100, 3), np.empty(0, np.int64), 0)
    for scores in (random.standard_normal(COUNT), np.full(COUNT, -1.0), np.round(random.standard_normal(COUNT))):
        for most in (1, 7, 40, 200):
            scores = scores.astype(np.float32)
            found = compiled.surest(layer, scores, most)
            assert np.array_equal(found, plain.surest(layer, scores, most))
            assert len(found) <= most and (scores[found] > 0).all() and (layer.slot[found] < 0).all()


def test_copies_reach_their_slots(numba: NumbaKernels) -> None:
    random, rows = np.random.default_rng(2), np.random.default_rng(2).integers(0, 255, (40, WIDTH), np.uint8)
    for settler in (PlainSettler(BLOCK, WIDTH), CompiledSettler(numba, BLOCK, WIDTH, COUNT)):
        layer = slots("recent", 30, 20)
        ids = np.arange(0, 200, 5)
        settler.settle(layer, ids, np.empty(0, np.int64), 0)
        order = random.permutation(40)
        settler.copy(layer, ids, rows.ctypes.data + WIDTH * order, (rows,))
        assert np.array_equal(np.concatenate(layer.memory)[layer.slot[ids]], rows[order])


@pytest.mark.parametrize("gap", [0, 1, 5])
def test_reads_laid_out_as_by_numpy(numba: NumbaKernels, gap: int) -> None:
    random, compiled = np.random.default_rng(gap), layout_by(numba)
    memory, waste = (allocate(8 * WIDTH),), allocate((gap + 1) * WIDTH)
    for share in (0.0005, 0.02, 0.3, 0.9, 1.0):
        ids = np.flatnonzero(random.random(3 * MOST_VIEWS) < share) if share > 0.001 else np.array([7])
        addresses = random.integers(1, 1 << 40, len(ids))
        want, got = (f(ids, addresses, WIDTH, 4096, gap, memory, waste) for f in (lay_out, compiled))
        for name in ("offsets", "sizes", "first", "views"):
            assert np.array_equal(getattr(want, name), getattr(got, name)), (name, share)
        assert got.requests is not None
        words, pointers = got.requests
        assert np.array_equal(pointers, words.ctypes.data + 64 * np.arange(len(want)))
        asked = np.ascontiguousarray(words).view(IOCB).reshape(-1)
        assert np.array_equal(asked["data"], np.arange(len(want))) and np.array_equal(asked["offset"], want.offsets)
        assert np.array_equal(asked["nbytes"], np.diff(want.first)) and not asked["flags"].any()
        assert np.array_equal(asked["buf"], got.views.ctypes.data + IOVEC.itemsize * want.first[:-1])
