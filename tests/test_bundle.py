"""The bundle: exact bytes of its files, what it refuses, and that a kill anywhere changes nothing of the result."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors import safe_open
from safetensors.numpy import save_file

from flashinfer_cli.bundles import bands, convert, publish, records, writer
from flashinfer_cli.bundles.format import FORMAT_VERSION, Manifest, expert_layout, neuron_layout, safetensors_header
from flashinfer_cli.bundles.reader import BundleCheckpoint, open_bundle
from flashinfer_cli.bundles.verify import verify_bundle
from flashinfer_cli.bundles.writer import plan_bundle, write_bundle
from flashinfer_cli.checkpoint.base import FORMATS, TensorInfo
from flashinfer_cli.config import ModelConfig, MoeConfig, WeightMap, WeightRef
from flashinfer_cli.errors import (
    BundleError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    StorageError,
    UnsupportedModelError,
    UsageError,
)
from flashinfer_cli.kernels.reference import to_float

HIDDEN, INTER, VOCAB = 24, 40, 50
NUMPY = {"F32": np.float32, "F16": np.float16, "U8": np.uint8}


# ------------------------------------------------------------------ checkpoints by hand


class FakeCheckpoint:
    """A Checkpoint over files made here: safetensors, or one raw file of tensors in any format."""

    def __init__(self, path: Path, kind: str, tensors: dict[str, TensorInfo], config: dict[str, Any]) -> None:
        self.path, self.kind, self.tensors, self.config = path, kind, tensors, config
        self.generation_config: dict[str, Any] = {"eos_token_id": 2}

    @property
    def files(self) -> list[Path]:
        return sorted({info.path for info in self.tensors.values()})


def open_safetensors(folder: Path) -> FakeCheckpoint:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            begin, end = entry["data_offsets"]
            tensors[name] = TensorInfo(name, entry["dtype"], tuple(entry["shape"]), path, start + begin, end - begin)
    return FakeCheckpoint(folder, "safetensors", tensors, {"model_type": "llama"})


def raw_file(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], np.ndarray]]) -> FakeCheckpoint:
    """A file of `tensors` (format, shape, bytes), as GGUF's data section is."""
    infos, offset = {}, 0
    with path.open("wb") as file:
        for name, (format, shape, data) in tensors.items():
            raw = data.tobytes()
            file.write(raw + b"\0" * (-len(raw) % 32))
            infos[name] = TensorInfo(name, format, shape, path, offset, len(raw))
            offset += len(raw) + -len(raw) % 32
    return FakeCheckpoint(path, "gguf", infos, {"model_type": "llama"})


def model_config(layers: int, moe: MoeConfig | None = None, moe_layers: tuple[bool, ...] = ()) -> ModelConfig:
    return ModelConfig(
        "llama", VOCAB, HIDDEN, INTER, layers, 4, 2, 6, 64, "silu", moe=moe, moe_layers=moe_layers
    )  # fmt: skip


def ref(tensors: dict[str, TensorInfo], name: str, row: int = 0, rows: int | None = None) -> WeightRef:
    info = tensors[name]
    return WeightRef(name, row, info.num_rows if rows is None else rows, info.cols)


