"""Sources, places and arguments of which no bundle is made, and locks between writers."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import numpy as np
import pytest
from bundle_sources import (
    HIDDEN,
    INTER,
    dense_arrays,
    dense_weights,
    hashes,
    make_dense,
    model_config,
    open_safetensors,
    save_dense,
)
from safetensors.numpy import save_file

from flashinfer_cli.bundles import publish
from flashinfer_cli.bundles.reader import open_bundle
from flashinfer_cli.bundles.verify import verify_bundle
from flashinfer_cli.bundles.writer import plan_bundle, write_bundle
from flashinfer_cli.config import WeightRef
from flashinfer_cli.errors import BundleError, CorruptCheckpointError, StorageError, UsageError


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["0.down", "1.up", "embed", "1.norm", "0.qkv"])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, bad: float, name: str) -> None:
    arrays = save_dense(tmp_path / "source")
    arrays[name].reshape(-1)[-5] = bad
    save_file(arrays, tmp_path / "source" / "model.safetensors")
    with pytest.raises(CorruptCheckpointError, match=f"'{name}' holds NaN or infinite"):
        make_dense(tmp_path / "source", tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "source"]


def test_a_source_cut_short_is_named(dense: Path, tmp_path: Path) -> None:
    checkpoint = open_safetensors(dense)
    path = dense / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors ends at byte"):
        write_bundle(checkpoint, model_config(2), dense_weights(checkpoint), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["source", "source/out", ".", "source/model.safetensors"])
def test_the_source_is_no_place_for_a_bundle(dense: Path, tmp_path: Path, place: str) -> None:
    before = hashes(dense)
    with pytest.raises(BundleError, match="never written to"):
        make_dense(dense, tmp_path / place, overwrite=True)
    assert hashes(dense) == before


def test_the_source_is_untouched(dense: Path, tmp_path: Path) -> None:
    path = dense / "model.safetensors"
    path.chmod(0o444)
    before = (hashes(dense), path.stat().st_mtime_ns, sorted(dense.iterdir()))
    make_dense(dense, tmp_path / "out")
    assert (hashes(dense), path.stat().st_mtime_ns, sorted(dense.iterdir())) == before


def test_out_must_be_free_or_a_bundle_to_overwrite(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_dense(dense, out)
    first = hashes(out)
    with pytest.raises(BundleError, match="exists already"):
        make_dense(dense, out, dtype="f16")
    assert hashes(out) == first
    make_dense(dense, out, dtype="f16", overwrite=True)
    assert open_bundle(out).manifest.parameters["dtype"] == "f16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(BundleError, match="not a bundle"):
        make_dense(dense, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_a_failed_overwrite_keeps_the_old_bundle(dense: Path, tmp_path: Path) -> None:
    out = make_dense(dense, tmp_path / "out")
    first = hashes(out)
    arrays = {"0.up": np.full((INTER, HIDDEN), np.nan, np.float32)}
    whole = dense_arrays(dense) | arrays
    save_file(whole, dense / "model.safetensors")
    with pytest.raises(CorruptCheckpointError):
        make_dense(dense, out, overwrite=True)
    assert hashes(out) == first
    assert verify_bundle(out) == []


def test_a_kill_amid_the_swap_is_repaired(dense: Path, tmp_path: Path) -> None:
    out = make_dense(dense, tmp_path / "out")
    out.rename(tmp_path / ".out.replaced")
    with pytest.raises(BundleError, match="exists already"):
        make_dense(dense, out)
    assert verify_bundle(out) == []


def test_two_writers(dense: Path, tmp_path: Path) -> None:
    lock = tmp_path / ".out.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(BundleError, match="Another process"):
            make_dense(dense, tmp_path / "out")
    make_dense(dense, tmp_path / "out")
    assert not lock.exists()


def test_a_lock_file_removed_while_we_lock_it_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, real, calls = tmp_path / ".out.lock", fcntl.flock, []

    def flock(fd: int, how: int) -> None:
        if not calls:
            lock.unlink()  # what the writer before us does when it ends
        calls.append(fd)
        real(fd, how)

    monkeypatch.setattr(publish.fcntl, "flock", flock)
    with publish.writer_lock(tmp_path / "out"):
        assert len(calls) == 2
        with lock.open("w") as other, pytest.raises(BlockingIOError):
            real(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_place_that_takes_no_lock_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match="nowhere cannot be written to"),
        publish.writer_lock(tmp_path / "nowhere" / "out"),
    ):
        pass


def test_wrong_arguments(dense: Path, tmp_path: Path) -> None:
    checkpoint = open_safetensors(dense)
    weights = dense_weights(checkpoint)
    with pytest.raises(UsageError, match="int3"):
        plan_bundle(checkpoint, model_config(2), weights, dtype="int3")
    with pytest.raises(CorruptCheckpointError, match="3 layers"):
        plan_bundle(checkpoint, model_config(3), weights)
    del weights.layers[1]["down"]
    with pytest.raises(CorruptCheckpointError, match="Layer 1 has no down"):
        plan_bundle(checkpoint, model_config(2), weights)
    weights.layers[1]["down"] = WeightRef("1.down", 0, HIDDEN + 1, INTER)
    with pytest.raises(CorruptCheckpointError, match=r"1\.down"):
        plan_bundle(checkpoint, model_config(2), weights)
    out = make_dense(dense, tmp_path / "out")
    with pytest.raises(BundleError, match="already"):
        plan_bundle(open_bundle(out), model_config(2), weights)


def test_plan_says_the_sizes_and_writes_nothing(dense: Path, tmp_path: Path) -> None:
    checkpoint = open_safetensors(dense)
    plan = plan_bundle(checkpoint, model_config(2), dense_weights(checkpoint))
    assert list(tmp_path.iterdir()) == [dense]
    out = make_dense(dense, tmp_path / "out")
    assert {file.name: file.nbytes for file in plan.files} == {
        p.name: p.stat().st_size for p in out.glob("*.safetensors")
    }
    assert plan.total_bytes == sum(file.nbytes for file in plan.files)
