"""The ring and the feed: right bytes in the right order whatever the room."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from flashinfer_cli.cache.slices import Feed, Slice
from flashinfer_cli.checkpoint.base import Extent
from flashinfer_cli.device import Device
from flashinfer_cli.recorder import Recorder
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


def test_torch_sees_the_ring_bytes(file: tuple[Path, bytes]) -> None:
    path, content = file
    slice_ = Slice(Extent(path, 2, 64))
    with FlashStore(Recorder()) as store:
        feed = Feed(store, CPU, Recorder())
        feed.open_ring(1 << 14)
        feed.begin((slice_,))
        with feed.use(slice_) as data:
            assert data.dtype == torch.uint8 and bytes(data.tolist()) == content[2:66]
