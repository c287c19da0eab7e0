"""Records read by their numbers, into rows of their own."""

from __future__ import annotations

import numpy as np
import pytest

from flashinfer_cli.cache.neurons import NeuronCache
from flashinfer_cli.cache.slots import NeuronFile
from flashinfer_cli.cache.window import make_policy
from flashinfer_cli.device import allocate, resolve
from flashinfer_cli.errors import CorruptCheckpointError
from flashinfer_cli.recorder import Recorder
from flashinfer_cli.store.flash import FlashStore
from flashinfer_cli.store.scatter import MOST_VIEWS


def address(buffer: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return buffer.ctypes.data + rows * buffer.shape[1]


@pytest.mark.parametrize(("direct", "batched"), [("auto", True), ("auto", False), ("never", True)])
def test_records_land_in_their_rows(tmp_path, direct, batched):
    """Handed to the kernel in batches, or read one by one."""
    width, base, count = 512, 4096, 3000
    content = np.random.default_rng(1).integers(0, 255, (count, width), np.uint8)
    (tmp_path / "f").write_bytes(bytes(base) + content.tobytes())
    random = np.random.default_rng(2)
    recorder = Recorder()
    with FlashStore(recorder, direct=direct) as store:
        store.reader.batched = batched
        for share in (0.002, 0.05, 0.5, 1.0):
            ids = np.flatnonzero(random.random(count) < share)
            rows = random.permutation(count)[: len(ids)]
            buffer = allocate(count * width).reshape(count, width)
            store.read_records(tmp_path / "f", base, width, ids, address(buffer, rows), (buffer,), "neuron").wait()
            assert (buffer[rows] == content[ids]).all()
            left = np.setdiff1d(np.arange(count), rows)
            assert not buffer[left].any()  # nothing is written where nothing was asked for
        store.tick()
    assert len(ids) > 2 * MOST_VIEWS


def test_neighbours_and_small_gaps_are_one_read(tmp_path):
    (tmp_path / "f").write_bytes(bytes(4096 + 100 * 512))
    recorder = Recorder()
    with FlashStore(recorder) as store:
        buffer = allocate(100 * 512).reshape(100, 512)
        ids = np.array([0, 1, 2, 5, 60, 61])
        store.read_records(tmp_path / "f", 4096, 512, ids, address(buffer, np.arange(6)), (buffer,), "neuron").wait()
    count = recorder.reads["load", "neuron"]
    assert (count.requests, count.useful, count.bytes) == (2, 6 * 512, 8 * 512)


def test_a_file_that_has_shrunk_is_told(tmp_path):
    (tmp_path / "f").write_bytes(bytes(100 * 512))
    for batched in (True, False):
        with FlashStore(Recorder()) as store:
            store.reader.batched = batched
            buffer = allocate(200 * 512).reshape(200, 512)
            ids = np.arange(0, 200, 40)
            ticket = store.read_records(tmp_path / "f", 0, 512, ids, address(buffer, ids), (buffer,), "neuron")
            with pytest.raises(CorruptCheckpointError, match="shrunk"):
                ticket.wait()


@pytest.mark.parametrize("left_at", [None, 0, 2])
def test_a_token_that_is_left_halfway_leaves_no_slot_unread(tmp_path, left_at):
    """As by Ctrl-C in a chat, before a block is asked for or while one is computed on; what holds it may still live."""
    width, count = 512, 64
    content = np.random.default_rng(3).integers(1, 255, (count, width), np.uint8)
    (tmp_path / "f").write_bytes(content.tobytes())
    with FlashStore(Recorder()) as store:
        files = {0: NeuronFile(tmp_path / "f", 0, count, width)}
        cache = NeuronCache(store, resolve("cpu"), Recorder(), files, {0: make_policy("recent", count, 50, 1)}, block=4)
        left = cache.fetch(0, np.arange(10, 50))
        if left_at is not None:
            arriving = iter(left)
            for _ in range(left_at + 1):
                next(arriving)
        ids = np.arange(0, 64, 3)
        for _ in range(2):  # read, then found in slots
            for block, records in cache.fetch(0, ids):
                assert (records.gather().numpy().reshape(len(block), width) == content[block]).all()
        assert cache.layers[0].policy.hits == len(ids) + len(range(12, 50, 3))
        store.tick()
