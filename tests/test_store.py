"""The flash store: what it reads is what the file holds, wherever the extents lie, and errors are told."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from flashinfer_cli.checkpoint.base import Extent
from flashinfer_cli.device import allocate
from flashinfer_cli.errors import CorruptCheckpointError, StorageError
from flashinfer_cli.recorder import Recorder
from flashinfer_cli.store.drive import measure
from flashinfer_cli.store.flash import ALIGN, REQUEST_BYTES, FlashStore, span_of


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, bytes]:
    content = np.random.default_rng(0).integers(0, 256, 3 * REQUEST_BYTES + 777, dtype=np.uint8).tobytes()
    path = tmp_path / "data.bin"
    path.write_bytes(content)
    return path, content


@pytest.mark.parametrize("direct", ["auto", "never"])
@pytest.mark.parametrize(
    "places",
    [[(0, 1)], [(1, 4095)], [(4095, 2)], [(100, 2 * REQUEST_BYTES)], [(7, 9), (16, 5), (50_000, 3)], [(-777, 777)]],
)
def test_reads_what_is_there(data: tuple[Path, bytes], direct: str, places: list[tuple[int, int]]) -> None:
    path, content = data
    extents = [Extent(path, offset % len(content), size) for offset, size in places]
    recorder = Recorder()
    with FlashStore(recorder, threads=3, direct=direct) as store:
        found = store.read_now(extents, "test")
        assert store.mode.startswith("buffered") or direct == "auto"
    for extent, bytes_ in zip(extents, found, strict=True):
        assert bytes_.tobytes() == content[extent.offset : extent.offset + extent.nbytes]
    assert recorder.reads["load", "test"].bytes >= sum(e.nbytes for e in extents)
    assert recorder.phases["load"].read_seconds > 0


def test_neighbours_are_one_read(data: tuple[Path, bytes]) -> None:
    path, _ = data
    apart = span_of([Extent(path, 0, 100), Extent(path, 8192, 100)])
    joined = span_of([Extent(path, 10, 100), Extent(path, 110, 100)])
    assert len(apart.reads) == 2 and len(joined.reads) == 1
    assert joined.starts == (10, 110)
    for _, offset, length, place, _ in (*apart.reads, *joined.reads):
        assert offset % ALIGN == length % ALIGN == place % ALIGN == 0


def test_many_tickets_in_flight(data: tuple[Path, bytes]) -> None:
    path, content = data
    with FlashStore(Recorder(), threads=4) as store:
        spans = [span_of([Extent(path, i * 5000 + 3, 4000)]) for i in range(100)]
        buffer = allocate(sum(s.nbytes for s in spans))
        place, jobs = 0, []
        for span in spans:
            jobs.append((span, place, store.read(span, buffer, place, "test")))
            place += span.nbytes
        for i, (span, place, ticket) in enumerate(jobs):
            ticket.wait()
            start = place + span.starts[0]
            assert buffer[start : start + 4000].tobytes() == content[i * 5000 + 3 : i * 5000 + 4003]


def test_urgent_reads_go_first(data: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = data
    order: list[int] = []
    gate = threading.Event()
    real = FlashStore._read_one

    def note(self: FlashStore, request: tuple) -> None:
        gate.wait()
        order.append(request[2])
        real(self, request)

    monkeypatch.setattr(FlashStore, "_read_one", note)
    with FlashStore(Recorder(), threads=1) as store:
        buffer = allocate(16 * ALIGN)
        spans = [span_of([Extent(path, i * ALIGN, ALIGN)]) for i in range(5)]
        tickets = [store.read(span, buffer, i * ALIGN, "ahead") for i, span in enumerate(spans[:4])]
        time.sleep(0.05)  # the only thread has taken the first
        tickets.append(store.read(spans[4], buffer, 4 * ALIGN, "now", urgent=True))
        gate.set()
        for ticket in tickets:
            ticket.wait()
    assert order == [0, 4 * ALIGN, ALIGN, 2 * ALIGN, 3 * ALIGN]


def test_missing_file_is_named(tmp_path: Path) -> None:
    with FlashStore(Recorder()) as store, pytest.raises(StorageError, match=r"gone\.bin"):
        store.read_now([Extent(tmp_path / "gone.bin", 0, 10)], "test")


def test_file_that_shrank(data: tuple[Path, bytes]) -> None:
    path, content = data
    with FlashStore(Recorder()) as store:
        os.truncate(path, 5000)
        with pytest.raises((StorageError, CorruptCheckpointError), match=r"data\.bin"):
            store.read_now([Extent(path, 0, len(content))], "test")


def test_failed_direct_read_falls_back(data: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """An O_DIRECT open can succeed and its first read fail: the probe must notice, and the report must say so."""
    path, content = data
    real, direct = os.preadv, getattr(os, "O_DIRECT", None)
    if direct is None:
        pytest.skip("no O_DIRECT here")
    import fcntl

    def refuse(fd: int, buffers: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & direct:
            raise OSError(22, "Invalid argument")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse)
    with FlashStore(Recorder()) as store:
        (found,) = store.read_now([Extent(path, 5, 50)], "test")
        assert found.tobytes() == content[5:55]
        assert "buffered" in store.mode and "Invalid argument" in store.mode


def test_drive_rate_is_positive(data: tuple[Path, bytes]) -> None:
    rate = measure(data[0], request_bytes=64 * 1024, depth=2, seconds=0.02)
    assert rate.bytes_per_second > 0 and rate.request_bytes == 64 * 1024


def test_requests_that_are_measured_are_of_whole_blocks(data):
    """As many bytes as a run's requests had on average, say: a drive refuses what is not aligned."""
    rate = measure(data[0], request_bytes=8_900, depth=3, seconds=0.02)
    assert rate.request_bytes == 12_288 and rate.bytes_per_second > 0


