"""Safetensors folders: what opens, byte ranges against the reference library, and every way a folder can lie."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from flashinfer_cli.checkpoint.open import is_bundle, open_checkpoint
from flashinfer_cli.checkpoint.rows import read_rows
from flashinfer_cli.checkpoint.safetensors import SafetensorsCheckpoint
from flashinfer_cli.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    StorageError,
    UnsupportedModelError,
)


def raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin: Any = 0, end: Any = 8, dtype: Any = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def sharded(folder: Path, weight_map: dict[str, Any]) -> Path:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


# ------------------------------------------------------------------ what opens


def test_single_file_matches_the_reference_library(folder: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.standard_normal((6, 5)).astype(np.float32),
        "b": rng.standard_normal((2, 3, 4)).astype(np.float16),
        "c": np.arange(7, dtype=np.int64),
        "scalar": np.array(3.5, dtype=np.float64),
        "none": np.zeros((0, 4), dtype=np.float32),
    }
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.kind == "safetensors"
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.generation_config == {}
    assert checkpoint.files == [folder / "model.safetensors"]
    assert set(checkpoint.tensors) == set(arrays)
    for name, array in arrays.items():
        info = checkpoint.tensors[name]
        assert info.shape == array.shape
        assert read_rows(info, 0, info.num_rows).tobytes() == array.tobytes()
    middle = read_rows(checkpoint.tensors["a"], 2, 3).view(np.float32).reshape(3, 5)
    np.testing.assert_array_equal(middle, arrays["a"][2:5])
    flat = read_rows(checkpoint.tensors["b"], 5, 1).view(np.float16)
    np.testing.assert_array_equal(flat, arrays["b"][1, 2])


def test_sharded_by_index_and_generation_config(folder: Path) -> None:
    save_file({"a": np.ones(3, np.float32)}, folder / "x-2.safetensors")
    save_file({"b": np.ones(4, np.float32)}, folder / "x-1.safetensors")
    save_file({"stray": np.ones(4, np.float32)}, folder / "x-3.safetensors")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    sharded(folder, {"a": "x-2.safetensors", "b": "x-1.safetensors"})
    for path in (folder, folder / "x-2.safetensors"):  # any shard opens all of them
        checkpoint = open_checkpoint(path)
        assert [file.name for file in checkpoint.files] == ["x-1.safetensors", "x-2.safetensors"]
        assert set(checkpoint.tensors) == {"a", "b"}
        assert checkpoint.generation_config == {"eos_token_id": [1, 2]}
    assert set(open_checkpoint(folder / "x-3.safetensors").tensors) == {"stray"}


def test_other_names_are_all_taken(folder: Path) -> None:
    save_file({"a": np.ones(3, np.float32)}, folder / "second.safetensors")
    save_file({"b": np.ones(4, np.float32)}, folder / "first.safetensors")
    assert [file.name for file in open_checkpoint(folder).files] == ["first.safetensors", "second.safetensors"]
    save_file({"b": np.ones(4, np.float32)}, folder / "third.safetensors")
    with pytest.raises(CorruptCheckpointError, match=r"'b' is both in .*first.* and in .*third"):
        open_checkpoint(folder)


def test_the_index_decides_between_two_files_with_the_same_tensor(folder: Path) -> None:
    save_file({"a": np.zeros(3, np.float32), "b": np.zeros(3, np.float32)}, folder / "1.safetensors")
    save_file({"a": np.ones(3, np.float32)}, folder / "2.safetensors")
    checkpoint = open_checkpoint(sharded(folder, {"a": "2.safetensors", "b": "1.safetensors"}))
    assert checkpoint.tensors["a"].path.name == "2.safetensors"


def test_symlinked_files_open_as_in_the_hub_cache(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    blobs = tmp_path_factory.mktemp("blobs")
    save_file({"a": np.ones(3, np.float32)}, blobs / "abc")
    (folder / "model.safetensors").symlink_to(blobs / "abc")
    assert set(open_checkpoint(folder).tensors) == {"a"}


def test_is_bundle(folder: Path) -> None:
    assert not is_bundle(folder)
    (folder / "bundle.json").write_text("{}")
    assert is_bundle(folder)


def test_opening_reads_headers_only(folder: Path) -> None:
    """A sparse file of 64 GiB opens at once, within a few megabytes."""
    size = 1 << 36
    header = {"a": entry(0, size, "BF16", (size // 4, 2))}
    path = raw(folder / "model.safetensors", header)
    os.truncate(path, path.stat().st_size + size)
    info = open_checkpoint(folder).tensors["a"]
    assert (info.num_rows, info.row_bytes) == (size // 4, 4)
    assert not read_rows(info, size // 4 - 2, 2).any()


# ------------------------------------------------------------------ folders that lie


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b.safetensors", 5, "a\0.safetensors"]
)
def test_index_names_must_be_plain(folder: Path, name: Any) -> None:
    save_file({"a": np.ones(3, np.float32)}, folder.parent / "x.safetensors")
    with pytest.raises(CorruptCheckpointError, match=r"'a' to .*not a plain file name"):
        open_checkpoint(sharded(folder, {"a": name}))


def test_index_may_name_safetensors_only(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CorruptCheckpointError, match="not a safetensors file"):
        open_checkpoint(sharded(folder, {"a": "pytorch_model.bin"}))


def test_missing_shard_and_missing_tensor(folder: Path) -> None:
    save_file({"a": np.ones(3, np.float32)}, folder / "1.safetensors")
    sharded(folder, {"a": "1.safetensors", "b": "2.safetensors"})
    with pytest.raises(CorruptCheckpointError, match=r"'2\.safetensors', which is missing"):
        open_checkpoint(folder)
    (folder / "2.safetensors").symlink_to(folder / "nowhere")
    with pytest.raises(CorruptCheckpointError, match=r"'2\.safetensors', which is missing"):
        open_checkpoint(folder)
    sharded(folder, {"a": "1.safetensors", "b": "2" * 5000 + ".safetensors"})
    with pytest.raises(CorruptCheckpointError, match="which is missing"):
        open_checkpoint(folder)
    sharded(folder, {"a": "1.safetensors", "b": "1.safetensors"})
    with pytest.raises(CorruptCheckpointError, match=r"tensor 'b' in '1\.safetensors', which does not have it"):
        open_checkpoint(folder)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{"])
def test_bad_index(folder: Path, index: str) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CorruptCheckpointError, match=r"index\.json"):
        open_checkpoint(folder)


def test_folders_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="is empty"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointNotFoundError, match="holds no model"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="is not there"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointNotFoundError, match="not a model file"):
        open_checkpoint(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "x.pt"]
)
def test_pickles_are_refused_with_the_reason(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"\x80\x02")
    for path in (folder, folder / name):
        with pytest.raises(UnsupportedModelError, match="can run any code") as caught:
            open_checkpoint(path)
        assert "safetensors" in (caught.value.hint or "")


def test_config_must_be_there_and_an_object(folder: Path) -> None:
    save_file({"a": np.ones(3, np.float32)}, folder / "model.safetensors")
    for text in ("", "{", "[1]", '"x"'):
        (folder / "config.json").write_text(text)
        with pytest.raises(CorruptCheckpointError, match=r"config\.json"):
            open_checkpoint(folder)
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(CorruptCheckpointError, match="UTF-8"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(CheckpointNotFoundError, match=r"no config\.json"):
            open_checkpoint(path)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "'gptq'"),
        ({"quantization_config": {"quant_method": "awq"}}, "'awq'"),
        ({"quantization_config": {"load_in_4bit": True}}, "'bitsandbytes'"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "'fp8'"),
    ],
)
def test_quantized_folders_name_the_method(folder: Path, config: dict[str, Any], method: str) -> None:
    save_file({"a": np.ones(3, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=method):
        open_checkpoint(folder)


# ------------------------------------------------------------------ files that change or cannot be read


def test_rows_of_a_file_that_was_cut_off_later(folder: Path) -> None:
    save_file({"a": np.ones((4, 4), np.float32)}, folder / "model.safetensors")
    info = SafetensorsCheckpoint(folder).tensors["a"]
    os.truncate(info.path, info.offset + 20)
    assert read_rows(info, 0, 1).size == 16
    with pytest.raises(CorruptCheckpointError, match="ends inside of tensor 'a'"):
        read_rows(info, 0, 4)
    info.path.unlink()
    with pytest.raises(CheckpointNotFoundError, match="is not there"):
        read_rows(info, 0, 1)


def test_pipes_and_folders_do_not_hang(folder: Path) -> None:
    (folder / "model.safetensors").mkdir()
    with pytest.raises(CheckpointNotFoundError, match="is not a file"):
        open_checkpoint(folder)
    (folder / "model.safetensors").rmdir()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(CheckpointNotFoundError, match="is not a file"):
        open_checkpoint(folder)


def test_system_errors_are_storage_errors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": np.ones(3, np.float32)}, folder / "model.safetensors")

    def refuse(*_: Any, **__: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match="cannot be read: Permission denied"):
        open_checkpoint(folder)
