"""That a kill anywhere, or a full disk, changes nothing of the result and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bundle_sources import HIDDEN, INTER, dense_weights, hashes, make_dense, model_config, open_safetensors, save_dense

from flashinfer_cli.bundles import bands, publish, records, writer
from flashinfer_cli.bundles.reader import open_bundle
from flashinfer_cli.bundles.writer import plan_bundle
from flashinfer_cli.errors import BundleError, StorageError


class Killed(BaseException):
    pass


def kill_at(limit: int) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, what: str) -> None:
        if done >= limit:
            raise Killed

    return progress


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "COPY_BYTES", 900)
    monkeypatch.setattr(bands, "STAGING", 0)


@pytest.mark.usefixtures("small_steps")
def test_interrupted_anywhere_and_resumed_is_the_same(dense: Path, tmp_path: Path) -> None:
    whole = make_dense(dense, tmp_path / "a" / "out")
    wanted, checkpoint = hashes(whole), open_safetensors(dense)
    total = plan_bundle(checkpoint, model_config(2), dense_weights(checkpoint)).total_bytes
    dice = random.Random(1)
    for round in range(8):
        out = tmp_path / str(round) / "out"
        limits = sorted(dice.randrange(1, total) for _ in range(3))
        for limit in limits:
            with pytest.raises(Killed):
                make_dense(dense, out, progress=kill_at(limit), memory_bytes=4096)
            assert not out.exists()
            with pytest.raises(BundleError, match="unfinished"):
                open_bundle(out.with_name(".out.partial"))
        make_dense(dense, out)
        assert hashes(out) == wanted
        assert [path.name for path in out.parent.iterdir()] == ["out"]


CHILD = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from bundle_sources import make_dense
from flashinfer_cli.bundles import bands, records
records.COPY_BYTES, bands.STAGING = 900, 0
limit = int(sys.argv[4])
def progress(done, total, what):
    if done >= limit:
        os.kill(os.getpid(), signal.SIGKILL)
make_dense(Path(sys.argv[2]), Path(sys.argv[3]), progress=progress, memory_bytes=4096)
"""


def test_killed_process_resumes_from_its_finished_files(dense: Path, tmp_path: Path) -> None:
    wanted = hashes(make_dense(dense, tmp_path / "whole"))
    out = tmp_path / "out"
    total = sum(path.stat().st_size for path in (tmp_path / "whole").glob("*.safetensors"))
    for limit in (total // 3, total - 5000):
        command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(dense), str(out), str(limit)]
        assert subprocess.run(command, check=False).returncode == -9
    done = {path.name for path in (tmp_path / ".out.partial").glob("*.safetensors")}
    assert done == {"trunk.safetensors", "neurons-000.safetensors"}
    seen: list[tuple[int, str]] = []
    make_dense(dense, out, progress=lambda now, _, what: seen.append((now, what)))
    assert seen[0][1] == "trunk.safetensors"
    assert [now for now, _ in seen] == sorted(now for now, _ in seen)
    assert len([what for _, what in seen if what == "neurons-000.safetensors"]) == 1  # counted, not written again
    assert seen[-1][0] == total
    assert hashes(out) == wanted
    assert not (tmp_path / ".out.lock").exists()


def test_killed_between_the_manifest_and_the_rename(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(writer, "publish_folder", killed)
        with pytest.raises(Killed):
            make_dense(dense, out)
    assert (tmp_path / ".out.partial" / "bundle.json").exists()
    with pytest.raises(BundleError, match="dtype"):
        make_dense(dense, out, dtype="bf16")
    make_dense(dense, out)
    assert hashes(out) == hashes(make_dense(dense, tmp_path / "whole"))


def interrupted(dense: Path, out: Path) -> Path:
    size = (dense / "model.safetensors").stat().st_size
    with pytest.raises(Killed):
        make_dense(dense, out, progress=kill_at(size))
    return out.with_name(f".{out.name}.partial")


def test_resuming_with_anything_else_is_refused(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    partial = interrupted(dense, out)
    before = hashes(partial)
    with pytest.raises(BundleError, match="parameter dtype was 'auto' and now is 'f16'") as raised:
        make_dense(dense, out, dtype="f16")
    assert "--overwrite" in str(raised.value.hint)
    assert str(partial) in str(raised.value.hint)
    assert hashes(partial) == before
    path = dense / "model.safetensors"
    data, state = path.read_bytes(), path.stat()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(BundleError, match="source has changed"):
        make_dense(dense, out)
    path.write_bytes(data)
    os.utime(path, (1, 1))
    with pytest.raises(BundleError, match="source has changed"):
        make_dense(dense, out)
    save_dense(tmp_path / "second" / "other")
    with pytest.raises(BundleError, match=r"'source' .* now is 'other'"):
        make_dense(tmp_path / "second" / "other", out)
    journal = json.loads((partial / "journal.json").read_text())
    (partial / "journal.json").write_text(json.dumps(journal | {"version": 0}))
    with pytest.raises(BundleError, match="format version was '0'"):
        make_dense(dense, out)
    make_dense(dense, out, dtype="f16", overwrite=True)
    assert open_bundle(out).manifest.parameters["dtype"] == "f16"
    assert not partial.exists()


def test_a_source_that_changes_meanwhile_gives_no_bundle(dense: Path, tmp_path: Path) -> None:
    def progress(done: int, total: int, what: str) -> None:
        os.utime(dense / "model.safetensors", (1, 1))

    with pytest.raises(BundleError, match="has changed while"):
        make_dense(dense, tmp_path / "out", progress=progress)
    assert list(tmp_path.iterdir()) == [dense]


def test_no_space_is_found_out_first(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_safetensors(dense)
    total = plan_bundle(checkpoint, model_config(2), dense_weights(checkpoint)).total_bytes
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 77, 77))
    with pytest.raises(StorageError, match="77 bytes") as raised:
        make_dense(dense, tmp_path / "deep" / "out")
    assert any(int(word.strip("()")) >= total for word in raised.value.message.split() if word.strip("()").isdigit())
    assert list(tmp_path.iterdir()) == [dense]


def test_the_scratch_file_is_counted(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_safetensors(dense)
    total = plan_bundle(checkpoint, model_config(2), dense_weights(checkpoint)).total_bytes
    free = total + writer.SPARE_BYTES + INTER * HIDDEN * 4 - 1
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))
    with pytest.raises(StorageError):
        make_dense(dense, tmp_path / "out", memory_bytes=4096)
    make_dense(dense, tmp_path / "out")


@pytest.mark.parametrize("when", range(0, 24, 3))
def test_a_disk_that_fills_up_leaves_nothing(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    real, calls = publish.write_all, iter(range(10**6))

    def write_all(fd: int, data: memoryview) -> None:
        if next(calls) >= when:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd, data)

    monkeypatch.setattr(publish, "write_all", write_all)
    try:
        make_dense(dense, tmp_path / "deep" / "out")
    except StorageError:
        assert list(tmp_path.iterdir()) == [dense]
    else:
        pytest.fail(f"only {next(calls)} writes")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    mount, umount = shutil.which("mount"), shutil.which("umount")
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mount or not umount or os.geteuid() != 0:
        pytest.skip("mounting needs root")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield disk
    subprocess.run([umount, disk], check=True)


def test_a_disk_that_is_really_full(dense: Path, tiny_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="too full"):
        make_dense(dense, tiny_disk / "out")
    assert list(tiny_disk.iterdir()) == []
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
    with pytest.raises(StorageError, match="too full"):
        make_dense(dense, tiny_disk / "out")
    assert list(tiny_disk.iterdir()) == []