def _queued(store: FlashStore, path: Path, count: int, size: int) -> tuple[np.ndarray, list]:
    """Reads behind one that holds up the only thread."""
    buffer = allocate(count * 2 * ALIGN)
    gate = threading.Event()
    inner, store._read_one = store._read_one, lambda *request: (gate.wait(10), inner(*request))
    spans = [span_of([Extent(path, i * 5000, size)]) for i in range(count)]
    tickets = [store.read(span, buffer, i * 2 * ALIGN, "ahead") for i, span in enumerate(spans)]
    while store._queue and len(store._queue) == count:  # until the thread has taken the first
        time.sleep(0.001)
    return buffer, [gate, spans, tickets]


def test_what_nobody_began_can_be_taken_back(data: tuple[Path, bytes]) -> None:
    path, content = data
    recorder = Recorder()
    with FlashStore(recorder, threads=1) as store:
        buffer, (gate, spans, tickets) = _queued(store, path, 4, 4000)
        assert store.cancel(tickets[0]) and not tickets[0].ready  # under way: its buffer must stay
        assert not store.cancel(tickets[2]) and tickets[2].ready and tickets[2].sizes == ()
        assert store.promote(tickets[0]) and not store.promote(tickets[3])
        assert [request[0] for request in store._queue] == [tickets[3], tickets[1]]
        gate.set()
        for i in (0, 1, 3):
            tickets[i].wait()
            start = i * 2 * ALIGN + spans[i].starts[0]
            assert buffer[start : start + 4000].tobytes() == content[i * 5000 : i * 5000 + 4000]
        assert not buffer[4 * ALIGN : 6 * ALIGN].any()
    assert recorder.reads["load", "ahead"].requests == 3


def test_a_read_taken_back_in_part_counts_what_was_read(data: tuple[Path, bytes]) -> None:
    path, _ = data
    recorder = Recorder()
    with FlashStore(recorder, threads=1, request_bytes=ALIGN) as store:
        buffer = allocate(16 * ALIGN)
        gate = threading.Event()
        inner, store._read_one = store._read_one, lambda *request: (gate.wait(10), inner(*request))
        ticket = store.read(span_of([Extent(path, 0, 8 * ALIGN)]), buffer, 0, "ahead")
        while len(store._queue) == 8:
            time.sleep(0.001)
        assert store.cancel(ticket) and ticket.sizes == (ALIGN,) and not ticket.ready
        gate.set()
        ticket.wait()
    found = recorder.reads["load", "ahead"]
    assert (found.requests, found.bytes, found.useful) == (1, ALIGN, 0)


def test_closing_leaves_nobody_waiting(data: tuple[Path, bytes]) -> None:
    path, _ = data
    store = FlashStore(Recorder(), threads=1)
    _, (gate, _, tickets) = _queued(store, path, 3, 100)
    closer = threading.Thread(target=store.close)
    closer.start()
    while store._queue:
        time.sleep(0.001)
    gate.set()
    closer.join(10)
    tickets[0].wait()
    with pytest.raises(StorageError, match="closed"):
        tickets[2].wait()
