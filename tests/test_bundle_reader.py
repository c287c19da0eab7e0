"""Opening and verifying a bundle: the manifest, damaged files, lying headers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundle_sources import dense_arrays, hashes, make_dense
from safetensors.numpy import save_file

from flashinfer_cli.bundles.format import FORMAT_VERSION, Manifest
from flashinfer_cli.bundles.reader import open_bundle
from flashinfer_cli.bundles.verify import verify_bundle
from flashinfer_cli.errors import BundleError, CheckpointNotFoundError


def test_manifest_survives_the_round_trip(dense: Path, tmp_path: Path) -> None:
    out = make_dense(dense, tmp_path / "out")
    data = (out / "bundle.json").read_bytes()
    manifest = Manifest.from_json(data)
    assert manifest.to_json() == data
    assert manifest.records == open_bundle(out).records
    assert manifest.source.fingerprint.startswith("sha256:")


def test_fingerprint_tells_sources_apart_but_not_places(dense: Path, tmp_path: Path) -> None:
    first = make_dense(dense, tmp_path / "first")
    shutil.copytree(dense, tmp_path / "b" / "source")
    second = make_dense(tmp_path / "b" / "source", tmp_path / "second")
    assert hashes(first) == hashes(second)
    arrays = dense_arrays(dense)
    arrays["0.up"][0, 0] += 1
    save_file(arrays, dense / "model.safetensors")
    third = make_dense(dense, tmp_path / "third")
    prints = [open_bundle(path).manifest.source.fingerprint for path in (first, second, third)]
    assert prints[0] == prints[1] != prints[2]


def edit_manifest(out: Path, **changes: Any) -> None:
    path = out / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_verify_finds_a_flipped_byte(dense: Path, tmp_path: Path) -> None:
    out = make_dense(dense, tmp_path / "out", extras={"tokenizer.json": b"{}"})
    seen: list[int] = []
    assert verify_bundle(out, lambda done, total, _: seen.append(total - done)) == []
    assert seen[-1] == 0
    path = out / "neurons-001.safetensors"
    with path.open("r+b") as file:
        file.seek(-700, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-700, os.SEEK_END)
        file.write(bytes([byte ^ 4]))
    open_bundle(out)  # contents are not read
    (out / "tokenizer.json").write_bytes(b"{ }")
    (out / "config.json").unlink()
    problems = verify_bundle(out)
    assert [problem.split()[0] for problem in problems] == ["neurons-001.safetensors", "config.json", "tokenizer.json"]
    assert "SHA-256" in problems[0]
    assert "missing" in problems[1]
    assert "3 bytes long, not 2" in problems[2]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / "bundle.json").unlink(), "no bundle.json"),
        (lambda out: (out / "bundle.json").write_text("{"), "damaged"),
        (lambda out: (out / "bundle.json").write_text("[]"), "damaged"),
        (lambda out: edit_manifest(out, format="other"), "another format"),
        (lambda out: edit_manifest(out, version=FORMAT_VERSION + 1), f"format version {FORMAT_VERSION + 1}"),
        (lambda out: edit_manifest(out, files={"../x": {"bytes": 1, "sha256": ""}}), "damaged"),
        (lambda out: edit_manifest(out, files={}), "does not list trunk"),
        (lambda out: edit_manifest(out, exactness="perfect"), "damaged"),
        (lambda out: edit_manifest(out, records={"0": 3}), "damaged"),
        (lambda out: (out / "neurons-000.safetensors").unlink(), "neurons-000.safetensors is missing"),
        (lambda out: os.truncate(out / "trunk.safetensors", 5000), "5000 bytes long"),
        (
            lambda out: (out / "config.json").write_text('["model_type":"llama"]\n'.ljust(28)[:28]),
            "config.json is not a JSON object",
        ),
    ],
)
def test_damaged_bundles_are_refused(dense: Path, tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    out = make_dense(dense, tmp_path / "out")
    damage(out)
    with pytest.raises(BundleError, match=message):
        open_bundle(out)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"shape":[40,', b'"shape":[41,'),
        (b'"F32"', b'"F64"'),
        (b'"layers.0', b'"layers.7'),
        (b"data_off", b"data_oof"),
    ],
)
def test_lying_headers_are_refused(dense: Path, tmp_path: Path, old: bytes, new: bytes) -> None:
    out = make_dense(dense, tmp_path / "out")
    path = out / "neurons-000.safetensors"
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))
    with pytest.raises(BundleError, match=r"neurons-000\.safetensors"):
        open_bundle(out)


def test_header_longer_than_the_file(dense: Path, tmp_path: Path) -> None:
    out = make_dense(dense, tmp_path / "out")
    with (out / "trunk.safetensors").open("r+b") as file:
        file.write((1 << 60).to_bytes(8, "little"))
    with pytest.raises(BundleError, match="header"):
        open_bundle(out)


def test_missing_paths(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        open_bundle(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match="no complete bundle"):
        open_bundle(tmp_path / "empty")
