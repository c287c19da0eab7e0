"""What a bundle stores in another format than its source: rounding, ranges, blocks, and transposing in bands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from bundle_sources import (
    HIDDEN,
    INTER,
    FakeCheckpoint,
    bfloat16,
    dense_weights,
    hashes,
    make_dense,
    model_config,
    open_safetensors,
    raw_file,
    ref,
    save_dense,
    stored,
)
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors import safe_open
from safetensors.numpy import save_file
from stored_weights import OURS

from flashinfer_cli.bundles import bands, convert, records
from flashinfer_cli.bundles.reader import open_bundle
from flashinfer_cli.bundles.writer import plan_bundle, write_bundle
from flashinfer_cli.checkpoint.base import FORMATS
from flashinfer_cli.config import WeightMap
from flashinfer_cli.errors import UnsupportedModelError
from flashinfer_cli.kernels.reference import to_float


@pytest.mark.parametrize(("dtype", "label"), [("f32", "exact"), ("bf16", "quantized"), ("f16", "quantized")])
def test_conversion_of_neurons(tmp_path: Path, dtype: str, label: str) -> None:
    arrays = save_dense(tmp_path / "source")
    bundle = open_bundle(make_dense(tmp_path / "source", tmp_path / "out", dtype=dtype))
    assert bundle.manifest.exactness == label
    layout = bundle.records[0]
    part = layout.parts[1]
    got = stored(bundle, layout.tensor)[:, part.offset : part.offset + part.nbytes]
    up = arrays["0.up"]
    wanted = {"f32": up, "f16": up.astype(np.float16), "bf16": bfloat16(up)}[dtype]
    assert got.tobytes() == wanted.tobytes()


def test_widening_is_exact_and_narrowing_rounds_to_even() -> None:
    values = np.array([[1.0, -2.5, 1.00390625, 1.01171875, 3e38, 1e-40, 0.1, -0.0]], np.float32)
    assert (convert.convert(values.view(np.uint8), "F32", "BF16") == bfloat16(values)).all()
    halves = convert.convert(values.view(np.uint8), "F32", "BF16")
    wide = convert.convert(halves.view(np.uint8), "BF16", "F32").view(np.float32)
    assert (convert.convert(wide.view(np.uint8), "F32", "BF16") == halves).all()
    assert not convert.rounds("BF16", "F32")
    assert convert.rounds("BF16", "F16")
    assert convert.rounds("Q8_0", "F16")
    with pytest.raises(OverflowError):
        convert.convert(values.view(np.uint8), "F32", "F16")


def dequantized(raw: np.ndarray, format: str) -> np.ndarray:
    if format in OURS:
        return to_float(torch.from_numpy(raw), format).numpy()
    return dequantize(raw, GGMLQuantizationType[format])


@pytest.mark.parametrize("format", [name for name, (block, _) in FORMATS.items() if block > 1 and name != "MXFP4"])
def test_blocks_with_a_nan_scale_are_found(format: str) -> None:
    """A 16-bit word made NaN is found exactly where the dequantiser makes a weight NaN of it."""
    elements, size = FORMATS[format]
    raw = np.random.default_rng(3).integers(1, 60, (4, 2 * size), np.uint8)
    assert convert.all_finite(raw, format)
    found = set()
    with np.errstate(all="ignore"):
        for word in range(size // 2):
            bad = raw.copy()
            bad[2, size + 2 * word : size + 2 * word + 2] = (0x00, 0x7E)
            values = dequantized(bad, format)
            assert values.shape == (4, 2 * elements)
            assert convert.all_finite(bad, format) == bool(np.isfinite(values).all()), word
            found.add(bool(np.isfinite(values).all()))
    assert found == {True, False}


def test_the_scale_of_mxfp4_that_means_nan_is_found() -> None:
    raw = np.full((3, 34), 255, np.uint8)
    raw[:, ::17] = 254
    assert convert.all_finite(raw, "MXFP4")
    raw[1, 17] = 255
    assert not convert.all_finite(raw, "MXFP4")


def gguf_like(path: Path, format: str = "Q8_0", rows: int = 64) -> tuple[FakeCheckpoint, dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)
    shapes = {"embed": (3, 32), "norm": (32,), "up": (rows, 32), "gate": (rows, 32), "down": (32, rows)}
    made: dict[str, tuple[str, tuple[int, ...], np.ndarray]] = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        if name == "norm":
            made[name] = ("F32", shape, values)
        else:  # an odd number of 18-byte blocks before an F32 tensor: the norm would be misaligned
            kind = "Q4_0" if name == "embed" else format
            made[name] = (kind, shape, quantize(values, GGMLQuantizationType[kind]))
    return raw_file(path, made), {name: data for name, (_, _, data) in made.items()}


def gguf_weights(checkpoint: FakeCheckpoint) -> WeightMap:
    tensors = checkpoint.tensors
    model = {"embed": ref(tensors, "embed"), "head": ref(tensors, "embed"), "final_norm": ref(tensors, "norm")}
    return WeightMap(model, ({role: ref(tensors, role) for role in ("gate", "up", "down")},))


@pytest.mark.parametrize("memory", [1, 1 << 28])
@pytest.mark.parametrize("format", ["Q8_0", "Q5_1"])
def test_dense_blocks_become_f16_where_asked_and_the_trunk_keeps_its_blocks(
    tmp_path: Path, memory: int, format: str
) -> None:
    checkpoint, data = gguf_like(tmp_path / "model.gguf", format, rows=160)
    weights = gguf_weights(checkpoint)
    out = write_bundle(checkpoint, model_config(1), weights, tmp_path / "out", dtype="f16", memory_bytes=memory)
    bundle = open_bundle(out)
    assert bundle.manifest.exactness == "quantized"
    layout = bundle.records[0]
    rows = stored(bundle, layout.tensor)
    for part in layout.parts:
        values = dequantize(data[part.role], GGMLQuantizationType[format]).astype(np.float16)
        values = values.T if part.role == "down" else values
        got = rows[:, part.offset : part.offset + part.nbytes]
        assert got.tobytes() == np.ascontiguousarray(values).tobytes(), part.role
    info = bundle.tensors["embed"]
    assert (info.format, info.shape) == ("Q4_0", (3, 32))
    assert stored(bundle, "embed").tobytes() == data["embed"].tobytes()
    with safe_open(out / "trunk.safetensors", "np") as file:
        assert file.get_tensor("embed").shape == (3, 18)
        assert file.get_tensor("norm").tobytes() == data["norm"].tobytes()
    assert bundle.tensors["norm"].offset % 4 == 0


def test_dense_blocks_stay_as_they_are(tmp_path: Path) -> None:
    checkpoint, data = gguf_like(tmp_path / "model.gguf", "Q5_1", rows=160)
    bundle = open_bundle(write_bundle(checkpoint, model_config(1), gguf_weights(checkpoint), tmp_path / "out"))
    assert bundle.manifest.exactness == "exact" and not bundle.records
    for role, where in bundle.weights.layers[0].items():
        info = bundle.tensors[where.tensor]
        assert info.path.name == "blocks-000.safetensors" and info.format == "Q5_1"
        assert stored(bundle, where.tensor).tobytes() == data[role].tobytes()


def test_weights_too_large_for_the_dtype_are_named(tmp_path: Path) -> None:
    arrays = save_dense(tmp_path / "source")
    arrays["1.gate"][3, 4] = 70_000
    save_file(arrays, tmp_path / "source" / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"1\.gate.*F16"):
        make_dense(tmp_path / "source", tmp_path / "out", dtype="f16")
    assert list(tmp_path.iterdir()) == [tmp_path / "source"]


@pytest.mark.parametrize("dtype", ["auto", "f32"])
def test_bands_and_batches_of_any_size_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    save_dense(tmp_path / "source", dtype=np.float16)
    checkpoint = open_safetensors(tmp_path / "source")
    plan = plan_bundle(checkpoint, model_config(2), dense_weights(checkpoint), dtype=dtype)
    assert [records.scratch_bytes(file) for file in plan.files] == [0, 0, 0]
    whole = make_dense(tmp_path / "source", tmp_path / "whole", dtype=dtype)
    memory = 8 * 512 * 7  # bands of 7 neurons of 512 bytes
    itemsize = 2 if dtype == "auto" else 4
    assert [records.scratch_bytes(file, memory) for file in plan.files] == [0, *[INTER * HIDDEN * itemsize] * 2]
    monkeypatch.setattr(bands, "BATCH_BYTES", 5 * INTER * itemsize)  # 5 batches, the last of 4 rows
    monkeypatch.setattr(bands, "TALL_ELEMENTS", 2 * INTER)
    monkeypatch.setattr(bands, "BLOCK_ELEMENTS", 15)
    monkeypatch.setattr(records, "BLOCK_ELEMENTS", 15)
    monkeypatch.setattr(records, "COPY_BYTES", 100)
    monkeypatch.setattr(bands, "SYNC_BYTES", 1000)
    banded = make_dense(tmp_path / "source", tmp_path / "banded", dtype=dtype, memory_bytes=memory)
    assert hashes(whole) == hashes(banded)
