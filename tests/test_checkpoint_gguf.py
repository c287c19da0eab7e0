"""GGUF files against the gguf package that writes them: metadata, tensors, split files."""

from __future__ import annotations

import os
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_writing import TENSORS, arch_keys, write

from flashinfer_cli.checkpoint.base import FORMATS
from flashinfer_cli.checkpoint.gguf import GgufCheckpoint
from flashinfer_cli.checkpoint.gguf_header import GGML_FORMATS
from flashinfer_cli.checkpoint.open import open_checkpoint
from flashinfer_cli.checkpoint.rows import read_rows
from flashinfer_cli.errors import CheckpointNotFoundError, CorruptCheckpointError


def test_metadata_and_tensors_match_the_reader_of_gguf(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tensors = {
        "token_embd.weight": rng.standard_normal((10, 32)).astype(np.float32),
        "blk.0.ffn_up_exps.weight": rng.standard_normal((3, 6, 32)).astype(np.float16),
        "blk.0.norm.weight": rng.standard_normal(32).astype(np.float32),
    }
    quantized = gguf.quants.quantize(rng.standard_normal((4, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    keys = arch_keys() | {
        "general.name": "Größe ∞",
        "tokenizer.ggml.tokens": ["a", "", "ü" * 9, "<s>"],
        "tokenizer.ggml.scores": [0.5, -1.5],
        "tokenizer.ggml.token_type": [1, 3, 6],
        "flag": True,
    }
    path = write(tmp_path / "m.gguf", keys=keys, tensors=tensors,
                 raw={"q.weight": (quantized, gguf.GGMLQuantizationType.Q8_0)})  # fmt: skip
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, GgufCheckpoint)
    assert checkpoint.kind == "gguf"
    assert checkpoint.files == [path]
    meta = checkpoint.metadata
    assert meta["general.name"] == "Größe ∞"
    assert meta["tokenizer.ggml.tokens"] == ["a", "", "ü" * 9, "<s>"]
    np.testing.assert_array_equal(meta["tokenizer.ggml.scores"], np.array([0.5, -1.5], np.float32))
    np.testing.assert_array_equal(meta["tokenizer.ggml.token_type"], [1, 3, 6])
    assert meta["flag"] is True
    assert meta["llama.block_count"] == 2
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert set(theirs) == set(checkpoint.tensors)
    for name, info in checkpoint.tensors.items():
        assert info.shape == tuple(int(n) for n in theirs[name].shape)[::-1]
        assert info.offset == theirs[name].data_offset
        assert info.format == theirs[name].tensor_type.name
        assert read_rows(info, 0, info.num_rows).tobytes() == theirs[name].data.tobytes()
    up = checkpoint.tensors["blk.0.ffn_up_exps.weight"]
    row = read_rows(up, 2 * 6 + 1, 1).view(np.float16)
    np.testing.assert_array_equal(row, tensors["blk.0.ffn_up_exps.weight"][2, 1])


def test_our_table_of_types_is_ggmls() -> None:
    for number, name in GGML_FORMATS.items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name == name
        assert gguf.GGML_QUANT_SIZES[kind] == FORMATS[name]


def test_strings_across_the_buffers_edge(tmp_path: Path) -> None:
    tokens = [f"{i}" * (i % 50) for i in range(60_000)] + ["x" * 3_000_000]
    path = write(tmp_path / "m.gguf", keys=arch_keys() | {"tokenizer.ggml.tokens": tokens, "after": 7})
    metadata = GgufCheckpoint(path).metadata
    assert metadata["tokenizer.ggml.tokens"] == tokens
    assert metadata["after"] == 7


def test_a_file_is_known_by_its_magic_or_its_folder(tmp_path: Path) -> None:
    write(tmp_path / "sha256-abc")
    assert open_checkpoint(tmp_path / "sha256-abc").kind == "gguf"
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "one.gguf")
    assert open_checkpoint(tmp_path / "folder").kind == "gguf"
    write(tmp_path / "folder" / "two.gguf")
    with pytest.raises(CheckpointNotFoundError, match="2 GGUF models"):
        open_checkpoint(tmp_path / "folder")


def split(tmp_path: Path) -> list[Path]:
    tensors = {f"blk.{i}.x.weight": np.full((4, 32), i, np.float32) for i in range(4)}
    write(tmp_path / "m.gguf", tensors={**TENSORS, **tensors}, split_max_tensors=2)
    return sorted(tmp_path.glob("m-*.gguf"))


def test_any_part_opens_all(tmp_path: Path) -> None:
    parts = split(tmp_path)
    assert len(parts) >= 3
    for given in (parts[0], parts[-1], tmp_path):
        checkpoint = open_checkpoint(given)
        assert checkpoint.files == parts
        assert len(checkpoint.tensors) == 6
        assert checkpoint.config["model_type"] == "llama"
        info = checkpoint.tensors["blk.3.x.weight"]
        assert (read_rows(info, 1, 2).view(np.float32) == 3).all()


def test_missing_and_renamed_parts(tmp_path: Path) -> None:
    parts = split(tmp_path)
    parts[1].rename(tmp_path / "elsewhere")
    with pytest.raises(CorruptCheckpointError, match=f"'{parts[1].name}' is missing"):
        open_checkpoint(parts[0])
    parts[0].rename(tmp_path / "m.gguf")
    with pytest.raises(CorruptCheckpointError, match="its name does not say which"):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.real
def test_real_files_open_fast_and_small() -> None:
    folder = os.environ.get("GENAI_RUN_MODELS")
    paths = sorted(Path(folder).glob("*.gguf")) if folder else []
    if not paths:
        pytest.skip("GENAI_RUN_MODELS names no folder with GGUF files")
    for path in paths:
        before = time.perf_counter()
        checkpoint = GgufCheckpoint(path)
        assert time.perf_counter() - before < 2
        theirs = {t.name: (int(t.data_offset), int(t.n_bytes)) for t in gguf.GGUFReader(path).tensors}
        assert {name: (t.offset, t.nbytes) for name, t in checkpoint.tensors.items()} == theirs
