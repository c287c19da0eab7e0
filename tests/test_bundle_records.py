"""A bundle's files to the byte: neuron and expert records, the trunk, headers, small files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from bundle_sources import (
    HIDDEN,
    INTER,
    NUMPY,
    VOCAB,
    make_dense,
    model_config,
    open_safetensors,
    raw_file,
    ref,
    save_dense,
    stored,
)
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from safetensors import safe_open
from safetensors.numpy import save_file

from flashinfer_cli.bundles.format import expert_layout, neuron_layout, safetensors_header
from flashinfer_cli.bundles.reader import open_bundle
from flashinfer_cli.bundles.writer import plan_bundle, write_bundle
from flashinfer_cli.checkpoint.base import FORMATS
from flashinfer_cli.config import MoeConfig, WeightMap, WeightRef
from flashinfer_cli.errors import CorruptCheckpointError, UsageError


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