def save_dense(
    folder: Path,
    *,
    gated: bool = True,
    biases: bool = False,
    layers: int = 2,
    dtype: Any = np.float32,
    tied: bool = False,
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    shapes: dict[str, tuple[int, ...]] = {"embed": (VOCAB, HIDDEN), "norm": (HIDDEN,)}
    if not tied:
        shapes["head"] = (VOCAB, HIDDEN)
    for i in range(layers):
        shapes |= {
            f"{i}.norm": (HIDDEN,),
            f"{i}.qkv": (48, HIDDEN),
            f"{i}.up": (INTER, HIDDEN),
            f"{i}.down": (HIDDEN, INTER),
        }
        if gated:
            shapes[f"{i}.gate"] = (INTER, HIDDEN)
        if biases:
            shapes |= {f"{i}.up.bias": (INTER,), f"{i}.down.bias": (HIDDEN,)}
    arrays = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    save_file(arrays, folder / "model.safetensors")
    return arrays


def dense_weights(checkpoint: FakeCheckpoint, layers: int = 2) -> WeightMap:
    tensors = checkpoint.tensors
    model = {"final_norm": ref(tensors, "norm"), "embed": ref(tensors, "embed")}
    model["head"] = ref(tensors, "head" if "head" in tensors else "embed")
    found = []
    for i in range(layers):
        roles = {"q": ref(tensors, f"{i}.qkv", 0, 24), "k": ref(tensors, f"{i}.qkv", 24, 12)}
        roles["v"] = ref(tensors, f"{i}.qkv", 36, 12)
        roles["attn_norm"] = ref(tensors, f"{i}.norm")
        names = ("gate", "up", "down", "up.bias", "down.bias")
        found.append(roles | {role: ref(tensors, f"{i}.{role}") for role in names if f"{i}.{role}" in tensors})
    return WeightMap(model, tuple(found))


def make_dense(folder: Path, out: Path, **options: Any) -> Path:
    checkpoint = open_safetensors(folder)
    return write_bundle(checkpoint, model_config(2), dense_weights(checkpoint), out, **options)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def stored(bundle: BundleCheckpoint, name: str) -> np.ndarray:
    """The bytes of a tensor, by its place in `tensors`, as U8 [rows, row_bytes]."""
    info = bundle.tensors[name]
    raw = np.fromfile(info.path, np.uint8, info.nbytes, offset=info.offset)
    return raw.reshape(info.num_rows, info.row_bytes)


def bfloat16(values: np.ndarray) -> np.ndarray:
    import torch

    return torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    save_dense(tmp_path / "source")
    return tmp_path / "source"


# ------------------------------------------------------------------ exact bytes


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_neuron_records_are_gate_row_up_row_down_column(tmp_path: Path, gated: bool, dtype: str) -> None:
    arrays = save_dense(tmp_path / "source", gated=gated, biases=not gated, dtype=NUMPY[dtype])
    bundle = open_bundle(make_dense(tmp_path / "source", tmp_path / "out"))
    assert bundle.manifest.exactness == "exact"
    for layer in range(2):
        layout = bundle.records[layer]
        used = (3 if gated else 2) * HIDDEN * FORMATS[dtype][1]
        assert (layout.kind, layout.count, layout.format) == ("neurons", INTER, dtype)
        assert layout.width_bytes == -(-used // 512) * 512
        assert [part.role for part in layout.parts] == (["gate", "up", "down"] if gated else ["up", "down"])
        rows = stored(bundle, layout.tensor)
        assert rows.shape == (INTER, layout.width_bytes)
        wanted = [arrays[f"{layer}.up"], arrays[f"{layer}.down"].T]
        wanted = [arrays[f"{layer}.gate"], *wanted] if gated else wanted
        for part, matrix in zip(layout.parts, wanted, strict=True):
            got = rows[:, part.offset : part.offset + part.nbytes]
            assert got.tobytes() == np.ascontiguousarray(matrix).tobytes()
        assert not rows[:, used:].any()


def test_trunk_is_verbatim_in_forward_order_and_opens_with_safetensors(tmp_path: Path) -> None:
    arrays = save_dense(tmp_path / "source", gated=False, biases=True)
    out = make_dense(tmp_path / "source", tmp_path / "out")
    bundle = open_bundle(out)
    with safe_open(out / "trunk.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        for name in ("embed", "norm", "head", "0.norm", "1.up.bias", "0.down.bias"):
            assert file.get_tensor(name).tobytes() == arrays[name].tobytes()
            assert file.get_tensor(name).shape == arrays[name].shape
        assert file.get_tensor("1.qkv.k").tobytes() == arrays["1.qkv"][24:36].tobytes()
    with safe_open(out / "neurons-001.safetensors", "np") as file:
        assert file.get_tensor("layers.1.neurons").shape == (INTER, bundle.records[1].width_bytes // 4)
    header = (out / "trunk.safetensors").read_bytes()
    names = list(json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")]))
    layer = [[f"{i}.norm", f"{i}.qkv.q", f"{i}.qkv.k", f"{i}.qkv.v", f"{i}.up.bias", f"{i}.down.bias"] for i in (0, 1)]
    assert names == ["__metadata__", "embed", *layer[0], *layer[1], "norm", "head"]
    assert bundle.weights.layers[1]["k"] == WeightRef("1.qkv.k", 0, 12, HIDDEN)
    assert "up" not in bundle.weights.layers[0]
    assert "up.bias" in bundle.weights.layers[0]


@pytest.mark.parametrize("count", [1, 50, 300])
def test_headers_end_on_a_page(count: int) -> None:
    header = safetensors_header([(f"tensor.{i}", "F32", (3, i + 1)) for i in range(count)])
    assert len(header) % 4096 == 0
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    entries = json.loads(header[8:])
    assert entries["tensor.0"] == {"dtype": "F32", "shape": [3, 1], "data_offsets": [0, 12]}


def test_every_file_of_a_bundle_has_its_data_on_a_page(dense: Path, tmp_path: Path) -> None:
    out = make_dense(dense, tmp_path / "out")
    names = [path.name for path in out.glob("*.safetensors")]
    assert sorted(names) == ["neurons-000.safetensors", "neurons-001.safetensors", "trunk.safetensors"]
    for name in names:
        start = 8 + int.from_bytes((out / name).read_bytes()[:8], "little")
        assert start % 4096 == 0


def test_layout_arithmetic() -> None:
    neurons = neuron_layout(3, 7, "BF16", [("gate", 100), ("up", 100), ("down", 100)])
    assert [(p.offset, p.nbytes, p.cols) for p in neurons.parts] == [(0, 200, 100), (200, 200, 100), (400, 200, 100)]
    assert (neurons.width_bytes, neurons.shape, neurons.file) == (1024, (7, 512), "neurons-003.safetensors")
    experts = expert_layout(12, 4, [("gate", 3, 32, "Q4_0"), ("up", 3, 32, "Q4_0"), ("down", 5, 256, "Q6_K")])
    assert [(p.offset, p.nbytes) for p in experts.parts] == [(0, 54), (64, 54), (128, 1050)]
    assert (experts.width_bytes, experts.shape, experts.format) == (4096, (4, 4096), "U8")


def test_tied_head_is_stored_once(tmp_path: Path) -> None:
    save_dense(tmp_path / "source", tied=True)
    bundle = open_bundle(make_dense(tmp_path / "source", tmp_path / "out"))
    assert bundle.weights.model["head"] == bundle.weights.model["embed"]
    assert "head" not in bundle.tensors


def test_small_files_are_beside_and_hashed(dense: Path, tmp_path: Path) -> None:
    template = tmp_path / "template"
    template.write_text("{{ messages }}")
    out = make_dense(dense, tmp_path / "out", extras={"chat_template.jinja": template, "tokenizer.json": b"{}"})
    bundle = open_bundle(out)
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert set(bundle.manifest.files) == {path.name for path in out.iterdir()} - {"bundle.json"}
    assert bundle.config == {"model_type": "llama"}
    assert bundle.generation_config == {"eos_token_id": 2}
    assert (bundle.kind, bundle.manifest.source.name, bundle.manifest.source.kind) == (
        "bundle",
        "source",
        "safetensors",
    )
    with pytest.raises(UsageError, match=r"trunk\.safetensors"):
        make_dense(dense, tmp_path / "other", extras={"trunk.safetensors": b""})


# ------------------------------------------------------------------ conversions


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
    if format == "Q4_G64":
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


# ------------------------------------------------------------------ experts


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", ["auto", "f16"])
def test_expert_records(tmp_path: Path, fused: bool, dtype: str) -> None:
    rng = np.random.default_rng(11)
    count, inter = 3, 10
    gate_up = rng.standard_normal((count, 2 * inter, HIDDEN)).astype(np.float32)
    down = rng.standard_normal((count, HIDDEN, inter)).astype(np.float32)
    arrays = {"embed": np.ones((VOCAB, HIDDEN), np.float32), "router": np.ones((count, HIDDEN), np.float32)}
    if fused:
        arrays |= {"gate_up": gate_up, "down": down}
    else:
        for e in range(count):
            arrays |= {
                f"{e}.w1": gate_up[e, :inter].copy(),
                f"{e}.w3": gate_up[e, inter:].copy(),
                f"{e}.w2": down[e].copy(),
            }
    (tmp_path / "source").mkdir()
    save_file(arrays, tmp_path / "source" / "model.safetensors")
    checkpoint = open_safetensors(tmp_path / "source")
    tensors = checkpoint.tensors
    roles = {"router": ref(tensors, "router")}
    for e in range(count):
        if fused:
            roles[f"experts.{e}.gate"] = ref(tensors, "gate_up", 2 * inter * e, inter)
            roles[f"experts.{e}.up"] = ref(tensors, "gate_up", 2 * inter * e + inter, inter)
            roles[f"experts.{e}.down"] = ref(tensors, "down", HIDDEN * e, HIDDEN)
        else:
            names = {"gate": "w1", "up": "w3", "down": "w2"}
            roles |= {f"experts.{e}.{role}": ref(tensors, f"{e}.{name}") for role, name in names.items()}
    embed = ref(tensors, "embed")
    weights = WeightMap({"embed": embed, "head": embed}, (roles,))
    config = model_config(1, MoeConfig(count, 2, inter))
    out = write_bundle(checkpoint, config, weights, tmp_path / "out", dtype=dtype)
    bundle = open_bundle(out)
    target = np.float32 if dtype == "auto" else np.float16
    assert bundle.manifest.exactness == ("exact" if dtype == "auto" else "quantized")
    layout = bundle.records[0]
    assert (layout.kind, layout.count, layout.width_bytes % 4096) == ("experts", count, 0)
    assert all(part.offset % 64 == 0 for part in layout.parts)
    rows = stored(bundle, layout.tensor)
    for e in range(count):
        for part, matrix in zip(layout.parts, (gate_up[e, :inter], gate_up[e, inter:], down[e]), strict=True):
            assert rows[e, part.offset : part.offset + part.nbytes].tobytes() == matrix.astype(target).tobytes()
    assert list(bundle.weights.layers[0]) == ["router"]
    with safe_open(out / "experts-000.safetensors", "np") as file:
        assert file.get_tensor("layers.0.experts").dtype == target
    roles.pop("experts.1.up")
    with pytest.raises(CorruptCheckpointError, match="Expert 1 of layer 0"):
        plan_bundle(checkpoint, config, weights)


def test_expert_blocks_stay_as_they_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(13)
    formats = {"gate": "Q4_0", "up": "Q4_0", "down": "Q8_0"}
    shapes = {"gate": (2, 6, 32), "up": (2, 6, 32), "down": (2, 32, 64)}
    data = {
        role: quantize(rng.standard_normal(shape).astype(np.float32), GGMLQuantizationType[formats[role]])
        for role, shape in shapes.items()
    }
    made = {role: (formats[role], shapes[role], data[role]) for role in shapes}
    checkpoint = raw_file(tmp_path / "m.gguf", made | {"embed": ("F32", (2, 4), np.ones((2, 4), np.float32))})
    roles = {
        f"experts.{e}.{role}": ref(checkpoint.tensors, role, shapes[role][1] * e, shapes[role][1])
        for e in range(2)
        for role in shapes
    }
    embed = ref(checkpoint.tensors, "embed")
    weights = WeightMap({"embed": embed, "head": embed}, (roles,))
    out = write_bundle(checkpoint, model_config(1, MoeConfig(2, 1, 64)), weights, tmp_path / "out", dtype="f16")
    bundle = open_bundle(out)
    assert bundle.manifest.exactness == "exact"
    assert bundle.records[0].format == "U8"
    for e in range(2):
        for part in bundle.records[0].parts:
            got = stored(bundle, "layers.0.experts")[e, part.offset : part.offset + part.nbytes]
            assert got.tobytes() == data[part.role][e].tobytes()
            assert part.format == formats[part.role]


# ------------------------------------------------------------------ what is refused


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


def dense_arrays(folder: Path) -> dict[str, np.ndarray]:
    with safe_open(folder / "model.safetensors", "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  a safe_open is no mapping


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


# ------------------------------------------------------------------ kills and full disks


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
from test_bundle import bands, make_dense, records
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


# ------------------------------------------------------------------ opening and verifying


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
