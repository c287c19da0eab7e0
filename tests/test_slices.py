"""The ring and the feed: right bytes in the right order whatever the room; and the expert cache against plain
reading."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from flashinfer_cli.cache.experts import ExpertCache
from flashinfer_cli.cache.policy import Lru
from flashinfer_cli.cache.slices import Feed, Slice
from flashinfer_cli.checkpoint.base import Extent
from flashinfer_cli.device import Device
from flashinfer_cli.report import Recorder
from flashinfer_cli.store.flash import FlashStore

CPU = Device("cpu")


@pytest.fixture
def file(tmp_path: Path) -> tuple[Path, bytes]:
    content = np.random.default_rng(1).integers(0, 256, 400_000, dtype=np.uint8).tobytes()
    path = tmp_path / "weights.bin"
    path.write_bytes(content)
    return path, content


def extents_of(path: Path, sizes: list[int], start: int = 13) -> list[Extent]:
    found = []
    for size in sizes:
        found.append(Extent(path, start, size))
        start += size
    return found


def read(feed: Feed, slice_: Slice) -> bytes:
    with feed.use(slice_) as data:
        return data.numpy().tobytes()


@pytest.mark.parametrize("ring_slices", [1.0, 1.5, 2.3, 7.9, 100])
def test_every_ring_size_gives_the_same_bytes(file: tuple[Path, bytes], ring_slices: float) -> None:
    path, content = file
    rng = random.Random(0)
    slices = [Slice(e) for e in extents_of(path, [rng.randrange(1, 20_000) for _ in range(20)])]
    ring = int(ring_slices * max(s.span.nbytes for s in slices))
    recorder = Recorder()
    with FlashStore(recorder, threads=3) as store:
        feed = Feed(store, CPU, recorder)
        feed.pin(slices[::3])
        feed.open_ring(ring)
        streamed = tuple(s for s in slices if s.home is None)
        for turn in range(4):
            feed.begin(streamed, [streamed] if turn < 3 else [])
            for s in slices:
                assert read(feed, s) == content[s.extent.offset : s.extent.offset + s.nbytes]
        feed.end()
    assert recorder.wasted_bytes == 0
    assert recorder.phases["load"].hits == 4 * len(slices[::3])


def test_reading_ahead_that_nobody_wants_is_counted(file: tuple[Path, bytes]) -> None:
    path, _ = file
    slices = tuple(Slice(e) for e in extents_of(path, [5000] * 6))
    recorder = Recorder()
    with FlashStore(recorder) as store:
        feed = Feed(store, CPU, recorder)
        feed.open_ring(100_000)
        feed.begin(slices, [slices])
        for s in slices:
            read(feed, s)
        feed.end()
        assert recorder.wasted_bytes > 0
        feed.begin(slices[:2])  # and the feed still works
        assert read(feed, slices[0]) and read(feed, slices[1])


def test_a_pass_other_than_announced(file: tuple[Path, bytes]) -> None:
    path, content = file
    body, head = (tuple(Slice(e) for e in extents_of(path, [3000] * 3, start)) for start in (0, 20_000))
    with FlashStore(Recorder()) as store:
        feed = Feed(store, CPU, Recorder())
        feed.open_ring(1 << 16)
        feed.begin(body, [body])
        for s in body:
            read(feed, s)
        feed.begin((*body, *head))  # not what was said would follow
        for s in (*body, *head):
            assert read(feed, s) == content[s.extent.offset : s.extent.offset + s.nbytes]


@pytest.mark.parametrize(("per_layer", "transit"), [(0, 1), (0, 3), (1, 1), (2, 2), (8, 1), (20, 4)])
def test_experts_arrive_whole(file: tuple[Path, bytes], per_layer: int, transit: int) -> None:
    path, content = file
    rng = random.Random(2)
    layers = {layer: [tuple(extents_of(path, [700, 900], 1600 * e + 5)) for e in range(8)] for layer in (0, 3)}
    recorder = Recorder()
    with FlashStore(recorder, threads=3) as store:
        cache = ExpertCache(store, CPU, recorder, layers, per_layer=per_layer, transit=transit)
        for _ in range(60):
            layer, wanted = rng.choice((0, 3)), rng.sample(range(8), rng.randrange(1, 8))
            seen = set()
            for expert, pieces in cache.fetch(layer, wanted):
                seen.add(expert)
                for piece, extent in zip(pieces, layers[layer][expert], strict=True):
                    assert piece.numpy().tobytes() == content[extent.offset : extent.offset + extent.nbytes]
            assert seen == set(wanted)
        held = [key for key in cache._slot if key[0] == 0]
        assert len(held) <= min(per_layer, 8)
        assert len(set(cache._slot.values())) + len(cache._free) == len(cache.buffer) // cache.slot_bytes
    counts = recorder.phases["load"]
    assert (counts.hits == 0) == (per_layer == 0)
    assert counts.misses >= 16 if per_layer < 20 else counts.misses <= 16


def test_resident_experts_come_first(file: tuple[Path, bytes]) -> None:
    path, _ = file
    layers = {0: [tuple(extents_of(path, [100], 100 * e)) for e in range(6)]}
    with FlashStore(Recorder()) as store:
        cache = ExpertCache(store, CPU, Recorder(), layers, per_layer=3, transit=1)
        for _ in cache.fetch(0, [4, 5]):
            pass
        assert [e for e, _ in cache.fetch(0, [1, 4, 2, 5])][:2] == [4, 5]


def test_iterator_left_early_loses_no_slot(file: tuple[Path, bytes]) -> None:
    path, _ = file
    layers = {0: [tuple(extents_of(path, [100], 100 * e)) for e in range(6)]}
    with FlashStore(Recorder()) as store:
        cache = ExpertCache(store, CPU, Recorder(), layers, per_layer=2, transit=2)
        total = len(cache._free)
        for _ in range(5):
            fetched = cache.fetch(0, [0, 1, 2, 3])
            next(fetched)
            fetched.close()
        assert len(cache._free) + len(cache._slot) == total
        assert {e for e, _ in cache.fetch(0, [0, 1, 2, 3])} == {0, 1, 2, 3}


def test_lru_by_hand() -> None:
    policy = Lru(2)
    trace = [policy.touch(k) or policy.admit(k) for k in "abacab"]
    #        a miss, b miss, a hit, c evicts b, a hit, b evicts c
    assert trace == [None, None, True, "b", True, "c"]
    assert (policy.hits, policy.misses) == (2, 4)
    assert Lru(0).admit("x") == "x"


def test_zero_is_an_id_like_any_other() -> None:
    policy = Lru(1)
    assert policy.admit(0) is None and policy.touch(0)
    assert policy.admit(1) == 0


def test_torch_sees_the_ring_bytes(file: tuple[Path, bytes]) -> None:
    path, content = file
    slice_ = Slice(Extent(path, 2, 64))
    with FlashStore(Recorder()) as store:
        feed = Feed(store, CPU, Recorder())
        feed.open_ring(1 << 14)
        feed.begin((slice_,))
        with feed.use(slice_) as data:
            assert data.dtype == torch.uint8 and bytes(data.tolist()) == content[2:66]
