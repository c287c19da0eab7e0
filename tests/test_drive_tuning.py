"""How a drive's best requests are chosen, kept and used."""

from __future__ import annotations

import json

import numpy as np
import pytest

from flashinfer_cli.checkpoint.base import Extent
from flashinfer_cli.config import KiB
from flashinfer_cli.device import allocate
from flashinfer_cli.recorder import Recorder
from flashinfer_cli.store import tuning
from flashinfer_cli.store.flash import FlashStore, span_of


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(np.random.default_rng(0).bytes(8 << 20))
    return path


def test_the_least_in_flight_that_comes_close_is_chosen():
    curve = ((128 * KiB, 4, 1.0e9), (512 * KiB, 4, 1.97e9), (512 * KiB, 8, 2.0e9), (1024 * KiB, 8, 1.99e9))
    assert tuning.choose(curve).request_bytes == 512 * KiB and tuning.choose(curve).depth == 4
    assert tuning.choose(curve).bytes_per_second == 1.97e9
    slow_small = ((128 * KiB, 16, 1.0e9), (1024 * KiB, 8, 2.0e9))
    assert tuning.choose(slow_small).request_bytes == 1024 * KiB


def test_a_drive_is_measured_once_and_again_when_asked(file):
    said: list[str] = []
    first = tuning.reading_of(file, notify=said.append, seconds=0.01)
    assert said and tuning.kept(tuning.drive_of(file)) == first and len(first.curve) >= 9
    assert tuning.reading_of(file, notify=said.append, seconds=0.01) == first and len(said) == 1
    tuning.reading_of(file, remeasure=True, notify=said.append, seconds=0.01)
    assert len(said) == 2


def test_only_a_drive_that_much_streams_from_is_measured(file, monkeypatch):
    measured = tuning.Reading(128 * KiB, 4)
    monkeypatch.setattr(tuning, "reading_of", lambda path, **options: measured)
    monkeypatch.setattr(tuning, "MEASURED_MODEL", 16 << 20)
    assert tuning.how_to_read([file], 0) == tuning.how_to_read([file], 15 << 20) == tuning.Reading()
    assert tuning.how_to_read([file], 16 << 20) is tuning.how_to_read([file], 0, remeasure=True) is measured
    small = file.with_name("small")
    small.write_bytes(bytes(1024))
    assert tuning.how_to_read([small], 16 << 20) == tuning.Reading()
    assert tuning.how_to_read([small, file], 16 << 20) is measured


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"DRIVE": {"request_bytes": 3, "depth": 8, "curve": []}}'])
def test_a_damaged_record_is_measured_over(file, damage):
    tuning.kept_file().parent.mkdir(parents=True)
    tuning.kept_file().write_text(damage.replace("DRIVE", tuning.drive_of(file)))
    assert tuning.kept(tuning.drive_of(file)) is None
    found = tuning.reading_of(file, seconds=0.01)
    assert json.loads(tuning.kept_file().read_text())[tuning.drive_of(file)]["depth"] == found.depth


def test_an_unwritable_cache_only_costs_time(file, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert tuning.reading_of(file, seconds=0.01).curve
    assert tuning.kept(tuning.drive_of(file)) is None


def test_requests_are_as_large_as_asked(file):
    recorder = Recorder()
    with FlashStore(recorder, request_bytes=128 * KiB) as store:
        buffer = allocate(4 << 20)
        store.read(span_of([Extent(file, 0, 4 << 20)]), buffer, 0, "slice").wait()
    assert sum(io.requests for io in recorder.reads.values()) == 32
    assert bytes(buffer[:100]) == file.read_bytes()[:100]
